"""Names of lanes to what serves and opens them: the one place that knows which lanes exist."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from baton.errors import ConfigurationError
from baton.tls import Tls
from kvtransfer.lanes import nixl, ucx
from kvtransfer.lanes.base import LaneClient, LaneEndpoint, LaneServer
from kvtransfer.lanes.cma import CmaLaneClient, CmaLaneServer
from kvtransfer.lanes.cuda_ipc import CudaIpcLaneClient, CudaIpcLaneServer
from kvtransfer.lanes.fake import FakeLaneClient, FakeLaneServer
from kvtransfer.lanes.faulty import FaultPlan, FaultyLaneClient
from kvtransfer.lanes.shm import ShmLaneClient, ShmLaneServer
from kvtransfer.lanes.tcp import TcpLaneClient, TcpLaneServer
from kvtransfer.memory import PoolMemory

Connect = Callable[[LaneEndpoint, PoolMemory, float], LaneClient]


@dataclass(frozen=True, slots=True)
class Lane:
    """One kind of lane: `serve(host)` makes the offering side, `connect(endpoint, local, deadline)` the pulling one.

    `connect` really reaches the peer, or raises TransferError. `one_host`: it moves bytes between processes of one
    host, at the speed of memory and without a network. `faults` is set for a lane that is faulty on purpose.
    """

    name: str
    serve: Callable[[str], LaneServer]
    connect: Connect
    one_host: bool = False
    faults: FaultPlan | None = None


LANES: dict[str, Lane] = {
    lane.name: lane
    for lane in (
        Lane("shm", lambda host: ShmLaneServer(), ShmLaneClient.connect, one_host=True),
        Lane("cuda_ipc", lambda host: CudaIpcLaneServer(), CudaIpcLaneClient.connect, one_host=True),
        Lane("cma", lambda host: CmaLaneServer(), CmaLaneClient.connect, one_host=True),
        Lane("tcp", TcpLaneServer, TcpLaneClient.connect),
        Lane("ucx", ucx.UcxLaneServer, ucx.connect),
        Lane("nixl", nixl.NixlLaneServer, nixl.connect),
        Lane("fake", lambda host: FakeLaneServer(), FakeLaneClient.connect, one_host=True),
    )
}


def parse_lanes(text: str, tls: Tls | None = None) -> list[Lane]:
    """The lanes of `--lanes`, best first, such as 'shm,tcp' or, for fault tests, 'faulty:shm?corrupt=3,tcp'.

    With `tls`, lane tcp speaks nothing else. Raises ConfigurationError for an unknown or repeated lane, none at all,
    or one that would carry blocks over a network in the clear beside `tls`.
    """
    lanes = [_parse_lane(word.strip(), tls) for word in text.split(",") if word.strip()]
    names = [lane.name for lane in lanes]
    if not lanes:
        raise ConfigurationError(f"--lanes is empty; name at least one of {', '.join(LANES)}")
    if len(set(names)) < len(names):
        raise ConfigurationError(f"--lanes is '{text}'; name each lane once")
    return lanes


def _parse_lane(word: str, tls: Tls | None) -> Lane:
    prefix, colon, rest = word.partition(":")
    if colon and prefix == "faulty":
        name, _, query = rest.partition("?")
        return _faulty(_known(name, tls), FaultPlan.parse(query))
    return _known(word, tls)


def _known(name: str, tls: Tls | None) -> Lane:
    if name not in LANES:
        raise ConfigurationError(f"--lanes names '{name}'; choose from {', '.join(LANES)}")
    lane = LANES[name]
    if tls is None or lane.one_host:
        return lane
    if name != "tcp":
        raise ConfigurationError(f"lane {name} cannot be encrypted; leave it out of --lanes, or TLS out")
    return replace(lane, serve=partial(TcpLaneServer, tls=tls), connect=partial(TcpLaneClient.connect, tls=tls))


def _faulty(lane: Lane, plan: FaultPlan) -> Lane:
    """The same lane, faulty on the pulling side only; on the wire it keeps its name."""

    def connect(endpoint: LaneEndpoint, local: PoolMemory, deadline: float) -> LaneClient:
        return FaultyLaneClient(lane.connect(endpoint, local, deadline), local, plan)

    return replace(lane, connect=connect, faults=plan)
