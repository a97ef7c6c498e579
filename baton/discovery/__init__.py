"""How workers find coordinators: a list from configuration, or etcd. Knows addresses only, no requests."""

from collections.abc import Callable

from baton.config import DiscoveryOptions
from baton.discovery.base import Discovery, Fixed
from baton.discovery.etcd import Etcd

__all__ = ["Discovery", "open_discovery"]


def open_discovery(
    options: DiscoveryOptions, fixed: frozenset[str] = frozenset(), on_lost: Callable[[], None] = lambda: None
) -> Discovery:
    """`fixed`: addresses that are there whatever the store says. Raises ConfigurationError."""
    return Etcd(options, fixed, on_lost) if options.discovery else Fixed(fixed)
