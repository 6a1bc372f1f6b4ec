"""I/O: the public keys of issuers of tokens, from files and URLs, kept fresh while tokens are read with them.

An issuer changes its keys now and then, and publishes a new one before it signs with it. So keys are fetched
regularly, and when a token names one that is not known; but at most every LEAST_SECONDS, since strangers choose what
tokens name. When fetching fails the keys that are known stay: an issuer that is away must not lock everybody out.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from gateway.access.principal import Principal
from gateway.access.tokens import Issuer, KeySet, Tokens, UnknownKid
from gateway.errors import KeysAwaited

_log = logging.getLogger(__name__)

LEAST_SECONDS: Final = 30.0  # between two fetches that tokens have asked for
_RETRY_SECONDS: Final = 5.0  # while no key is known
_TIMEOUT: Final = aiohttp.ClientTimeout(total=10.0)
_MOST_BYTES: Final = 1 << 20
_DISCOVERY: Final = "/.well-known/openid-configuration"  # OpenID Connect Discovery 1.0, section 4


@dataclass(frozen=True, slots=True)
class KeySource:
    """An issuer, and where its keys are."""

    issuer: Issuer
    keys: KeySet | None = None  # read from a file; None: they are fetched
    url: str = ""  # "": where the issuer's own configuration says
    ca: str | None = None  # PEM file
    refresh: float = 600.0  # seconds

    @property
    def where(self) -> tuple[str, str, str | None, tuple[str, ...]]:
        """Equal for sources whose fetched keys are the same."""
        return self.issuer.issuer, self.url, self.ca, self.issuer.algorithms


class _Fetched:
    """The keys of one issuer that has a URL."""

    def __init__(self, source: KeySource) -> None:
        self.source = source
        self.keys: KeySet | None = None
        self.text = b""  # that they were read from
        self.wanted = asyncio.Event()
        self.asked = asyncio.Event()  # have its keys been asked for, with or without an answer?
        self.fetching = True  # from the start, so that its first tokens wait
        self.tried_at = 0.0
        self.task: asyncio.Task[None] | None = None


class IssuerKeys:
    """Reads tokens. `apply` may be called again with other issuers."""

    def __init__(self, changed: Callable[[], None]) -> None:
        """changed: called when an issuer's keys are others than before."""
        self._changed = changed
        self._sources: Sequence[KeySource] = ()
        self._fetched: dict[str, _Fetched] = {}
        self._tokens = Tokens((), {})

    def apply(self, sources: Sequence[KeySource]) -> None:
        """Put these issuers in force; keys that were fetched for one that stays, stay."""
        before, self._fetched = self._fetched, {}
        self._sources = sources
        for source in sources:
            if source.keys is not None:
                continue
            known = before.get(source.issuer.issuer)
            if known is not None and known.source.where == source.where:
                before.pop(source.issuer.issuer)
                known.source = source
                self._fetched[source.issuer.issuer] = known
                continue
            fetched = self._fetched[source.issuer.issuer] = _Fetched(source)
            fetched.task = asyncio.ensure_future(self._keep(fetched))
        for gone in before.values():
            if gone.task is not None:
                gone.task.cancel()
        self._assemble()

    async def wait_first(self, seconds: float) -> None:
        """Wait until each issuer's keys have been asked for once, at most so long."""
        asked = [asyncio.ensure_future(each.asked.wait()) for each in self._fetched.values()]
        if asked:
            await asyncio.wait(asked, timeout=seconds)
        for each in asked:
            each.cancel()

    async def aclose(self) -> None:
        tasks = [each.task for each in self._fetched.values() if each.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def read(self, token: str) -> Principal:
        """Whose token it is. raises: Unauthenticated; KeysAwaited if its key may be known in a moment."""
        try:
            return self._tokens.principal(token)
        except UnknownKid as error:
            fetched = self._fetched.get(error.reason)
            if fetched is not None:
                self._want(fetched)
                if fetched.fetching or fetched.keys is None:
                    raise KeysAwaited("the keys of the token's issuer are being fetched; try again") from None
            error.reason = "unknown_kid"
            raise

    def _want(self, fetched: _Fetched) -> None:
        if not fetched.fetching and time.monotonic() - fetched.tried_at >= LEAST_SECONDS:
            fetched.fetching = True
            fetched.wanted.set()

    def _assemble(self) -> None:
        keys = {source.issuer.issuer: source.keys for source in self._sources if source.keys is not None}
        keys.update({name: each.keys for name, each in self._fetched.items() if each.keys is not None})
        self._tokens = Tokens([source.issuer for source in self._sources], keys)

    async def _keep(self, fetched: _Fetched) -> None:
        """Fetch an issuer's keys again and again, until cancelled."""
        while True:
            fetched.wanted.clear()
            fetched.fetching = True
            fetched.tried_at = time.monotonic()
            failure = await self._maybe_failure(fetched)
            fetched.fetching = False
            fetched.asked.set()
            if failure:
                _log.warning("the keys of issuer %s could not be fetched: %s", fetched.source.issuer.issuer, failure)
            pause = fetched.source.refresh if fetched.keys is not None else _RETRY_SECONDS
            waiting = asyncio.ensure_future(fetched.wanted.wait())
            try:
                await asyncio.wait([waiting], timeout=pause)
            finally:
                waiting.cancel()

    async def _maybe_failure(self, fetched: _Fetched) -> str:
        """Fetch once. Why it failed; "" if it did not."""
        try:
            text = await _fetch(fetched.source)
            if text != fetched.text:
                fetched.keys = KeySet(json.loads(text), fetched.source.issuer.algorithms)
                fetched.text = text
                self._assemble()
                self._changed()
                _log.info("issuer %s: keys read", fetched.source.issuer.issuer)
                if fetched.keys.left_out:
                    wrong = "issuer %s publishes too many keys: %d are left out, and tokens signed by them don't count"
                    _log.warning(wrong, fetched.source.issuer.issuer, fetched.keys.left_out)
        except (aiohttp.ClientError, OSError, ValueError, RecursionError, asyncio.TimeoutError) as error:
            return f"{type(error).__name__}: {error}"
        except Exception as error:  # it must be tried again all the same, or nobody of this issuer gets in any more
            _log.error("issuer %s: unforeseen failure", fetched.source.issuer.issuer, exc_info=error)
            return type(error).__name__
        return ""


async def _fetch(source: KeySource) -> bytes:
    """:raises ClientError, OSError, ValueError: if that is not possible."""
    context = ssl.create_default_context(cafile=source.ca)
    async with aiohttp.ClientSession(timeout=_TIMEOUT, trust_env=True) as session:
        url = source.url
        if not url:
            found: Any = json.loads(await _get(session, source.issuer.issuer.rstrip("/") + _DISCOVERY, context))
            if not isinstance(found, dict) or found.get("issuer") != source.issuer.issuer:
                raise ValueError("the configuration that it publishes is another issuer's, or none")
            url = found.get("jwks_uri", "")
            if not isinstance(url, str) or not url.startswith(("https://", source.issuer.issuer.rstrip("/") + "/")):
                raise ValueError("the configuration that it publishes names no https URL as jwks_uri")
        return await _get(session, url, context)


async def _get(session: aiohttp.ClientSession, url: str, context: ssl.SSLContext) -> bytes:
    async with session.get(url, ssl=context, allow_redirects=False) as answer:
        if answer.status != 200:
            raise ValueError(f"{url} answers with status {answer.status}")
        body = bytearray()
        async for chunk in answer.content.iter_chunked(1 << 16):
            body += chunk
            if len(body) > _MOST_BYTES:
                raise ValueError(f"{url} answers with more than {_MOST_BYTES} bytes")
        return bytes(body)
