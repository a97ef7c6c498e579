"""The best lane that both sides have is used, and nobody falls to a slower one unnoticed."""

import time
from collections.abc import Iterator

import pytest

from baton.errors import TransferError
from kvtransfer.lanes import choosing
from kvtransfer.lanes.base import LaneClient, LaneEndpoint, OtherHostError
from kvtransfer.lanes.choosing import Choice, open_best
from kvtransfer.lanes.registry import LANES, Lane, parse_lanes
from kvtransfer.memory import PoolMemory
from tests.kvtransfer.world import new_memory


class SlowClient(LaneClient):
    """A network that works and crawls."""

    name = "crawl"

    def __init__(self, inner: LaneClient) -> None:
        self._inner = inner

    def pull(self, reads, deadline, cancelled=None) -> None:
        time.sleep(0.0003 * len(reads))
        self._inner.pull(reads, deadline, cancelled)

    def close(self) -> None:
        self._inner.close()


def crawl(endpoint: LaneEndpoint, local: PoolMemory, deadline: float) -> LaneClient:
    return SlowClient(LANES["tcp"].connect(endpoint, local, deadline))


def failing(error: TransferError):
    def connect(*arguments):
        raise error

    return connect


class Peer:
    """Serves one pool by lanes fake and tcp; `crawl` is tcp under a second name."""

    def __init__(self) -> None:
        self.source, self.local = new_memory(seed=1), new_memory()
        self.servers = [LANES[name].serve("127.0.0.1") for name in ("fake", "tcp")]
        self.endpoints = {server.name: server.start(self.source) for server in self.servers}
        self.endpoints["crawl"] = self.endpoints["tcp"]
        self.choices: list[Choice] = []

    def choose(self, *lanes: Lane) -> Choice:
        self.choices.append(open_best(lanes, self.endpoints, self.local, 2.0))
        assert not self.local.blocks.any(), "measuring must not touch the pool"
        return self.choices[-1]


@pytest.fixture
def peer() -> Iterator[Peer]:
    world = Peer()
    yield world
    for choice in world.choices:
        choice.client.close()
    for server in world.servers:
        server.close()


TCP, FAKE = LANES["tcp"], LANES["fake"]
CRAWL = Lane("crawl", TCP.serve, crawl)


def test_a_lane_of_one_host_wins_wherever_it_stands_and_nothing_is_measured(peer, monkeypatch):
    monkeypatch.setattr(choosing, "_speed", None)
    choice = peer.choose(TCP, CRAWL, FAKE)
    assert (choice.client.name, choice.speed, choice.is_fallback) == ("fake", None, False)


def test_a_single_network_is_not_measured(peer, monkeypatch):
    monkeypatch.setattr(choosing, "_speed", None)
    assert peer.choose(TCP).client.name == "tcp"


def test_of_two_networks_the_one_that_crawls_is_left_although_it_comes_first(peer):
    choice = peer.choose(CRAWL, TCP)
    assert choice.client.name == "tcp"
    assert choice.speed > 0
    assert "GB/s" in choice.passed_over["crawl"]
    assert str(choice).startswith("lane tcp at ")


def test_a_network_that_connects_and_moves_nothing_costs_its_bound_and_is_left(peer):
    stalled = parse_lanes("faulty:tcp?stall=1-")[0]
    start = time.monotonic()
    choice = peer.choose(stalled, CRAWL)
    assert choice.client.name == "crawl"
    assert choice.passed_over == {"tcp": "it did not move its first MiBs"}
    assert time.monotonic() - start < 2 * choosing.PROBE_S + 1


@pytest.mark.parametrize(
    ("speeds", "order"),
    [
        ({"a": 1.0, "b": 1.1, "c": 1.0}, "abc"),
        ({"a": 1.0, "b": 2.0, "c": 1.9}, "bca"),
        ({"a": 0.0, "b": 0.0, "c": 1.0}, "cab"),
        ({"a": 3.0, "b": 0.0, "c": 1.0}, "acb"),
    ],
)
def test_the_earlier_lane_wins_where_no_other_is_clearly_faster(speeds, order):
    lanes = [Lane(name, TCP.serve, TCP.connect) for name in "abc"]
    assert "".join(lane.name for lane in choosing._by_speed(lanes, speeds)) == order


@pytest.mark.parametrize(
    ("error", "is_fallback"), [(OtherHostError("elsewhere"), False), (TransferError("nobody there"), True)]
)
def test_falling_to_a_slower_lane_is_told_unless_the_peer_is_on_another_host(peer, error, is_fallback):
    choice = peer.choose(Lane("fake", FAKE.serve, failing(error), one_host=True), TCP)
    assert (choice.client.name, choice.is_fallback) == ("tcp", is_fallback)
    assert choice.passed_over == {"fake": str(error)}
    assert str(choice) == f"lane tcp (not fake: {error})"


def test_a_lane_that_the_peer_does_not_serve_is_no_fallback(peer):
    choice = peer.choose(LANES["shm"], TCP)
    assert (choice.is_fallback, choice.passed_over) == (False, {"shm": "the peer does not serve it"})


def test_no_lane_at_all_says_what_was_wrong_with_each(peer):
    with pytest.raises(TransferError, match=r"shm: the peer does not serve it; tcp: the cable"):
        peer.choose(LANES["shm"], Lane("tcp", TCP.serve, failing(TransferError("the cable"))))
