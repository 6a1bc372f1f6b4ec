"""Certificates for tests, made by the openssl command."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path


def read(file: str) -> bytes:
    return Path(file).read_bytes()


@cache
def any_authority() -> str:
    """The PEM text of one, where it does not matter which."""
    with tempfile.TemporaryDirectory() as folder:
        Authority(Path(folder))
        return Path(folder, "ca.pem").read_text()


@dataclass(frozen=True)
class Files:
    ca: str
    certificate: str
    key: str


class Authority:
    """Makes a certificate authority in `folder`, and certificates that it has signed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._run(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", "/CN=test authority", "-keyout", "ca.key", "-out", "ca.pem",
        )  # fmt: skip

    def issue(self, name: str, days: int = 2, names: str = "") -> Files:
        """days: until it expires; with 0 it has, a second later. names: its alternative names, else that DNS name."""
        (self._folder / f"{name}.ext").write_text(f"subjectAltName={names or f'DNS:{name}'}\n")
        self._run(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
            "-keyout", f"{name}.key", "-out", f"{name}.csr",
        )  # fmt: skip
        self._run(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", str(days), "-extfile", f"{name}.ext", "-out", f"{name}.pem",
        )  # fmt: skip
        here = str(self._folder)
        return Files(f"{here}/ca.pem", f"{here}/{name}.pem", f"{here}/{name}.key")

    def _run(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self._folder, check=True, capture_output=True)
