"""Certificates for tests, made with the openssl command."""

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from baton.config import PublicTlsOptions, TlsOptions

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout")


class Files(NamedTuple):
    cert: str
    key: str
    ca: str

    def options(self) -> TlsOptions:
        return TlsOptions(*self)

    def public(self, client_ca: str = "") -> PublicTlsOptions:
        return PublicTlsOptions(self.cert, self.key, client_ca)

    def flags(self) -> list[str]:
        return ["--tls-cert", self.cert, "--tls-key", self.key, "--tls-ca", self.ca]

    def public_flags(self) -> list[str]:
        return ["--public-tls-cert", self.cert, "--public-tls-key", self.key]


class Authority:
    """Skips the test where there is no openssl."""

    def __init__(self, folder: Path, name: str) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("needs the openssl command to make certificates")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._name = folder, name
        self._key = folder / f"{name}.key"
        self.ca = folder / f"{name}.pem"
        openssl("req", "-x509", *_NEW_KEY, self._key, "-out", self.ca, "-subj", f"/CN={name}")

    def sign(self, who: str, names: str = "DNS:coordinator.baton,DNS:localhost,IP:127.0.0.1", days: int = 30) -> Files:
        """A new pair; a negative number of days: it has ended."""
        cert, key, asks, names_file = (
            self._folder / f"{self._name}-{who}.{kind}" for kind in ("pem", "key", "csr", "ext")
        )
        openssl("req", *_NEW_KEY, key, "-out", asks, "-subj", f"/CN={who}")
        names_file.write_text(f"subjectAltName={names}\n" if names else "basicConstraints=CA:FALSE\n")
        openssl(
            "x509", "-req", "-in", asks, "-CA", self.ca, "-CAkey", self._key, "-CAcreateserial", "-out", cert,
            "-extfile", names_file, "-days", days,
        )  # fmt: skip
        return Files(str(cert), str(key), str(self.ca))


def openssl(*words: "str | Path | int") -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True, timeout=20)
