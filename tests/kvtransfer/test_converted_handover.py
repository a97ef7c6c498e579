"""Hand-overs between workers whose blocks differ: the same promises as between equal ones."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from baton.v1 import handover_pb2 as pb
from kvtransfer import staging
from kvtransfer.conversion import Conversion
from kvtransfer.intake import CANCELLED, Intake
from kvtransfer.lanes.fake import FakeLaneServer
from kvtransfer.lanes.registry import parse_lanes
from kvtransfer.layout import BlockLayout
from tests.kvtransfer.dense import lay_out, read_back
from tests.kvtransfer.world import (
    DECODE,
    DECODE_REF,
    LAYOUT,
    OPTIONS,
    Pair,
    RawOfferer,
    RawPuller,
    pair,
    scattered,
    settles_unwritten,
)

HALF, DOUBLE = replace(LAYOUT, page_size_tokens=8), replace(LAYOUT, page_size_tokens=32)
BFLOAT = replace(LAYOUT, dtype="bfloat16", model_fingerprint="tiny in bfloat16", weights_fingerprint="tiny")
FLOAT = replace(LAYOUT, weights_fingerprint="tiny")
UNWRITTEN = 0x77


def run(scenario: Callable[[Pair], Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        async with pair(**options) as world:
            world.target.blocks[:] = UNWRITTEN
            await scenario(world)

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


def right(
    world: Pair, offered: BlockLayout, here: BlockLayout, remote: Sequence[int], local: Sequence[int], num_blocks: int
) -> bool:
    """Whether the first `num_blocks` of the row hold what the peer's row holds, as far as that goes."""
    num_tokens = min(len(remote) * offered.page_size_tokens, num_blocks * here.page_size_tokens)
    dense = read_back(world.source.blocks[list(remote)], offered, num_tokens).float()
    expected = lay_out(dense, here)
    written = world.target.blocks[list(local)[:num_blocks]]
    return bool((written == expected).all() and len(written) == len(expected))


def offer_all(world: Pair, handover_id: str, remote: Sequence[int], num_tokens: int, first: int = 0, chunk: int = 3):
    world.offers.open(handover_id, DECODE_REF)
    for start in range(0, len(remote), chunk):
        world.offer(handover_id, start, remote[start : start + chunk])
    world.offers.close(handover_id, len(remote), num_tokens, 7, 3)


