"""Who may still read which offered blocks: the life of every lease, without any I/O or clock of its own.

                     close            release(verified)
    open() --> OPEN -------> CLOSED ------------------------> ended: RELEASED
                 |              |
                 +--- abort ----+--> ended: RELEASED at once when no peer has seen an offer
                 |              |    else ABORTED: as CLOSED, but no renewal prolongs it
                 +--- expiry ---+--> QUARANTINED -- release, loss of the peer, or time --> ended: RESOLVED

A release or the loss of the peer ends OPEN, CLOSED and ABORTED with RELEASED. Ended ids are remembered for a while
(tombstones), so that whatever comes late or twice for them changes nothing. A peer may release an id before it is
opened, because its request was aborted first: opening it then ends it at once.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from kvtransfer.wire import PeerIdentity

T = TypeVar("T")


class LeaseState(Enum):
    OPEN = "open"
    CLOSED = "closed"
    ABORTED = "aborted"
    QUARANTINED = "quarantined"


class LeaseEvent(Enum):
    RELEASED = "released"
    QUARANTINED = "quarantined"
    RESOLVED = "resolved"


@dataclass(frozen=True, slots=True)
class LeaseChange:
    """What the owner of the blocks must learn. Each lease yields RELEASED, or QUARANTINED and later RESOLVED."""

    handover_id: str
    event: LeaseEvent
    verified: bool = False


@dataclass(slots=True)
class Lease:
    peer: PeerIdentity
    expires_at: float
    state: LeaseState = LeaseState.OPEN
    num_offered: int = 0
    exposed: bool = False
    """Whether the peer has asked for the blocks, so that it may be reading them."""


class LeaseBook:
    """All leases of one pool. Times are seconds of one monotonic clock, passed in."""

    def __init__(self, lease_s: float, quarantine_s: float, max_tombstones: int = 8192) -> None:
        """`quarantine_s`: longest that a peer can go on reading after its lease ended."""
        self._lease_s = lease_s
        self._quarantine_s = quarantine_s
        self._max_tombstones = max_tombstones
        self._leases: dict[str, Lease] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._released_early: OrderedDict[str, PeerIdentity] = OrderedDict()

    def __len__(self) -> int:
        return len(self._leases)

    def get(self, handover_id: str) -> Lease | None:
        return self._leases.get(handover_id)

    def has_ended(self, handover_id: str) -> bool:
        return handover_id in self._ended

    def open(self, handover_id: str, peer: PeerIdentity, now: float) -> LeaseChange | None:
        """Grant a lease to one peer. Raises ValueError for an id that is in use or was used before."""
        if handover_id in self._leases or handover_id in self._ended:
            raise ValueError(f"hand-over {handover_id} was opened before")
        self._leases[handover_id] = Lease(peer, now + self._lease_s)
        if self._released_early.pop(handover_id, None) == peer:
            return self._end(handover_id)
        return None

    def want(self, handover_id: str, peer: PeerIdentity) -> bool:
        """The peer asks for the blocks; False when it may not have them, or not any more."""
        lease = self._leases.get(handover_id)
        if lease is None or lease.peer != peer or lease.state not in (LeaseState.OPEN, LeaseState.CLOSED):
            return False
        lease.exposed = True
        return True

    def offer(self, handover_id: str, first_block: int, num_blocks: int) -> bool:
        """More blocks are final; False when nobody wants them any more. Raises ValueError unless they follow on.

        Blocks that are offered in part are none yet.
        """
        lease = self._leases.get(handover_id)
        if lease is None or lease.state is not LeaseState.OPEN:
            return False
        if first_block != lease.num_offered:
            raise ValueError(f"hand-over {handover_id}: block {first_block} offered where {lease.num_offered} was due")
        lease.num_offered += num_blocks
        return True

    def close(self, handover_id: str, num_blocks: int) -> bool:
        """Everything has been offered; False when nobody wants it any more. Raises ValueError on a wrong count."""
        lease = self._leases.get(handover_id)
        if lease is None or lease.state is not LeaseState.OPEN:
            return False
        if num_blocks != lease.num_offered:
            raise ValueError(f"hand-over {handover_id}: closed at {num_blocks} blocks, {lease.num_offered} offered")
        lease.state = LeaseState.CLOSED
        return True

    def abort(self, handover_id: str) -> LeaseChange | None:
        """The owner gives up. Blocks that the peer may be reading stay leased until it answers or the lease ends."""
        lease = self._leases.get(handover_id)
        if lease is None or lease.state is LeaseState.QUARANTINED:
            return None
        if not lease.exposed:
            return self._end(handover_id)
        lease.state = LeaseState.ABORTED
        return None

    def renew(self, handover_ids: Iterable[str], peer: PeerIdentity, now: float) -> None:
        for handover_id in handover_ids:
            lease = self._leases.get(handover_id)
            if lease and lease.peer == peer and lease.state in (LeaseState.OPEN, LeaseState.CLOSED):
                lease.expires_at = now + self._lease_s

    def release(self, handover_id: str, peer: PeerIdentity, verified: bool) -> LeaseChange | None:
        """The peer is done. None when this changes nothing: a repeat, a stranger, or an id not opened yet."""
        lease = self._leases.get(handover_id)
        if lease is None:
            if handover_id not in self._ended:
                _remember(self._released_early, handover_id, peer, self._max_tombstones)
            return None
        if lease.peer != peer:
            return None
        return self._end(handover_id, verified and lease.state is LeaseState.CLOSED)

    def lose(self, handover_ids: Iterable[str]) -> list[LeaseChange]:
        """The peer of these leases can read no more: it is dead, or was cut off."""
        return [self._end(handover_id) for handover_id in handover_ids if handover_id in self._leases]

    def of_peer(self, peer: PeerIdentity) -> list[str]:
        return [handover_id for handover_id, lease in self._leases.items() if lease.peer == peer]

    def tick(self, now: float) -> list[LeaseChange]:
        """Let time do its work: leases expire into quarantine, quarantines end."""
        changes = []
        for handover_id, lease in list(self._leases.items()):
            if now < lease.expires_at:
                continue
            if lease.state is LeaseState.QUARANTINED:
                changes.append(self._end(handover_id))
            else:
                lease.state = LeaseState.QUARANTINED
                lease.expires_at = now + self._quarantine_s
                changes.append(LeaseChange(handover_id, LeaseEvent.QUARANTINED))
        return changes

    def _end(self, handover_id: str, verified: bool = False) -> LeaseChange:
        lease = self._leases.pop(handover_id)
        _remember(self._ended, handover_id, None, self._max_tombstones)
        if lease.state is LeaseState.QUARANTINED:
            return LeaseChange(handover_id, LeaseEvent.RESOLVED)
        return LeaseChange(handover_id, LeaseEvent.RELEASED, verified)


def _remember(memory: OrderedDict[str, T], key: str, value: T, limit: int) -> None:
    memory[key] = value
    while len(memory) > limit:
        memory.popitem(last=False)
