"""What the offering side keeps about its peers and its hand-overs. Plain data: nothing here sends or waits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from baton.v1 import handover_pb2 as pb
from kvtransfer.sealing import Seal
from kvtransfer.wire import MAX_OFFER_BLOCKS, Numbering, PeerIdentity

MIN_GROUP_BYTES = 256 << 10
"""Of one block in one group of layers. Smaller pieces move slower, and each has a checksum and a place in a message."""
MAX_GROUPS = 8


def layer_groups(num_layers: int, block_bytes: int) -> tuple[int, ...]:
    """After how many leading layers, each time, blocks are worth offering while the next layers are computed."""
    count = max(1, min(MAX_GROUPS, num_layers, block_bytes // MIN_GROUP_BYTES))
    return tuple(num_layers * (number + 1) // count for number in range(count))


@dataclass(slots=True, eq=False)
class Connection:
    """One peer that said Hello. `routing_id` is ZeroMQ's name for its socket."""

    routing_id: bytes
    peer: PeerIdentity
    numbering: Numbering
    last_heard: float


@dataclass(frozen=True, slots=True)
class Stranger:
    """A connection in the middle of its TLS handshake, or with nothing said after it."""

    seal: Seal
    expires_at: float


@dataclass(slots=True)
class Outgoing:
    """What has been offered for one hand-over, and how much of it the peer was told."""

    ready: list[pb.Offer] = field(default_factory=list)
    """In order, with checksums."""
    num_ready: int = 0
    """Leading blocks of which all layers are."""
    closed: pb.OfferClosed | None = None
    connection: Connection | None = None
    first_wanted: int = 0
    """The peer has those blocks that come before this one."""
    num_sent: int = 0
    """Of `ready`."""
    finished: bool = False
    """Nothing more is to be sent: closed, failed or revoked."""
    num_begun: int = 0
    """Blocks, behind those offered in full, of which some layers are offered."""
    num_begun_layers: int = 0

    def add(self, handover_id: str, first_block: int, blocks: Sequence[pb.OfferedBlock], num_layers: int) -> None:
        """`num_layers` 0: these blocks are ready in full."""
        for start in range(0, len(blocks), MAX_OFFER_BLOCKS):
            part = blocks[start : start + MAX_OFFER_BLOCKS]
            offer = pb.Offer(
                handover_id=handover_id, first_block=first_block + start, blocks=part, num_layers=num_layers
            )
            self.ready.append(offer)
        if not num_layers:
            self.num_ready = first_block + len(blocks)

    def news(self, handover_id: str) -> Iterator[pb.HandoverMessage]:
        """The messages that tell the peer what it does not know yet; each counts as told once it is taken."""
        while not self.finished and self.num_sent < len(self.ready):
            offer = self.ready[self.num_sent]
            self.num_sent += 1
            known = self.first_wanted - offer.first_block
            if known > 0:
                first, blocks = self.first_wanted, offer.blocks[known:]
                offer = pb.Offer(handover_id=handover_id, first_block=first, blocks=blocks, num_layers=offer.num_layers)
            if offer.blocks:
                yield pb.HandoverMessage(offer=offer)
        if not self.finished and self.closed is not None and self.num_ready == self.closed.num_blocks:
            self.finished = True
            yield pb.HandoverMessage(closed=self.closed)


@dataclass(frozen=True, slots=True)
class Parked:
    """A Want that came before its hand-over was opened."""

    connection: Connection
    want: pb.Want
    expires_at: float
