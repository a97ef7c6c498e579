"""Whatever a lane does wrong, a hand-over ends with the right bytes or with a failure, and nothing is written later."""

import asyncio
import time

import pytest

from kvtransfer.lanes.base import BlockRead
from kvtransfer.lanes.faulty import FAULTS, FaultPlan
from kvtransfer.lanes.registry import LANES, parse_lanes
from tests.kvtransfer.world import DECODE_REF, new_memory, pair, scattered, settles_unwritten

HARMLESS = {"delay", "duplicate", "reorder", "flip", "drop", "misplace"}  # once: the retry puts it right
FATAL_ALWAYS = {"drop", "corrupt", "flip", "misplace", "stall", "raise", "stale"}


def faults_of(intake) -> FaultPlan:
    plan = intake._lanes[0].faults
    assert plan is not None
    return plan


@pytest.mark.parametrize("lane", ["fake", "shm", "tcp"])
@pytest.mark.parametrize("when", ["2", "1-"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_ends_in_the_right_bytes_or_in_a_failure(fault, when, lane):
    async def scenario() -> None:
        pull_lanes = f"faulty:{lane}?{fault}={when}&delay_s=0.05"
        async with pair(lane, pull_lanes, pull_timeout_s=0.3) as world:
            remote, local = scattered(12, 1), scattered(12, 2)
            world.offers.open("h", DECODE_REF)
            task = world.take("h", local)
            world.offer("h", 0, remote[:6])
            await pulled(world, 6, task)  # so that the second half is another pull
            world.offer("h", 6, remote[6:])
            world.offers.close("h", 12, 180, 7, 0)
            result = await task

            assert faults_of(world.intake).injected[fault] > 0, "the fault must have happened"
            assert world.intake.lanes_in_use() == {"prefill-0": f"faulty:{lane}"}
            always = when == "1-"
            expect_failure = fault in FATAL_ALWAYS if always else fault not in HARMLESS
            assert (result.failure is not None) == expect_failure
            assert result.num_blocks == 12 if not expect_failure else result.num_blocks in (0, 6)
            done = result.num_blocks
            assert world.same_bytes(remote[:done], local[:done])
            assert await settles_unwritten(world.target)
            await world.owner.has_seen("h", "released", "unverified" if expect_failure else "verified")
            assert world.intake_counters.get("handover_failures", 0) == expect_failure
            corrupting = fault in {"drop", "corrupt", "flip", "misplace"}
            assert (world.intake_counters.get("handover_checksum_failures", 0) > 0) == (corrupting and expect_failure)

    asyncio.run(scenario())


async def pulled(world, num_blocks: int, task) -> None:
    """Until so many blocks are verified here, or the hand-over has ended."""
    while world.intake_counters.get("handover_blocks_received", 0) < num_blocks and not task.done():
        await asyncio.sleep(0.005)


def test_a_plan_draws_the_same_faults_from_the_same_seed():
    def drawn(seed: int) -> list[list[str]]:
        plan = FaultPlan.parse(f"drop=0.3&stale=0.2&seed={seed}")
        return [plan.next_faults() for _ in range(50)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert any(drawn(1))


def test_scripted_faults_hit_the_pulls_they_name():
    plan = FaultPlan.parse("drop=2&raise=4-5&stale=6-")
    assert [plan.next_faults() for _ in range(7)] == [[], ["drop"], [], ["raise"], ["raise"], ["stale"], ["stale"]]
    assert plan.injected == {"drop": 1, "raise": 2, "stale": 2}


def test_a_corrupt_block_stays_corrupt_while_a_flipped_one_is_right_the_next_time():
    async def scenario(fault: str) -> bool:
        async with pair("fake", f"faulty:fake?{fault}=1") as world:
            task = world.take("h", [5, 6, 7])
            world.offer_all("h", [1, 2, 3])
            return (await task).failure is None

    assert not asyncio.run(scenario("corrupt"))
    assert asyncio.run(scenario("flip"))


def test_after_a_failed_lane_the_next_hand_over_probes_again_and_succeeds():
    async def scenario() -> None:
        async with pair("tcp", "faulty:tcp?raise=1") as world:
            task = world.take("first", [0, 1])
            world.offer_all("first", [3, 4])
            assert (await task).failure == "faulty lane: failed in mid-pull"
            task = world.take("second", [0, 1])
            world.offer_all("second", [3, 4])
            assert (await task).failure is None
            assert world.same_bytes([3, 4], [0, 1])

    asyncio.run(scenario())


def test_a_lane_that_breaks_gives_way_to_the_next_one_for_later_hand_overs(caplog):
    async def scenario() -> None:
        async with pair("fake,tcp", "faulty:fake?raise=1,tcp") as world:
            task = world.take("first", [0, 1])
            world.offer_all("first", [3, 4])
            assert (await task).failure is not None
            world.offers._lanes[0].close()
            task = world.take("second", [0, 1])
            world.offer_all("second", [3, 4])
            assert (await task).failure is None
            assert world.intake.lanes_in_use() == {"prefill-0": "tcp"}

    asyncio.run(scenario())
    assert "came by lane faulty:fake before, and by tcp now" in caplog.text


def test_an_unreachable_lane_gives_way_to_the_next_one(caplog):
    async def scenario() -> None:
        async with pair("fake,tcp") as world:
            world.offers._lanes[0].close()
            task = world.take("h", [0, 1])
            world.offer_all("h", [3, 4])
            assert (await task).failure is None
            assert world.intake.lanes_in_use() == {"prefill-0": "tcp"}
            assert world.intake_counters["handover_lane_fallbacks"] == 1

    asyncio.run(scenario())
    assert "come by lane tcp (not fake: lane fake: no such pool in this process)" in caplog.text


def test_parsing_twice_gives_plans_that_share_nothing():
    first, second = parse_lanes("faulty:fake?drop=1")[0].faults, parse_lanes("faulty:fake?drop=1")[0].faults
    assert first is not None
    assert second is not None
    first.next_faults()
    assert second.num_pulls == 0


@pytest.mark.parametrize("fault", ["corrupt", "flip", "misplace", "drop"])
def test_a_fault_of_a_part_of_a_block_stays_within_the_parts_that_were_read(fault):
    source, target = new_memory(seed=1), new_memory()
    server = LANES["fake"].serve("127.0.0.1")
    lane = parse_lanes(f"faulty:fake?{fault}=1")[0]
    client = lane.connect(server.start(source), target, time.monotonic() + 5)
    client.pull([BlockRead(3, 0, 5, 256, 512), BlockRead(4, 0, 6, 256, 512)], time.monotonic() + 5)
    assert not target.blocks[:5].any()
    assert not target.blocks[7:].any()
    assert not target.blocks[5:7, :256].any()
    assert not target.blocks[5:7, 768:].any()
    assert (target.blocks[5:7, 256:768] != source.blocks[3:5, 256:768]).any()
    server.close()
