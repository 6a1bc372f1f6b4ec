"""TLS files: what is wrong with them is said when the config is read, not by the first client."""

from __future__ import annotations

import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from certificates import Authority, Files

from gateway.config import ConfigError, load
from gateway.config.certificates import problems, validity

SERVER = """
server: {{tls: {{cert: "{cert}", key: "{key}"{more}}}}}
upstreams: {{cpu: {{endpoints: ["triton:8001"]}}}}
direct: {{models: all}}
"""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def files(authority: Authority) -> Files:
    return authority.issue("gateway")


def config(folder: Path, cert: str, key: str, more: str = "") -> Path:
    file = folder / "gateway.yaml"
    file.write_text(SERVER.format(cert=cert, key=key, more=more))
    return file


def test_a_certificates_validity_is_what_openssl_says(files: Files) -> None:
    ends = subprocess.run(
        ["openssl", "x509", "-in", files.certificate, "-noout", "-enddate"], check=True, capture_output=True, text=True
    ).stdout.strip()
    begins_at, ends_at = validity(files.certificate)
    assert ends_at == datetime.strptime(ends, "notAfter=%b %d %H:%M:%S %Y GMT").replace(tzinfo=timezone.utc)
    assert ends_at - begins_at == timedelta(days=2)


AGES = {
    "fresh": (timedelta(hours=1), None),
    "a fifth of its life is left": (timedelta(days=2, hours=-9), "the certificate expires on "),
    "expired": (timedelta(days=2), "the certificate expired on "),
    "not valid yet": (timedelta(hours=-1), "the certificate is not valid before "),
}


@pytest.mark.parametrize(("age", "text"), AGES.values(), ids=AGES)
def test_a_certificate_is_warned_of_before_it_expires_and_refused_never(
    age: timedelta, text: str | None, files: Files, tmp_path: Path
) -> None:
    """A gateway that is restarted must not stay away because its certificate is old."""
    loaded = load(config(tmp_path, files.certificate, files.key), {})
    found = list(problems(loaded.config, validity(files.certificate)[0] + age))
    assert [problem.path for problem in found] == [("server", "tls", "cert")] * (text is not None)
    assert all(problem.wrong.startswith(text or "") for problem in found)
    assert loaded.expiries == {"server.tls.cert": validity(files.certificate)[1].timestamp()}


def test_a_key_of_another_certificate_is_refused(authority: Authority, files: Files, tmp_path: Path) -> None:
    other = authority.issue("other")
    with pytest.raises(ConfigError, match=r"server\.tls\.key: does not belong to the certificate"):
        load(config(tmp_path, files.certificate, other.key), {})


WRONG = {
    "key for certificate": ("{key}", "{key}", "", r"tls\.cert: holds no certificate"),
    "certificate for key": ("{cert}", "{cert}", "", r"tls\.key: holds no key that can be used"),
    "text for a certificate": ("{text}", "{key}", "", r"tls\.cert: holds no certificate"),
    "cut short": ("{short}", "{key}", "", r"tls\.cert: holds no certificate"),
    "encrypted key": ("{cert}", "{locked}", "", r"tls\.key: holds no key that can be used"),
    "text for an authority": ("{cert}", "{key}", ', client_ca: "{text}"', r"tls\.client_ca: holds no certificate"),
}


@pytest.mark.parametrize(("cert", "key", "more", "finding"), WRONG.values(), ids=WRONG)
def test_a_file_that_cannot_be_used_is_named(
    cert: str, key: str, more: str, finding: str, files: Files, tmp_path: Path
) -> None:
    text, short, locked = tmp_path / "text", tmp_path / "short", tmp_path / "locked"
    text.write_text("not PEM\n")
    begin, *middle, end = Path(files.certificate).read_text().strip().splitlines()
    short.write_text("\n".join([begin, middle[0], end, ""]))
    subprocess.run(
        ["openssl", "ec", "-in", files.key, "-aes256", "-passout", "pass:x", "-out", str(locked)],
        check=True,
        capture_output=True,
    )
    names = {"cert": files.certificate, "key": files.key, "text": text, "short": short, "locked": locked}
    with pytest.raises(ConfigError, match=finding):
        load(config(tmp_path, cert.format(**names), key.format(**names), more.format(**names)), {})
