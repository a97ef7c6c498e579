"""What the offering side keeps about its peers and its hand-overs. Plain data: nothing here sends or waits."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from baton.v1 import handover_pb2 as pb
from kvtransfer.wire import MAX_OFFER_BLOCKS, Numbering, PeerIdentity


@dataclass(slots=True, eq=False)
class Connection:
    """One peer that said Hello. `routing_id` is ZeroMQ's name for its socket."""

    routing_id: bytes
    peer: PeerIdentity
    numbering: Numbering
    last_heard: float


@dataclass(slots=True)
class Outgoing:
    """What has been offered for one hand-over, and how much of it the peer was told."""

    ready: list[pb.OfferedBlock] = field(default_factory=list)
    closed: pb.OfferClosed | None = None
    connection: Connection | None = None
    num_sent: int = 0
    finished: bool = False
    """Nothing more is to be sent: closed, failed or revoked."""

    def news(self, handover_id: str) -> Iterator[pb.HandoverMessage]:
        """The messages that tell the peer what it does not know yet; each counts as told once it is taken."""
        while not self.finished and self.num_sent < len(self.ready):
            blocks = self.ready[self.num_sent : self.num_sent + MAX_OFFER_BLOCKS]
            offer = pb.Offer(handover_id=handover_id, first_block=self.num_sent, blocks=blocks)
            self.num_sent += len(blocks)
            yield pb.HandoverMessage(offer=offer)
        if not self.finished and self.closed is not None and len(self.ready) == self.closed.num_blocks:
            self.finished = True
            yield pb.HandoverMessage(closed=self.closed)


@dataclass(frozen=True, slots=True)
class Parked:
    """A Want that came before its hand-over was opened."""

    connection: Connection
    want: pb.Want
    expires_at: float
