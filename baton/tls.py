"""TLS of one process: PEM files made into contexts, tried before they are used, and looked at again while it runs.

`inside`, between Baton's own processes: mutual TLS. Who holds a certificate of the authority belongs to the cluster;
names are not compared, as workers know each other by address. Only a coordinator needs a name in its certificate, so
that a worker's is of no use to pose as one.

`outside`, towards clients: the server's certificate, and an authority for theirs where they must show one.

Files that are replaced are taken up without a restart. Before they are used, a handshake in memory of these files with
themselves tells whether they fit each other and hold today; new ones that do not leave the old ones in use.
"""

import asyncio
import logging
import os
import ssl
import stat
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from baton.config import PublicTlsOptions, TlsOptions
from baton.errors import ConfigurationError

log = logging.getLogger(__name__)

COORDINATOR_NAME: Final = "coordinator.baton"
"""The DNS name in the certificate of every coordinator, wherever it runs."""
LOOK_EVERY_S: Final = 2.0
SAY_AGAIN_S: Final = 60.0
EXPIRES_SOON_S: Final = 7 * 86400.0
WARN_EVERY_S: Final = 86400.0

Handshake = (ssl.SSLWantReadError, ssl.SSLWantWriteError)
Files = Mapping[str, str]
"""Flag -> path; in the order certificate, key, authority."""


class Material(NamedTuple):
    """Of one reading of the files, all of which fit each other."""

    cert: bytes
    key: bytes
    ca: bytes
    """PEM; empty without an authority."""
    server: ssl.SSLContext
    client: ssl.SSLContext
    """Compares no names. Outside: trusts nobody but this certificate."""
    naming: ssl.SSLContext
    """The same, but the server's certificate must have the name that is asked for."""
    expires_at: float
    """Seconds since 1970."""


class Tls:
    """One identity. Contexts are those of the latest files that were good: take them anew for each connection.

    `counters`: tls_refused, tls_reloads, tls_reload_failures; the owner may put its own in place.
    """

    def __init__(self, files: Files, build: Callable[[Files], Material]) -> None:
        """Raises ConfigurationError naming the flag of a file that cannot be used, and what to change."""
        self._files = files
        self._build = build
        self.counters: dict[str, float] = {}
        self._lock = threading.Lock()
        self._said: dict[str, float] = {}
        self._seen = self._used = self._signature()
        self.material = build(files)
        self._warn_of_end()

    @property
    def server(self) -> ssl.SSLContext:
        return self.material.server

    @property
    def client(self) -> ssl.SSLContext:
        return self.material.client

    async def watch(self) -> None:
        """Look at the files every LOOK_EVERY_S, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        """Take up files that changed before the previous look: then whoever replaces them, one by one, is done."""
        if time.monotonic() >= self._warn_at:
            self._warn_of_end()
        before, self._seen = self._seen, self._signature()
        if self._seen == self._used or self._seen != before:
            return
        self._used = self._seen
        try:
            self.material = self._build(self._files)
        except ConfigurationError as error:
            self._count("tls_reload_failures")
            log.warning("new TLS files are not used, the old ones stay: %s", error)
        else:
            self._count("tls_reloads")
            log.info("new TLS files are in use: %s", ", ".join(self._files.values()))
            self._warn_of_end()

    def refuse(self, where: str, reason: str) -> None:
        """Count a peer that was not let in, and say so, each reason once in a while. From any thread."""
        self._count("tls_refused")
        text, now = f"{where}: a peer was refused: {reason}", time.monotonic()
        if now - self._said.get(text, -SAY_AGAIN_S) >= SAY_AGAIN_S:
            if len(self._said) > 100:
                self._said.clear()
            self._said[text] = now
            log.warning("%s", text)

    def listener(self, where: str) -> ssl.SSLContext:
        """A context for a listener to keep: each connection gets the latest one, and each refused one is counted."""
        return _Latest.of(self, where)

    def _count(self, name: str) -> None:
        with self._lock:
            self.counters[name] = self.counters.get(name, 0.0) + 1.0

    def _signature(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(_signature(path) for path in self._files.values())

    def _warn_of_end(self) -> None:
        self._warn_at = time.monotonic() + WARN_EVERY_S
        left_s = self.material.expires_at - time.time()
        if left_s < EXPIRES_SOON_S:
            log.warning("the certificate %s ends in %.1f days", next(iter(self._files.values())), left_s / 86400)


def inside(options: TlsOptions, name: str = "") -> Tls | None:
    """Of a process of the cluster; None without files. `name`: what the certificate must be good for as a server's.

    Raises ConfigurationError.
    """
    files = {"--tls-cert": options.tls_cert, "--tls-key": options.tls_key, "--tls-ca": options.tls_ca}
    return Tls(files, lambda files: _build_inside(files, name)) if options.tls_cert else None


def outside(options: PublicTlsOptions) -> Tls | None:
    """Towards clients; None without files. Raises ConfigurationError."""
    files = {"--public-tls-cert": options.public_tls_cert, "--public-tls-key": options.public_tls_key}
    if options.public_tls_client_ca:
        files["--public-tls-client-ca"] = options.public_tls_client_ca
    return Tls(files, _build_outside) if options.public_tls_cert else None


def check_secret(flag: str, path: str) -> None:
    """Raise ConfigurationError for a file that is not there or that every user of this machine may read."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ConfigurationError(f"{flag} '{path}' cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ConfigurationError(f"{flag} '{path}' is no file")
    if mode & stat.S_IRWXO:
        raise ConfigurationError(f"{flag} '{path}' may be read by every user of this machine; say chmod 600 {path}")


