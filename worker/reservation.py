"""Which coordinator has this worker to itself, to find out whether a request of its kills workers. Bookkeeping, no I/O.

1. It reserves the worker, under a token of its own. Others, who see the token in the heartbeat, send nothing new, and
   move what they have here elsewhere; what they send all the same is refused.
2. Once nothing is here but the holder's, the worker is *cleared*, and stays so: whatever it dies of is the holder's.
3. The holder gives it back, or its link breaks. Others may say that they want the worker, and the holder hears it.
"""

from collections.abc import Iterable

from worker.roles import Attempt, Link


class Reservation:
    def __init__(self) -> None:
        self.token = 0
        """Of the coordinator that has the worker to itself; 0: none has."""
        self.cleared = False
        self.wanted = False
        self._holder: Link | None = None

    def reserve(self, link: Link, token: int) -> None:
        """Ignored while somebody has it."""
        if not self.token:
            self.token, self._holder = token, link

    def unreserve(self, link: Link, token: int) -> None:
        """The holder gives it back; or another one wants it."""
        if token != self.token:
            return
        if link is self._holder:
            self._end()
        else:
            self.wanted = True

    def lost(self, link: Link) -> None:
        if link is self._holder:
            self._end()

    def admits(self, link: Link) -> bool:
        return self._holder is None or link is self._holder

    def may_clear(self, attempts: Iterable[Attempt]) -> bool:
        """Nothing but the holder's is left. The engine may still be at a step of what was aborted."""
        waits = self._holder is not None and not self.cleared
        return waits and all(each.link is self._holder and not each.orphaned for each in attempts)

    def clear(self, token: int) -> None:
        """Since the holder of `token` had nothing of others here, the engine began no step of theirs."""
        self.cleared = self.token == token != 0

    def _end(self) -> None:
        self.token, self.cleared, self.wanted, self._holder = 0, False, False, None
