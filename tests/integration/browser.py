"""A real headless Chromium, driven by the W3C's WebDriver protocol over HTTP. source: w3.org/TR/webdriver2"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "" if CHROMIUM and DRIVER else "needs chromium and chromedriver on PATH"

_PORT = re.compile(rb"started successfully on port (\d+)")
_ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--lang=en-US"),
)


class Browser:
    """One window."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url  # of the WebDriver session

    async def send(self, path: str, **content: Any) -> Any:
        """One command; its value. raises: AssertionError with the driver's message."""
        async with self._session.post(f"{self._url}/{path}", json=content) as answer:
            value = (await answer.json())["value"]
            assert answer.ok, value
            return value

    async def open(self, url: str) -> None:
        await self.send("url", url=url)

    async def run(self, script: str, *arguments: Any) -> Any:
        """Run a function body in the page; what it returns."""
        return await self.send("execute/sync", script=script, args=arguments)

    async def until(self, expression: str, seconds: float = 60) -> Any:
        """Wait until a JavaScript expression is true."""
        for _ in range(int(seconds / 0.1)):
            value = await self.run(f"return {expression}")
            if value:
                return value
            await asyncio.sleep(0.1)
        raise AssertionError(f"not in {seconds} s: {expression}\n{await self.text()}")

    async def text(self) -> str:
        return str(await self.run("return document.body.innerText"))

    async def press(self, *keys: str) -> None:
        """Press keys one after another, wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        await self.send("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    async def resize(self, width: int, height: int) -> None:
        """The page's own size, whatever the least size of a window is."""
        await self._devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def prefer(self, scheme: str) -> None:
        """scheme: light or dark."""
        await self._devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def screenshot(self) -> bytes:
        """The whole page, as PNG."""
        shot = await self._devtools("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    async def complaints(self) -> list[str]:
        """What the console has said since the last time, violations of the content policy among it."""
        return [entry["message"] for entry in await self.send("se/log", type="browser")]

    async def close(self) -> None:
        async with self._session.delete(self._url) as answer:
            assert answer.ok, await answer.text()

    async def _devtools(self, command: str, **params: Any) -> Any:
        return await self.send("goog/cdp/execute", cmd=command, params=params)


@contextlib.asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Browser]:
    """folder: for the browser's profile."""
    assert CHROMIUM, MISSING
    assert DRIVER, MISSING
    # All it writes goes to the folder, and it finds no settings of whoever runs the tests.
    environ = {**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    driver = await asyncio.create_subprocess_exec(
        DRIVER, "--port=0", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, env=environ
    )
    try:
        url = f"http://127.0.0.1:{await _port_of(driver)}"
        async with aiohttp.ClientSession() as session:
            window = await _opened(session, url, folder)
            try:
                yield window
            finally:
                await window.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            driver.kill()
        await driver.wait()


async def _port_of(driver: asyncio.subprocess.Process) -> int:
    assert driver.stdout is not None
    async for line in driver.stdout:
        if found := _PORT.search(line):
            return int(found[1])
    raise AssertionError("chromedriver ended at once")


async def _opened(session: aiohttp.ClientSession, url: str, folder: Path) -> Browser:
    options = {"binary": CHROMIUM, "args": [*_ARGUMENTS, f"--user-data-dir={folder / 'profile'}"]}
    wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
    async with session.post(f"{url}/session", json={"capabilities": {"alwaysMatch": wanted}}) as answer:
        value = (await answer.json())["value"]
        assert answer.ok, value
    return Browser(session, f"{url}/session/{value['sessionId']}")