def _build_inside(files: Files, name: str) -> Material:
    (cert_flag, cert), _, (ca_flag, ca) = files.items()
    pems = _read(files)
    server, client, naming = (
        ssl.SSLContext(kind) for kind in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_CLIENT)
    )
    client.check_hostname = False
    for context in (server, client, naming):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        _load_pair(context, files)
        _load_authority(context, ca_flag, ca)
    server.num_tickets = 0  # nobody resumes, and a handshake ends with its last message
    problem = f"{cert_flag} '{cert}' does not pass for {ca_flag} '{ca}'"
    expires_at = _try(server, naming if name else client, name, problem)
    return _unchanged(files, Material(pems[0], pems[1], pems[2], server, client, naming, expires_at))


def _build_outside(files: Files) -> Material:
    (cert_flag, cert), *_ = files.items()
    pems = _read(files)
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_pair(server, files)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    _load_authority(client, cert_flag, cert)
    expires_at = _try(server, client, "", f"{cert_flag} '{cert}' cannot be used")
    if "--public-tls-client-ca" in files:
        _load_authority(server, "--public-tls-client-ca", files["--public-tls-client-ca"])
        server.verify_mode = ssl.CERT_REQUIRED
    authority = b"".join(pems[2:])
    return _unchanged(files, Material(pems[0], pems[1], authority, server, client, client, expires_at))


def _read(files: Files) -> list[bytes]:
    paths = list(files.items())
    check_secret(*paths[1])
    contents = []
    for flag, path in paths:
        try:
            contents.append(Path(path).read_bytes())
        except OSError as error:
            raise ConfigurationError(f"{flag} '{path}' cannot be read: {error.strerror}") from error
    return contents


def _unchanged(files: Files, material: Material) -> Material:
    if b"".join(_read(files)) != material.cert + material.key + material.ca:
        raise ConfigurationError(f"{', '.join(files.values())} changed while they were read; try again")
    return material


def _load_pair(context: ssl.SSLContext, files: Files) -> None:
    (cert_flag, cert), (key_flag, key), *_ = files.items()
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # never ask at a terminal
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{cert_flag} '{cert}' and {key_flag} '{key}' cannot be used: {_reason(error)}; "
            "they are PEM files of one pair, the key without a password"
        ) from error


def _load_authority(context: ssl.SSLContext, flag: str, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except OSError as error:
        raise ConfigurationError(f"{flag} '{path}' cannot be used: {_reason(error)}; it is a PEM file") from error


def _try(server: ssl.SSLContext, client: ssl.SSLContext, name: str, problem: str) -> float:
    """Let the two shake hands. Returns when the server's certificate ends, in seconds since 1970."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname=name or None),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    try:
        for end in ends * 3:  # a flight each way, and one more
            try:
                end.do_handshake()
            except Handshake:
                continue
    except ssl.SSLError as error:
        advice = f"; it needs the name DNS:{name}, see docs/security.md" if "Hostname" in _reason(error) else ""
        raise ConfigurationError(f"{problem}: {_reason(error)}{advice}") from error
    found = ends[0].getpeercert() or {}
    return float(ssl.cert_time_to_seconds(str(found["notAfter"])))


def _reason(error: Exception) -> str:
    """Without file and line of the library."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return getattr(error, "strerror", None) or str(error)


def reason_of(error: Exception) -> str:
    """Why a handshake failed, in a few words."""
    return _reason(error) or type(error).__name__


def _signature(path: str) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_ino, found.st_size


class _Latest(ssl.SSLContext):
    """Hands every connection to the context that is the latest then."""

    tls: Tls
    judged: type[ssl.SSLObject]

    @classmethod
    def of(cls, tls: Tls, where: str) -> "_Latest":
        class Judged(ssl.SSLObject):
            def do_handshake(self) -> None:
                try:
                    super().do_handshake()
                except Handshake:
                    raise
                except ssl.SSLError as error:
                    tls.refuse(where, _reason(error))
                    raise

        context = cls(ssl.PROTOCOL_TLS_SERVER)
        context.tls, context.judged = tls, Judged
        return context

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        latest = self.tls.server
        latest.sslobject_class = self.judged
        return latest.wrap_bio(incoming, outgoing, server_side, server_hostname, session)
