"""Which tenant brought which entry of a tier, and that none has more than its share. Bookkeeping only: no lock.

A tenant is known by `baton.block_names.tenant_name`. Entries without a tenant are not looked after: they are what
everybody may use, and have whatever room the others leave.
"""

import math
from collections import OrderedDict
from collections.abc import Container

NOBODY = b""
"""The tenant of requests without a salt."""


class Tenants:
    def __init__(self, capacity: int, share: float) -> None:
        """`capacity` in entries, of which a tenant may have that share. With a share of 1 nothing is counted."""
        self._max_entries = int(share * capacity) if share < 1 else math.inf
        self._tenant_of: dict[bytes, bytes] = {}
        self._entries: dict[bytes, OrderedDict[bytes, None]] = {}
        """By tenant, longest unused first."""

    def num_over(self, tenant: bytes, num_more: int = 0) -> int:
        """Entries that the tenant would have beyond its share if it brought so many more."""
        if tenant == NOBODY or self._max_entries == math.inf:
            return 0
        return max(0, len(self._entries.get(tenant, ())) + num_more - int(self._max_entries))

    def add(self, name: bytes, tenant: bytes) -> None:
        if tenant != NOBODY and self._max_entries < math.inf:
            self._tenant_of[name] = tenant
            self._entries.setdefault(tenant, OrderedDict())[name] = None

    def use(self, name: bytes) -> None:
        if (tenant := self._tenant_of.get(name)) is not None:
            self._entries[tenant].move_to_end(name)

    def remove(self, name: bytes) -> None:
        """The entry is gone, if it was here."""
        if (tenant := self._tenant_of.pop(name, None)) is not None:
            entries = self._entries[tenant]
            del entries[name]
            if not entries:
                del self._entries[tenant]

    def oldest(self, tenant: bytes, *spared: Container[bytes]) -> bytes | None:
        """What the tenant used longest ago and nobody spares."""
        entries = self._entries.get(tenant, ())
        return next((name for name in entries if not any(name in those for those in spared)), None)

    def tenants(self) -> list[bytes]:
        return list(self._entries)
