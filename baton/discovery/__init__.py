"""How workers find coordinators: a list from configuration, etcd, the Kubernetes API. Knows addresses, no requests."""

from collections.abc import Callable

from baton.config import KUBERNETES, DiscoveryOptions
from baton.discovery.base import Discovery, Fixed
from baton.discovery.etcd import Etcd
from baton.discovery.kubernetes import Kubernetes

__all__ = ["Discovery", "open_discovery"]


def open_discovery(
    options: DiscoveryOptions, fixed: frozenset[str] = frozenset(), on_lost: Callable[[], None] = lambda: None
) -> Discovery:
    """`fixed`: addresses that are there whatever the store says. Raises ConfigurationError."""
    if options.discovery.startswith(KUBERNETES):
        return Kubernetes(options, fixed, on_lost)
    return Etcd(options, fixed, on_lost) if options.discovery else Fixed(fixed)
