"""Prefixes that a tier keeps whatever else has to go. Bookkeeping only: no bytes, no lock, no clock of its own."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

PINNED_SHARE: Final = 0.25
"""What pins may keep of a tier, all together. Beyond, a tier would soon have no room left for what comes and goes."""


class _Pin(NamedTuple):
    names: tuple[bytes, ...]
    until: float


class PrefixPins:
    """Names, in the tier already or still to come, by the key of their pin. A name may have several pins."""

    def __init__(self, max_names: int) -> None:
        self.max_names = max_names
        self._pins: dict[str, _Pin] = {}
        self._counts: Counter[bytes] = Counter()

    def __contains__(self, name: object) -> bool:
        return name in self._counts

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    @property
    def keys(self) -> list[str]:
        return list(self._pins)

    def pin(self, key: str, names: Sequence[bytes], until: float) -> list[bytes] | None:
        """Keep names until that time; a pin of the same key is replaced. Returns names that no pin keeps any more.

        None, and nothing changes, when all pins together would keep more than `max_names`.
        """
        wanted = set(names)
        own = set(self._pins[key].names) if key in self._pins else set()
        num_others = sum(count > (name in own) and name not in wanted for name, count in self._counts.items())
        if num_others + len(wanted) > self.max_names:
            return None
        released = self.unpin(key)
        self._pins[key] = _Pin(tuple(dict.fromkeys(names)), until)
        self._counts.update(wanted)
        return [name for name in released if name not in wanted]

    def unpin(self, key: str) -> list[bytes]:
        """Drop a pin, if it is there. Returns names that no pin keeps any more, in the order of their chain."""
        pin = self._pins.pop(key, None)
        released = []
        for name in pin.names if pin else ():
            self._counts[name] -= 1
            if not self._counts[name]:
                del self._counts[name]
                released.append(name)
        return released

    def expire(self, now: float) -> list[bytes]:
        """Drop the pins whose time is over. Returns names that no pin keeps any more."""
        due = [key for key, pin in self._pins.items() if pin.until <= now]
        return [name for key in due for name in self.unpin(key)]
