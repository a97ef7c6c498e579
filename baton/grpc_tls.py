"""gRPC over the files of `baton.tls`."""

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import cast

import grpc

from baton.tls import COORDINATOR_NAME, Tls, reason_of

PROBE_TIMEOUT_S = 1.0
CHANNEL_OPTIONS = [("grpc.ssl_target_name_override", COORDINATOR_NAME)]
"""Of a channel to a coordinator: whatever address it has, its certificate must have this name."""


def server_credentials(tls: Tls, on_connection: Callable[[], None] = lambda: None) -> grpc.ServerCredentials:
    """Clients must show a certificate where `tls` has an authority. `on_connection`: for each that is accepted, before
    its handshake, on a thread of gRPC's, which tells nobody how that ends."""
    used = tls.material

    def configuration() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(used.key, used.cert)], used.ca or None)

    def latest() -> grpc.ServerCertificateConfiguration | None:
        nonlocal used
        on_connection()
        if tls.material is used:
            return None
        used = tls.material
        return configuration()

    fetcher = cast("Callable[[], grpc.ServerCertificateConfiguration]", latest)  # None is allowed: nothing new
    return grpc.dynamic_ssl_server_credentials(configuration(), fetcher, bool(used.ca))


def channel(address: str, tls: Tls | None, options: list[tuple[str, int]]) -> grpc.aio.Channel:
    """To a coordinator's link, with the latest files."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    files = tls.material
    credentials = grpc.ssl_channel_credentials(files.ca, files.key, files.cert)
    return grpc.aio.secure_channel(address, credentials, options=[*options, *CHANNEL_OPTIONS])


async def trouble(address: str, tls: Tls | None) -> str | None:
    """Why no link can be had to who listens there, as far as TLS is the reason: gRPC says nothing of it.

    None: nobody listens, or TLS is as it should be.
    """
    return await asyncio.to_thread(_probe, address, tls)


def _probe(address: str, tls: Tls | None) -> str | None:
    host, _, port = address.rpartition(":")
    if tls is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    else:
        context = tls.material.naming
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), PROBE_TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=COORDINATOR_NAME) as connection,
        ):
            if tls is None:
                return "it talks TLS only; add --tls-cert, --tls-key and --tls-ca here"
            # With TLS 1.3 a refusal of our certificate shows here; who accepts it has something to say at once.
            return None if _hears(connection) else "it refused the certificate of --tls-cert; compare --tls-ca there"
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not good: {reason_of(error)}; compare --tls-ca here with --tls-cert there"
    except ssl.SSLEOFError:
        return None  # it went away, or is a proxy with nobody behind it
    except ssl.SSLError:
        if tls is None:
            return None  # no TLS there either
        return "it talks no TLS; add --tls-cert, --tls-key and --tls-ca there, or leave them out here"
    except OSError:
        return None


def _hears(connection: ssl.SSLSocket) -> bool:
    try:
        return bool(connection.recv(1))
    except TimeoutError:
        return True
    except OSError:
        return False
