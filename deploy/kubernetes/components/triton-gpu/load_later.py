"""Loads into the Triton beside it what takes a while or is not there yet, while that Triton answers with the rest.

Runs in the background of the Triton container, whose GPU and TensorRT it looks at; it needs nothing but Python. Models
named in LOAD_LATER are in the repository and only slow to load (ONNX Runtime's TensorRT provider builds an engine).
Plans are waited for: a plan runs on one compute capability with one release of TensorRT, so this pod takes the one that
is named after its own, and no other, whatever else lies there.

LOAD_LATER      names of models, separated by spaces
PLANS           folder of plans, PLANS/<model>/<identity>/ being the model's whole folder; empty: none are waited for
PLANS_WANTED    model=<graph>-b<batches>, separated by spaces: the identity without its GPU and its release
OWN_REPOSITORY  a second model repository of this Triton, for the plans
TRITON_HTTP     its address, 127.0.0.1:8000
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

FIRST_PAUSE, LONGEST_PAUSE = 2.0, 30.0  # seconds between two rounds


def capability() -> str:
    """Of the GPU that this container sees, "8.9"; a MIG slice has that of its GPU."""
    asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]  # noqa: S603


def tensorrt(environ: Mapping[str, str], root: Path = Path("/")) -> str:
    """The release in this container, "11.2.1": as NVIDIA's image says it, or by the name of the library."""
    libraries = (*root.glob("usr/lib/*/libnvinfer.so.*"), *root.glob("usr/local/cuda*/**/libnvinfer.so.*"))
    for text in (environ.get("TRT_VERSION", ""), *(path.name.partition(".so.")[2] for path in libraries)):
        if found := re.match(r"\d+\.\d+\.\d+", text):
            return found[0]
    raise LookupError("neither TRT_VERSION nor libnvinfer.so.* says which TensorRT this is")


class Loader:
    """What is still to be loaded, and how a round of trying goes."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.address = environ.get("TRITON_HTTP", "127.0.0.1:8000")
        self.own = Path(environ.get("OWN_REPOSITORY", "/own"))
        self.plans: dict[str, Path] = {}
        self.open: list[str] = []
        self._said: dict[str, str] = {}
        if environ.get("PLANS"):
            self._want_plans(environ)
        self.open += environ.get("LOAD_LATER", "").split()

    def _want_plans(self, environ: Mapping[str, str]) -> None:
        try:
            here = f"cc{capability()}-trt{tensorrt(environ)}"
        except (LookupError, OSError, subprocess.SubprocessError) as e:
            self._say("plans", f"none are taken, since it can't be told which run here: {e}")
            return
        for each in environ.get("PLANS_WANTED", "").split():
            model, _, wanted = each.partition("=")
            self.plans[model] = Path(environ["PLANS"], model, f"{wanted}-{here}")
            self.open.append(model)

    def wait_until_up(self) -> None:
        while True:
            try:
                with urllib.request.urlopen(f"http://{self.address}/v2/health/live", timeout=5):
                    return
            except OSError:
                time.sleep(1)

    def round(self) -> None:
        """Try each that is open once."""
        self.open = [model for model in self.open if not self._try(model)]

    def _try(self, model: str) -> bool:
        plan = self.plans.get(model)
        if plan is not None:
            if not (plan / "config.pbtxt").is_file():
                return self._say(model, f"waiting for {plan}")
            self._take(model, plan)
        request = urllib.request.Request(f"http://{self.address}/v2/repository/models/{model}/load", data=b"{}")
        try:
            with urllib.request.urlopen(request):  # noqa: S310  # http, as written above
                self._say(model, "loaded")
                return True
        except urllib.error.HTTPError as e:
            return self._say(model, f"not loaded: {_reason(e)}")
        except OSError as e:
            return self._say(model, f"not loaded: {e}")

    def _take(self, model: str, plan: Path) -> None:
        """A link, so that the plan is nowhere twice; put there by a rename, over one that an earlier life has left."""
        link = self.own / f".{model}"
        link.unlink(missing_ok=True)
        link.symlink_to(plan)
        link.replace(self.own / model)

    def _say(self, model: str, what: str) -> bool:
        if self._said.get(model) != what:  # once, not every round
            self._said[model] = what
            sys.stderr.write(f"load-later: {model}: {what}\n")
            sys.stderr.flush()
        return False


def _reason(error: urllib.error.HTTPError) -> str:
    body = error.read().decode(errors="replace")
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:500]


def main() -> None:
    loader = Loader(os.environ)
    loader.wait_until_up()
    pause = FIRST_PAUSE
    while True:
        loader.round()
        if not loader.open:
            return
        time.sleep(pause)
        pause = min(pause * 1.5, LONGEST_PAUSE)


if __name__ == "__main__":
    main()