@pytest.mark.parametrize("lane", ["fake", "shm", "tcp"])
@pytest.mark.parametrize(
    ("offered", "here"), [(LAYOUT, DOUBLE), (LAYOUT, HALF), (DOUBLE, HALF), (HALF, DOUBLE), (BFLOAT, FLOAT)]
)
def test_blocks_are_converted_while_later_ones_are_still_computed(lane, offered, here):
    async def scenario(world: Pair) -> None:
        num_tokens = 300
        remote = scattered(-(-num_tokens // offered.page_size_tokens), 1)
        local = scattered(-(-num_tokens // here.page_size_tokens), 2)
        task = world.take("h", local)
        world.offers.open("h", DECODE_REF)
        for start in range(0, len(remote), 3):
            world.offer("h", start, remote[start : start + 3])
            end = min(start + 3, len(remote))
            await until(lambda end=end: world.intake_counters.get("handover_blocks_converted", 0) == end)
        assert not task.done()
        world.offers.close("h", len(remote), num_tokens, 7, 3)
        result = await task
        assert (result.num_blocks, result.num_tokens, result.first_token_id) == (len(local), num_tokens, 7)
        assert (result.failure, result.same_bits) == (None, offered.dtype == here.dtype)
        assert right(world, offered, here, remote, local, len(local))
        spare = np.setdiff1d(np.arange(64), local)
        assert (world.target.blocks[spare] == UNWRITTEN).all()
        assert world.intake_counters["handover_blocks_received"] == len(remote)
        assert world.intake_counters["handover_bytes_received"] == len(remote) * offered.block_bytes
        assert "handover_failures" not in world.intake_counters
        await world.owner.has_seen("h", "released", "verified")

    run(scenario, lanes=lane, offered=offered, layout=here, other_dtypes=True)


@pytest.mark.parametrize(("offered", "here"), [(LAYOUT, DOUBLE), (DOUBLE, LAYOUT), (DOUBLE, HALF)])
@pytest.mark.parametrize("num_cached", [0, 1, 3, 4])
def test_blocks_that_are_here_already_are_never_written_and_only_what_is_missing_is_pulled(offered, here, num_cached):
    async def scenario(world: Pair) -> None:
        remote = list(range(20, 20 + 128 // offered.page_size_tokens))
        local = list(range(128 // here.page_size_tokens))
        task = world.take("h", local, first_block=num_cached)
        offer_all(world, "h", remote, 128)
        result = await task
        assert (result.num_blocks, result.failure) == (len(local), None)
        assert (world.target.blocks[:num_cached] == UNWRITTEN).all()
        world.target.blocks[:num_cached] = lay_out(read_back(world.source.blocks[remote], offered, 128).float(), here)[
            :num_cached
        ]
        assert right(world, offered, here, remote, local, len(local))
        skipped = num_cached * here.page_size_tokens // offered.page_size_tokens
        assert world.intake_counters.get("handover_blocks_received", 0) == len(remote) - skipped

    run(scenario, offered=offered, layout=here)


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 33, 100])
def test_what_no_block_of_the_peer_covers_is_zero(num_tokens):
    async def scenario(world: Pair) -> None:
        remote = list(range(-(-num_tokens // 16)))
        local = list(range(-(-num_tokens // 32)))
        task = world.take("h", local)
        offer_all(world, "h", remote, num_tokens, chunk=1)
        assert (await task).num_blocks == len(local)
        everything = read_back(world.target.blocks[local], DOUBLE, len(local) * 32)
        assert not everything[:, :, :, len(remote) * 16 :].any()
        assert right(world, LAYOUT, DOUBLE, remote, local, len(local))

    run(scenario, layout=DOUBLE)


@pytest.mark.parametrize("fault", ["corrupt=2-", "drop=2-", "misplace=2-", "raise=2", "stale=2"])
def test_bad_bytes_never_reach_a_block_and_what_was_right_before_counts_in_blocks_of_this_side(fault):
    async def scenario(world: Pair) -> None:
        task = world.take("h", list(range(4)))
        world.offers.open("h", DECODE_REF)
        world.offer("h", 0, [10, 11, 12])
        await until(lambda: world.intake_counters.get("handover_blocks_received", 0) == 3)
        world.offer("h", 3, [13, 14])
        result = await task
        assert result.failure is not None
        assert result.num_blocks == 1, "three of the peer's are one and a half here"
        assert right(world, LAYOUT, DOUBLE, [10, 11, 12], [0, 1], 2)
        assert (world.target.blocks[2:] == UNWRITTEN).all()
        await world.owner.has_seen("h", "released", "unverified")
        world.intake._lanes[0].faults.when.clear()
        again = world.take("g", list(range(4)))  # a link that failed is made anew
        offer_all(world, "g", list(range(30, 37)), 112)
        assert (await again).failure is None
        assert right(world, LAYOUT, DOUBLE, list(range(30, 37)), list(range(4)), 4)

    run(scenario, layout=DOUBLE, pull_lanes=f"faulty:fake?{fault}")


def test_a_block_that_arrives_wrong_once_is_pulled_again():
    async def scenario(world: Pair) -> None:
        task = world.take("h", [5, 6])
        offer_all(world, "h", [1, 2, 3, 4], 64, chunk=4)
        assert (await task).failure is None
        assert world.intake_counters["handover_blocks_retried"] == 1
        assert right(world, LAYOUT, DOUBLE, [1, 2, 3, 4], [5, 6], 2)

    run(scenario, layout=DOUBLE, pull_lanes="faulty:fake?flip=1")


@pytest.mark.parametrize(("here", "num_local", "room"), [(DOUBLE, 2, 4), (HALF, 3, 2), (HALF, 4, 2)])
def test_a_peer_that_offers_more_than_the_row_has_room_for_is_not_believed(here, num_local, room):
    async def scenario(world: Pair) -> None:
        task = world.take("h", list(range(num_local)))
        world.offers.open("h", DECODE_REF)
        world.offer("h", 0, list(range(10, 10 + room)))
        await until(lambda: world.intake_counters.get("handover_blocks_received", 0) == room)
        world.offer("h", room, [40])
        result = await task
        assert result.failure == f"the peer offers more than the {num_local} blocks that are reserved here"
        assert result.num_blocks == num_local
        assert right(world, LAYOUT, here, list(range(10, 10 + room)), list(range(num_local)), num_local)
        assert (world.target.blocks[num_local:] == UNWRITTEN).all()

    run(scenario, layout=here)


class Gate:
    """Holds conversions up: `entered` says that one waits, `open` lets them go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        convert = Conversion.convert

        def gated(*arguments: object) -> None:
            self.entered.set()
            assert self.open.wait(10)
            convert(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Conversion, "convert", gated)


@pytest.mark.parametrize("how", ["cancel", "cancelled task", "deadline", "peer gives up", "stop"])
def test_whatever_ends_a_hand_over_while_it_converts_nothing_is_written_after_take_returns(monkeypatch, how):
    async def scenario(world: Pair) -> None:
        gate = Gate(monkeypatch)
        task = world.take("h", [0, 1], timeout_s=1.5 if how == "deadline" else 10)
        world.offers.open("h", DECODE_REF)
        world.offer("h", 0, [10, 11])
        await until(gate.entered.is_set)
        stopping = None
        match how:
            case "cancel":
                world.intake.cancel("h")
            case "cancelled task":
                task.cancel()
            case "peer gives up":
                world.offers.fail("h", "out of luck")
            case "stop":
                stopping = asyncio.create_task(world.intake.stop())
        await until(lambda: "h" not in world.intake._takings or world.intake._takings["h"].cancelled.is_set())
        await asyncio.sleep(0.05)
        assert not task.done(), "a thread still writes"
        gate.open.set()
        if how == "cancelled task":
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            expected = {"cancel": CANCELLED, "deadline": "deadline", "stop": "the worker stops"}
            assert expected.get(how, "out of luck") in ((await task).failure or "")
        assert await settles_unwritten(world.target)
        if stopping is not None:
            await stopping
            world.intake = Intake(DECODE, DOUBLE, world.target, parse_lanes("fake"), OPTIONS, {})

    run(scenario, layout=DOUBLE)


def test_cancelling_a_stalled_pull_leaves_its_places_to_others(monkeypatch):
    monkeypatch.setattr(staging, "STAGING_BYTES", 2 * LAYOUT.block_bytes)

    async def scenario(world: Pair) -> None:
        plan = world.intake._lanes[0].faults
        assert plan is not None
        stalled = world.take("stalled", [0, 1])
        offer_all(world, "stalled", [1, 2, 3, 4], 64)
        await until(lambda: plan.injected["stall"] == 1)
        waiting = world.take("waiting", [2, 3])
        offer_all(world, "waiting", [5, 6, 7, 8], 64)
        await until(lambda: len(world.intake._takings) == 2 and world.intake._takings["waiting"].pull is not None)
        await asyncio.sleep(0.1)
        assert not waiting.done()
        world.intake.cancel("stalled")
        assert (await stalled).failure == CANCELLED
        assert (await waiting).failure is None
        assert right(world, LAYOUT, DOUBLE, [5, 6, 7, 8], [2, 3], 2)
        assert (world.target.blocks[:2] == UNWRITTEN).all()

    run(scenario, layout=DOUBLE, pull_lanes="faulty:fake?stall=1", pull_timeout_s=8.0)


def test_without_a_place_in_time_the_hand_over_fails_and_says_why(monkeypatch):
    monkeypatch.setattr(staging, "STAGING_BYTES", LAYOUT.block_bytes)

    async def scenario(world: Pair) -> None:
        gate = Gate(monkeypatch)
        first = world.take("first", [0])
        offer_all(world, "first", [1, 2], 32)
        await until(gate.entered.is_set)
        second = await asyncio.wait_for(_taken(world, "second", [1], [3, 4]), 5)
        assert second.failure == "no staging memory came free before the deadline"
        assert (world.target.blocks[1:] == UNWRITTEN).all()
        gate.open.set()
        assert (await first).failure is None
        assert (await _taken(world, "third", [1], [3, 4])).failure is None
        assert right(world, LAYOUT, DOUBLE, [3, 4], [1], 1)

    run(scenario, layout=DOUBLE, pull_timeout_s=1.0)


async def _taken(world: Pair, handover_id: str, local: list[int], remote: list[int]):
    task = world.take(handover_id, local)
    offer_all(world, handover_id, remote, 16 * len(remote))
    return await task


def test_many_hand_overs_share_few_places_and_all_arrive(monkeypatch):
    monkeypatch.setattr(staging, "STAGING_BYTES", 3 * LAYOUT.block_bytes)

    async def scenario(world: Pair) -> None:
        rows = {f"h{number}": ([4 * number + each for each in range(4)], [2 * number, 2 * number + 1])
                for number in range(12)}  # fmt: skip
        tasks = [world.take(name, local) for name, (_, local) in rows.items()]
        for name, (remote, _) in rows.items():
            offer_all(world, name, remote, 64)
        assert [result.failure for result in await asyncio.gather(*tasks)] == [None] * len(rows)
        assert all(right(world, LAYOUT, DOUBLE, remote, local, 2) for remote, local in rows.values())
        (places,) = world.intake._converters._staging.values()
        assert sorted(places._free) == [0, 1, 2]

    run(scenario, lanes="shm", layout=DOUBLE)


def test_a_block_larger_than_all_staging_memory_is_refused(monkeypatch):
    monkeypatch.setattr(staging, "STAGING_BYTES", LAYOUT.block_bytes - 1)

    async def scenario(world: Pair) -> None:
        result = await world.take("h", [0])
        assert "more than the 8191 set aside" in (result.failure or "")

    run(scenario, layout=DOUBLE)


def test_numbers_too_large_for_the_dtype_here_fail_the_hand_over():
    half = replace(FLOAT, dtype="float16", model_fingerprint="tiny in float16")

    async def scenario(world: Pair) -> None:
        world.source.blocks[5].view(np.float32)[:] = 1.5
        world.source.blocks[6].view(np.float32)[:] = 1e6
        task = world.take("h", [0, 1])
        world.offers.open("h", DECODE_REF)
        world.offer("h", 0, [5])
        await until(lambda: world.intake_counters.get("handover_blocks_received", 0) == 1)
        world.offer("h", 1, [6])
        result = await task
        assert "too large" in (result.failure or "")
        assert (result.num_blocks, result.same_bits) == (1, False)
        assert (world.target.blocks[0].view(np.float16) == 1.5).all()

    run(scenario, offered=FLOAT, layout=half, other_dtypes=True)


# -- who agrees to what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offered", "here", "says"),
    [
        (BFLOAT, FLOAT, "dtype differs: float32 at the puller, bfloat16 at the offerer"),
        (LAYOUT, replace(DOUBLE, model_fingerprint="other"), "model_fingerprint differs"),
        (LAYOUT, replace(LAYOUT, num_kv_heads=1), "num_kv_heads differs"),
        (
            replace(LAYOUT, num_kv_heads=1, tp_size=2),
            replace(LAYOUT, num_kv_heads=1, tp_size=2, tp_rank=1),
            "tp_rank does not fit: rank 1 of 2 has no heads in common with rank 0 of 2",
        ),
    ],
)
def test_what_is_no_use_is_refused_and_names_the_field(offered, here, says):
    async def scenario(world: Pair) -> None:
        result = await world.take("h", [0, 1], 1)
        assert says in (result.failure or "")
        assert result.num_blocks == 1
        assert world.intake_counters == {"handover_peer_losses": 1, "handover_failures": 1}
        assert (world.target.blocks == UNWRITTEN).all()

    run(scenario, offered=offered, layout=here)


def test_a_puller_from_before_conversions_gets_only_blocks_that_it_can_copy():
    async def scenario(world: Pair) -> None:
        for layout, accepted in ((DOUBLE, False), (replace(LAYOUT, dtype="float16"), False), (LAYOUT, True)):
            raw = RawPuller(world.peer.address)
            reply = await raw.hello(layout=layout)
            assert reply.accepted == accepted, reply.reason
            raw.close()

    run(scenario)


def test_an_offerer_from_before_conversions_has_blocks_like_those_here():
    async def scenario(world: Pair) -> None:
        raw, server = RawOfferer(), FakeLaneServer()
        endpoint = server.start(world.source)
        task = asyncio.create_task(world.intake.take("h", raw.peer, [0], 0, time.monotonic() + 5))
        await raw.accept(pb.LaneEndpoint(lane="fake", address=endpoint.address, token=endpoint.token))
        await raw.next("want")
        (link,) = world.intake._users
        assert link.converter is None
        world.intake.cancel("h")
        assert (await task).failure == CANCELLED
        raw.close()

    run(scenario)


def test_equal_layouts_use_no_staging_memory():
    async def scenario(world: Pair) -> None:
        task = world.take("h", [0])
        world.offer_all("h", [9])
        assert (await task).failure is None
        assert world.intake._converters._staging == {}
        assert "handover_blocks_converted" not in world.intake_counters

    run(scenario)


def test_a_peer_with_some_of_the_heads_is_not_taken_for_one_with_all():
    async def scenario(world: Pair) -> None:
        result = await world.take("h", [0, 1])
        assert result.failure == "tp_rank does not fit: heads 0 to 1 were to come from a peer that has heads 0 to 0"
        assert world.intake_counters["handover_failures"] == 1
        assert (world.target.blocks == UNWRITTEN).all()

    run(scenario, offered=replace(LAYOUT, num_kv_heads=1, tp_size=2))


def test_a_rank_takes_its_heads_out_of_a_peer_that_has_them_all():
    here = replace(LAYOUT, num_kv_heads=1, tp_size=2, tp_rank=1)

    async def scenario(world: Pair) -> None:
        task = world.take("h", [3, 2])
        offer_all(world, "h", [8, 9], 32)
        assert (await task).failure is None
        theirs = read_back(world.source.blocks[[8, 9]], LAYOUT, 32)
        assert (world.target.blocks[[3, 2]] == lay_out(theirs, replace(here, tp_rank=1))).all()

    run(scenario, layout=here)
