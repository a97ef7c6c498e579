"""Groups of ranks in one event loop: what ends a hand-over of several, and what their owners are told."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from kvtransfer import staging
from kvtransfer.intake import CANCELLED, Intake, IntakeResult
from kvtransfer.lanes.registry import parse_lanes
from kvtransfer.layout import BlockLayout
from kvtransfer.memory import PoolMemory
from kvtransfer.offers import OfferServer
from kvtransfer.ranks import RankIntake, RankOffers, pair_id
from kvtransfer.wire import PeerIdentity, PeerRef
from tests.kvtransfer.world import OPTIONS, Owner, new_memory, settles_unwritten

HEADS, PAGE = 4, 16


@pytest.fixture(autouse=True)
def little_staging_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every worker here takes its own."""
    monkeypatch.setattr(staging, "STAGING_BYTES", 1 << 20)


def group(degree: int, page: int = PAGE) -> list[BlockLayout]:
    layout = BlockLayout("tiny", "float32", 2, HEADS // degree, 8, page, 0, degree)
    return [replace(layout, tp_rank=rank) for rank in range(degree)]


@dataclass
class Giver:
    layout: BlockLayout
    memory: PoolMemory
    owner: Owner
    ranks: RankOffers
    server: OfferServer
    counters: dict[str, float] = field(default_factory=dict)

    def offer(self, first: int, end: int, num_layers: int | None = None) -> None:
        row = list(range(first, end))
        self.ranks.offer("h", first, row, self.memory.generations[row].tolist(), num_layers)


@dataclass
class Taker:
    layout: BlockLayout
    memory: PoolMemory
    intake: Intake
    ranks: RankIntake
    counters: dict[str, float]


@dataclass
class Groups:
    givers: list[Giver]
    takers: list[Taker]
    refs: list[PeerRef]
    readers: list[PeerRef]

    def open(self, handover_id: str = "h") -> None:
        for giver in self.givers:
            giver.ranks.open(handover_id, self.readers)

    def take(self, taker: int = 0, num_blocks: int = 8, first: int = 0, timeout_s: float = 10.0):
        deadline = time.monotonic() + timeout_s
        ranks = self.takers[taker].ranks
        return asyncio.create_task(ranks.take("h", self.refs, list(range(num_blocks)), first, deadline))

    async def arrived(self, num_blocks: int, taker: int = 0) -> None:
        async with asyncio.timeout(5):
            while self.takers[taker].counters.get("handover_blocks_received", 0) < num_blocks:
                await asyncio.sleep(0.002)

    def right(self, num_blocks: int, first: int = 0) -> bool:
        """Of taker 0, whose layout has the page size of the givers and all their heads in turn."""
        ours = _heads(self.takers[0])[first:num_blocks]
        theirs = np.concatenate([_heads(giver) for giver in self.givers], axis=2)[first:num_blocks]
        return bool((ours == theirs).all())


def _heads(worker: Giver | Taker) -> np.ndarray:
    return worker.memory.blocks.view(np.uint32).reshape(-1, *worker.layout.shape)


@contextlib.asynccontextmanager
async def groups(there: int, here: int, lanes: str = "fake", **options: float) -> AsyncIterator[Groups]:
    settings = replace(OPTIONS, **options)
    readers = [PeerRef(f"decode-{rank}", 22, "") for rank in range(here)]
    world = Groups([], [], [], readers)
    async with contextlib.AsyncExitStack() as stack:
        for layout in group(there):
            memory, owner, counters = new_memory(layout.tp_rank + 1, 16, layout.block_bytes), Owner(), {}
            ranks = RankOffers(layout, owner.on_released, owner.on_quarantined, owner.on_resolved)
            server = OfferServer(
                PeerIdentity(f"prefill-{layout.tp_rank}", 11), layout, memory,
                [lane.serve("127.0.0.1") for lane in parse_lanes("fake")], settings, counters,
                ranks.on_part_released, ranks.on_part_quarantined, ranks.on_part_resolved,
            )  # fmt: skip
            ranks.serve_offers(server)
            world.refs.append(PeerRef(f"prefill-{layout.tp_rank}", 11, await server.start("127.0.0.1")))
            stack.push_async_callback(server.stop)
            world.givers.append(Giver(layout, memory, owner, ranks, server, counters))
        for layout in group(here):
            memory, counters = new_memory(None, 16, layout.block_bytes), {}
            me = PeerIdentity(f"decode-{layout.tp_rank}", 22)
            intake = Intake(me, layout, memory, parse_lanes(lanes), settings, counters)
            stack.push_async_callback(intake.stop)
            world.takers.append(Taker(layout, memory, intake, RankIntake(intake, layout, counters), counters))
        yield world


def run(scenario: Callable[[Groups], Awaitable[None]], there: int = 2, here: int = 1, **options: object) -> None:
    async def main() -> None:
        async with groups(there, here, **options) as world:
            await scenario(world)

    asyncio.run(main())


def test_a_row_is_whole_once_every_rank_has_given_its_heads():
    async def scenario(world: Groups) -> None:
        task = world.take()
        world.open()
        for giver in world.givers:
            giver.offer(0, 8, num_layers=1)
            giver.offer(0, 8)
        await world.arrived(16)
        world.givers[0].ranks.close("h", 8, 128, 7, 3)
        await world.givers[0].owner.has_seen("h", "released", "verified")
        assert not task.done(), "the other rank has not closed"
        world.givers[1].ranks.close("h", 8, 128, 7, 3)
        assert await task == IntakeResult(8, 128, 7, 3)
        assert world.right(8)
        await world.givers[1].owner.has_seen("h", "released", "verified")

    run(scenario)


def test_what_is_here_already_is_not_written():
    async def scenario(world: Groups) -> None:
        task = world.take(first=3)
        world.open()
        for giver in world.givers:
            giver.offer(0, 8)
            giver.ranks.close("h", 8, 128, 7, 0)
        assert (await task).num_blocks == 8
        assert not world.takers[0].memory.blocks[:3].any()
        assert world.right(8, first=3)

    run(scenario)


@pytest.mark.parametrize(
    "how", ["gives up", "other tokens", "other first token", "cancel", "deadline", "stop", "stale"]
)
def test_whatever_ends_one_rank_ends_all_with_what_was_whole(how):
    async def scenario(world: Groups) -> None:
        task = world.take(timeout_s=0.6 if how == "deadline" else 10)
        world.open()
        world.givers[0].offer(0, 8)
        world.givers[1].offer(0, 3)
        await world.arrived(11)
        says, whole = how, 3
        match how:
            case "gives up":
                world.givers[1].ranks.fail("h", "out of luck")
                says = "rank 1 of 2: the peer gave up: out of luck"
            case "other tokens" | "other first token":
                world.givers[1].offer(3, 8)
                world.givers[0].ranks.close("h", 8, 128, 7, 0)
                changes = {"num_tokens": 127} if how == "other tokens" else {"first_token_id": 8}
                world.givers[1].ranks.close(
                    "h", **{"num_blocks": 8, "num_tokens": 128, "first_token_id": 7, "first_token_index": 0, **changes}
                )
                says, whole = "the ranks closed it with other numbers of tokens, or other first tokens", 0
            case "cancel":
                world.takers[0].ranks.cancel("h")
                says = CANCELLED
            case "deadline":
                says = "the hand-over did not end before its deadline"
            case "stop":
                await world.takers[0].intake.stop()
                says = "the worker stops"
            case "stale":
                world.givers[1].memory.generations[3] += 1
                row = [3, 4]
                world.givers[1].ranks.offer("h", 3, row, [0, 0])
                says = "rank 1 of 2: "
        result = await task
        assert says in (result.failure or "")
        assert (result.num_blocks, result.num_tokens) == (whole, None)
        assert world.right(whole)
        assert await settles_unwritten(world.takers[0].memory)
        assert world.takers[0].ranks._rows == {}
        assert world.takers[0].counters.get("handover_failures", 0) == (
            {"cancel": 0, "deadline": 2, "stop": 2}.get(how, 1)
        )
        for giver in world.givers:
            if how != "stop":
                await giver.owner.has_seen("h", "released", "verified" if how.startswith("other") else "unverified")

    run(scenario)


@pytest.mark.parametrize(("first", "whole"), [(0, 4), (5, 5)])
def test_a_last_block_that_one_rank_has_closed_is_no_whole_one_for_a_rank_that_fails_behind_it(first, whole):
    async def scenario(world: Groups) -> None:
        task = world.take(first=first)
        world.open()
        world.givers[0].offer(0, 5)
        world.givers[0].ranks.close("h", 5, 70, 7, 0)  # of 80 that the blocks have room for
        world.givers[1].offer(0, 8)
        await world.arrived(max(0, 5 - first) + 8 - first)
        world.givers[1].ranks.fail("h", "out of luck")
        assert (await task).num_blocks == whole
        assert world.right(whole, first)

    run(scenario)


def test_cancelling_the_task_waits_until_nothing_writes():
    async def scenario(world: Groups) -> None:
        task = world.take()
        world.open()
        for giver in world.givers:
            giver.offer(0, 4)
        await world.arrived(8)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert world.takers[0].intake._takings == {}
        assert world.takers[0].ranks._rows == {}
        for giver in world.givers:
            await giver.owner.has_seen("h", "released", "unverified")

    run(scenario)


def test_cancelled_before_any_part_began_it_takes_nothing():
    async def scenario(world: Groups) -> None:
        world.takers[0].ranks.expect("h", world.refs)
        task = world.take()
        asyncio.get_running_loop().call_soon(world.takers[0].ranks.cancel, "h")
        async with asyncio.timeout(5):  # the hand-over has 10 s
            assert (await task).failure == CANCELLED
        assert world.takers[0].intake._expected == {}

    run(scenario)


def test_what_is_expected_keeps_its_leases_and_cancel_lets_them_go():
    async def scenario(world: Groups) -> None:
        world.takers[0].ranks.expect("h", world.refs)
        world.open()
        await asyncio.sleep(0.9)
        assert [giver.owner.events for giver in world.givers] == [[], []], "three leases long"
        world.takers[0].ranks.cancel("h")
        for giver in world.givers:
            await giver.owner.has_seen("h", "released", "unverified")

    run(scenario, lease_s=0.3)


def test_heads_that_cannot_be_split_fail_before_anybody_is_asked():
    async def scenario(world: Groups) -> None:
        world.refs.append(world.refs[0])
        result = await world.take()
        assert result.failure == "4 KV heads cannot be split over 3 ranks"
        assert world.takers[0].counters == {"handover_failures": 1}

    run(scenario)


def test_peers_in_the_wrong_order_are_not_believed():
    async def scenario(world: Groups) -> None:
        world.refs.reverse()
        world.open()
        result = await world.take()
        assert "tp_rank does not fit" in (result.failure or "")
        assert not world.takers[0].memory.blocks.any()

    run(scenario)


# -- one rank that gives, several that take ----------------------------------------------------------------------------


def test_blocks_come_back_once_when_the_last_rank_is_done():
    async def scenario(world: Groups) -> None:
        (giver,) = world.givers
        tasks = [world.take(rank) for rank in range(4)]
        world.open()
        giver.offer(0, 8)
        for rank in range(4):
            await world.arrived(8, rank)
        world.takers[2].ranks.cancel("h")
        await tasks[2]
        giver.ranks.close("h", 8, 128, 7, 0)
        assert [(await tasks[rank]).failure for rank in (0, 1, 3)] == [None] * 3
        await giver.owner.has_seen("h", "released", "unverified")
        assert giver.owner.events == [("h", "released", "unverified")]
        for rank, taker in enumerate(world.takers):
            assert (_heads(taker)[:8] == _heads(giver)[:8, :, rank : rank + 1]).all()
        giver.offer(8, 9)
        giver.ranks.close("h", 9, 1, 1, 1)  # late: nobody is there any more
        assert (giver.ranks._rows, giver.ranks._row_of) == ({}, {})

    run(scenario, there=1, here=4)


def test_blocks_are_quarantined_with_the_first_lease_and_resolved_with_the_last():
    async def scenario(world: Groups) -> None:
        (giver,) = world.givers
        world.open()
        giver.offer(0, 4)
        task = world.take(0)  # rank 1 never asks: its lease ends by time
        await giver.owner.has_seen("h", "quarantined")
        await asyncio.sleep(0.4)
        assert giver.owner.events == [("h", "quarantined")], "rank 0 still reads"
        giver.ranks.close("h", 4, 64, 7, 0)
        assert (await task).failure is None
        await giver.owner.has_seen("h", "resolved")
        assert giver.owner.events == [("h", "quarantined"), ("h", "resolved")]

    run(scenario, there=1, here=2, lease_s=0.3)


def test_leases_that_expire_together_are_told_once():
    async def scenario(world: Groups) -> None:
        (giver,) = world.givers
        world.open()
        giver.offer(0, 4)
        await giver.owner.has_seen("h", "resolved")
        assert giver.owner.events == [("h", "quarantined"), ("h", "resolved")]

    run(scenario, there=1, here=4, lease_s=0.1)


def test_a_hand_over_is_opened_once_and_failing_it_ends_it_for_all():
    async def scenario(world: Groups) -> None:
        (giver,) = world.givers
        world.open()
        with pytest.raises(ValueError, match="opened before"):
            world.open()
        giver.ranks.fail("h", "aborted")
        assert giver.owner.events == [("h", "released", "unverified")], "nobody had asked"
        with pytest.raises(ValueError, match="opened before"):
            world.open()
        assert (giver.ranks._rows, giver.ranks._row_of) == ({}, {})
        giver.ranks.fail("h", "again")
        assert len(giver.owner.events) == 1

    run(scenario, there=1, here=2)


def test_a_rank_opens_nothing_for_ranks_that_take_nothing_from_it():
    async def scenario(world: Groups) -> None:
        world.open()
        assert [sorted(giver.ranks._row_of) for giver in world.givers] == [
            [pair_id("h", 0, 0)], [pair_id("h", 1, 0)], [pair_id("h", 2, 1)], [pair_id("h", 3, 1)]
        ]  # fmt: skip

    run(scenario, there=4, here=2)
