"""What two workers tell each other first, and the reasons to refuse.

The version of the protocol is raised only when a message comes to mean something else. What is added is a field whose
absence means what it meant before: a Hello without `converts` comes from a worker that can only copy blocks as they
are, and a reply without a layout from one that accepts no layout but its own.
"""

from collections.abc import Sequence

from baton.errors import PeerError
from baton.v1 import handover_pb2 as pb
from kvtransfer.conversion import plan
from kvtransfer.layout import BlockLayout, difference
from kvtransfer.wire import PROTOCOL_VERSION, PeerIdentity, PeerRef


def hello(me: PeerIdentity, peer: PeerRef, layout: BlockLayout, lanes: Sequence[str]) -> pb.HandoverMessage:
    """The first message of a connection, from the side that pulls."""
    return pb.HandoverMessage(
        hello=pb.Hello(
            protocol_version=PROTOCOL_VERSION,
            worker_id=me.worker_id,
            incarnation=me.incarnation,
            expected_peer_incarnation=peer.incarnation,
            layout=layout.to_proto(),
            lanes=lanes,
            converts=True,
        )
    )


def refusal(hello: pb.Hello, me: PeerIdentity, layout: BlockLayout, endpoints: Sequence[pb.LaneEndpoint]) -> str | None:
    """Why the side that offers refuses; None when it accepts."""
    if hello.protocol_version != PROTOCOL_VERSION:
        return f"protocol version {hello.protocol_version} is not {PROTOCOL_VERSION}, or no Hello came first"
    if hello.expected_peer_incarnation != me.incarnation:
        return f"worker {me.worker_id} has another incarnation than the one expected: it was restarted"
    if not {endpoint.lane for endpoint in endpoints} & set(hello.lanes):
        return f"no common lane: {', '.join(endpoint.lane for endpoint in endpoints)} here"
    theirs = BlockLayout.from_proto(hello.layout)
    if not hello.converts:
        return difference(theirs, layout)
    try:
        plan(theirs, layout, other_dtypes=True)  # whether it wants another dtype is for the puller to say
    except PeerError as error:
        return str(error)
    return None


def offered_layout(reply: pb.HelloReply, here: BlockLayout) -> BlockLayout:
    return BlockLayout.from_proto(reply.layout) if reply.HasField("layout") else here


def check_reply(reply: pb.HelloReply, peer: PeerRef) -> None:
    """Raise PeerError when the pulling side cannot go on with this answer."""
    if not reply.accepted:
        raise PeerError(f"the peer refused: {reply.reason}")
    if reply.incarnation != peer.incarnation:
        raise PeerError("the peer has another incarnation than the one expected")
    if not 0 < 2 * reply.heartbeat_interval_s <= reply.heartbeat_timeout_s:
        raise PeerError("the peer states impossible heartbeat times")
