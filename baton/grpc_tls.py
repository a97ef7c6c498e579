"""gRPC over the files of `baton.tls`."""

from collections.abc import Callable
from typing import cast

import grpc

from baton.tls import Tls


def server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Clients must show a certificate where `tls` has an authority."""
    used = tls.material

    def configuration() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(used.key, used.cert)], used.ca or None)

    def latest() -> grpc.ServerCertificateConfiguration | None:
        nonlocal used
        if tls.material is used:
            return None
        used = tls.material
        return configuration()

    fetcher = cast("Callable[[], grpc.ServerCertificateConfiguration]", latest)  # None is allowed: nothing new
    return grpc.dynamic_ssl_server_credentials(configuration(), fetcher, bool(used.ca))
