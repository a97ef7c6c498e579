"""The two ends of a hand-over in one process: what each promises the other, and what it does with a bad one."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from baton.v1 import handover_pb2 as pb
from kvtransfer.intake import CANCELLED, Intake
from kvtransfer.lanes.fake import FakeLaneServer
from kvtransfer.lanes.registry import parse_lanes
from kvtransfer.wire import Numbering, PeerIdentity, PeerRef
from tests.kvtransfer import world as helpers
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


def run(scenario: Callable[..., Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        async with pair(**options) as world:
            await scenario(world)

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


# -- the usual life ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", ["fake", "shm", "tcp"])
def test_blocks_arrive_while_later_ones_are_still_computed(lane):
    async def scenario(world: Pair) -> None:
        # 1. the puller asks before anything is opened
        remote, local = scattered(20, 1), scattered(20, 2)
        task = world.take("h", local)
        world.offers.open("h", DECODE_REF)
        # 2. each chunk is pulled before the next is offered
        for start in range(0, 20, 5):
            world.offer("h", start, remote[start : start + 5])
            await until(lambda end=start + 5: world.intake_counters.get("handover_blocks_received", 0) == end)
        assert not task.done()
        # 3. closing carries the first token
        world.offers.close("h", 20, 313, 7, 3)
        result = await task
        assert (result.num_blocks, result.num_tokens, result.failure) == (20, 313, None)
        assert (result.first_token_id, result.first_token_index) == (7, 3)
        assert world.same_bytes(remote, local)
        # 4. the owner learns it once, and everything is counted
        await world.owner.has_seen("h", "released", "verified")
        assert world.owner.events == [("h", "released", "verified")]
        assert world.offer_counters == {"handover_blocks_offered": 20}
        assert world.intake_counters["handover_bytes_received"] == 20 * helpers.BLOCK_BYTES
        assert world.intake_counters["handover_seconds"] > 0
        assert "handover_failures" not in world.intake_counters

    run(scenario, lanes=lane)


def test_only_the_blocks_that_are_missing_are_pulled():
    async def scenario(world: Pair) -> None:
        world.target.blocks[:] = 99
        task = world.take("h", list(range(10)), first_block=4)
        world.offer_all("h", list(range(20, 30)), chunk=3)
        assert (await task).num_blocks == 10
        assert (world.target.blocks[:4] == 99).all()
        assert (world.target.blocks[10:] == 99).all()
        assert world.same_bytes(range(24, 30), range(4, 10))
        assert world.intake_counters["handover_blocks_received"] == 6

    run(scenario)


def test_a_want_that_comes_before_the_opening_is_answered_by_it():
    async def scenario(world: Pair) -> None:
        task = world.take("h", [0, 1])
        await until(lambda: "h" in world.offers._parked)
        world.offer_all("h", [8, 9])
        assert (await task).failure is None
        assert world.same_bytes([8, 9], [0, 1])
        assert not world.offers._parked

    run(scenario)


@pytest.mark.parametrize("num_blocks", [0, 3])
def test_a_row_that_is_here_already_closes_without_a_pull(num_blocks):
    async def scenario(world: Pair) -> None:
        task = world.take("h", list(range(num_blocks)), first_block=num_blocks)
        world.offer_all("h", list(range(num_blocks)))
        result = await task
        assert (result.num_blocks, result.first_token_id, result.failure) == (num_blocks, 7, None)
        assert not world.target.blocks.any()

    run(scenario)


def test_many_hand_overs_at_once_share_one_connection_and_keep_their_blocks_apart():
    async def scenario(world: Pair) -> None:
        rows = [list(range(start, start + 4)) for start in range(0, 64, 4)]
        tasks = [world.take(f"h{index}", row) for index, row in enumerate(rows)]
        for index, row in enumerate(rows):
            world.offer_all(f"h{index}", row[::-1], chunk=2)
        assert [result.failure for result in await asyncio.gather(*tasks)] == [None] * len(rows)
        assert all(world.same_bytes(row[::-1], row) for row in rows)
        assert len(world.offers._connections) == 1

    run(scenario, lanes="shm")


def test_a_long_prefill_keeps_its_lease_by_the_pullers_heartbeats():
    async def scenario(world: Pair) -> None:
        task = world.take("h", [0])
        world.offers.open("h", DECODE_REF)
        await asyncio.sleep(0.8)  # twice the lease
        world.offer("h", 0, [9])
        world.offers.close("h", 1, 16, 7, 3)
        assert (await task).failure is None
        assert "handover_leases_expired" not in world.offer_counters

    run(scenario, lease_s=0.4)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"layout": replace(LAYOUT, dtype="bfloat16")},
            "dtype differs: bfloat16 at the puller, float32 at the offerer",
        ),
        ({"incarnation": 12}, "restarted"),
        ({"lanes": "tcp"}, "no common lane"),
    ],
)
def test_a_peer_that_does_not_fit_is_refused_with_the_reason(changes, says):
    async def scenario(world: Pair) -> None:
        counters: dict[str, float] = {}
        layout, lanes = changes.get("layout", LAYOUT), parse_lanes(changes.get("lanes", "fake"))
        intake = Intake(DECODE, layout, world.target, lanes, OPTIONS, counters)
        peer = replace(world.peer, incarnation=changes.get("incarnation", world.peer.incarnation))
        result = await intake.take("h", peer, [0, 1], 1, time.monotonic() + 5)
        assert says in (result.failure or "")
        assert result.num_blocks == 1
        assert counters == {"handover_peer_losses": 1, "handover_failures": 1}
        await intake.stop()

    run(scenario)


def test_another_worker_and_another_life_of_the_right_one_get_nothing():
    async def scenario(world: Pair) -> None:
        world.offers.open("h", PeerRef("decode-1", 5, ""))
        world.offer("h", 0, [1])
        assert "another worker" in ((await world.take("h", [0])).failure or "")
        world.offers.open("g", PeerRef(DECODE.worker_id, 21, ""))
        assert "another worker" in ((await world.take("g", [0])).failure or "")
        assert not world.target.blocks.any()
        assert world.owner.events == []

    run(scenario)


def test_nobody_at_the_address_fails_at_once():
    async def scenario(world: Pair) -> None:
        for address in ("tcp://127.0.0.1:1", "nonsense"):
            start = time.monotonic()
            peer = PeerRef("prefill-9", 9, address)
            assert (await world.intake.take("h", peer, [0], 0, start + 5)).failure is not None
            assert time.monotonic() - start < 0.9

    run(scenario)


# -- messages late, doubled and lost -----------------------------------------------------------------------------------


def test_a_release_that_comes_twice_or_for_an_unknown_id_changes_nothing():
    async def scenario(world: Pair) -> None:
        raw = RawPuller(world.peer.address)
        await raw.hello()
        world.offers.open("h", DECODE_REF)
        for handover_id in ("h", "h", "unknown", "h"):
            await raw.send(release=pb.Release(handover_id=handover_id, verified=True))
        await raw.send(want=pb.Want(handover_id="h"))
        assert "ended" in (await raw.next("failed")).failed.reason
        assert world.owner.events == [("h", "released", "unverified")]
        world.offer("h", 0, [1])  # too late, and ignored
        world.offers.close("h", 0, 0, 0, 0)
        world.offers.fail("h", "too late")
        assert world.owner.events == [("h", "released", "unverified")]
        raw.close()

    run(scenario)


def test_a_want_whose_hand_over_is_never_opened_ends_although_both_workers_live():
    async def scenario(world: Pair) -> None:
        result = await world.take("h", [0])
        assert "in time" in str(result.failure)
        assert result.num_blocks == 0
        world.offers.open("h", DECODE_REF)  # the assignment comes late after all
        await world.owner.has_seen("h", "released", "unverified")

    run(scenario)


def test_a_release_that_overtakes_the_opening_gives_the_blocks_back_at_once():
    async def scenario(world: Pair) -> None:
        task = world.take("h", [0])
        await until(lambda: "h" in world.offers._parked)
        world.intake.cancel("h")
        assert (await task).failure == CANCELLED
        await until(lambda: "h" not in world.offers._parked)
        world.offers.open("h", DECODE_REF)
        assert world.owner.events == [], "open() does not call back from inside"
        await world.owner.has_seen("h", "released", "unverified")

    run(scenario)


def test_an_offer_after_the_revoke_is_not_pulled():
    async def scenario(world: Pair) -> None:
        raw, server = RawOfferer(), FakeLaneServer()
        endpoint = server.start(world.source)
        task = asyncio.create_task(world.intake.take("h", raw.peer, [0, 1], 0, time.monotonic() + 5))
        await raw.accept(pb.LaneEndpoint(lane="fake", address=endpoint.address, token=endpoint.token))
        await raw.next("want")
        await raw.send(revoke=pb.Revoke(handover_id="h"))
        await raw.send(offer=pb.Offer(handover_id="h", blocks=[pb.OfferedBlock(block_id=5)]))
        assert (await task).failure == "the lease ended"
        assert not (await raw.next("release")).release.verified
        assert await settles_unwritten(world.target)
        assert not world.target.blocks.any()
        raw.close()

    run(scenario)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([pb.Offer(handover_id="h", first_block=1, blocks=[pb.OfferedBlock()])], "where 0 was due"),
        ([pb.Offer(handover_id="h", blocks=[pb.OfferedBlock()] * 3)], "more than the 2 blocks"),
        ([pb.OfferClosed(handover_id="h", num_blocks=1)], "block 0 was due"),
        ([pb.Offer(handover_id="h", blocks=[pb.OfferedBlock(block_id=1 << 20)])], "blocks, none is number"),
        ([pb.Offer(handover_id="h", blocks=[pb.OfferedBlock(generation=9)])], "no longer holds"),
        ([pb.Offer(handover_id="h", blocks=[pb.OfferedBlock(checksum=9)])], "other bytes"),
        ([pb.OfferFailed(handover_id="h", reason="out of luck")], "out of luck"),
        ([pb.Want(handover_id="h")], "not for it to send"),
    ],
)
def test_an_impossible_offer_ends_the_hand_over_and_nothing_else(messages, says):
    names = {pb.Offer: "offer", pb.OfferClosed: "closed", pb.OfferFailed: "failed", pb.Want: "want"}

    async def scenario(world: Pair) -> None:
        raw, server = RawOfferer(), FakeLaneServer()
        endpoint = server.start(world.source)
        task = asyncio.create_task(world.intake.take("h", raw.peer, [0, 1], 0, time.monotonic() + 5))
        await raw.accept(pb.LaneEndpoint(lane="fake", address=endpoint.address, token=endpoint.token))
        await raw.next("want")
        for message in messages:
            await raw.send(**{names[type(message)]: message})
        result = await task
        assert says in (result.failure or "")
        assert result.num_blocks == 0
        raw.close()

    run(scenario)


@pytest.mark.parametrize("number", [1, 5])
def test_a_repeat_or_gap_from_the_offerer_ends_its_connection_and_its_hand_overs(number):
    async def scenario(world: Pair) -> None:
        raw, server = RawOfferer(), FakeLaneServer()
        endpoint = server.start(world.source)
        task = asyncio.create_task(world.intake.take("h", raw.peer, [0], 0, time.monotonic() + 5))
        await raw.accept(pb.LaneEndpoint(lane="fake", address=endpoint.address, token=endpoint.token))
        await raw.next("want")
        offer = pb.Offer(handover_id="h", blocks=[pb.OfferedBlock(block_id=1)])
        await raw.send_frame(pb.HandoverMessage(sequence=number, offer=offer).SerializeToString())
        assert (await task).failure == f"the peer sent message {number} where 2 was due"
        assert world.intake_counters["handover_peer_losses"] == 1
        raw.close()

    run(scenario)


@pytest.mark.parametrize("frame", [b"\xff\xff no message", b""])
def test_garbage_from_the_offerer_ends_its_connection(frame):
    async def scenario(world: Pair) -> None:
        raw = RawOfferer()
        task = asyncio.create_task(world.intake.take("h", raw.peer, [0], 0, time.monotonic() + 5))
        await raw.next("hello")
        await raw.send_frame(frame)
        assert (await task).failure is not None
        raw.close()

    run(scenario)


def test_a_gap_from_the_puller_ends_its_connection_and_gives_its_blocks_back():
    async def scenario(world: Pair) -> None:
        raw = RawPuller(world.peer.address)
        await raw.hello()
        world.offers.open("h", DECODE_REF)
        await raw.send(want=pb.Want(handover_id="h"))
        await until(lambda: world.offers._outgoing["h"].connection is not None)
        raw.numbering.stamp(pb.HandoverMessage())  # lost on the way
        await raw.send(heartbeat=pb.HandoverHeartbeat(renew=["h"]))
        await world.owner.has_seen("h", "released", "unverified")
        reply = (await raw.next("hello_reply")).hello_reply
        assert not reply.accepted
        assert "where 3 was due" in reply.reason
        assert world.offer_counters["handover_peer_losses"] == 1
        # nothing that it says afterwards counts
        world.offers.open("g", DECODE_REF)
        await raw.send(want=pb.Want(handover_id="g"))
        assert "where 1 was due" in (await raw_refusal(raw)).reason
        raw.close()

    run(scenario)


async def raw_refusal(raw: RawPuller) -> pb.HelloReply:
    """A connection that the offerer does not know is numbered from 1 again."""
    raw._incoming = Numbering()
    return (await raw.next("hello_reply")).hello_reply


@pytest.mark.parametrize("body", [{"revoke": pb.Revoke()}, {"want": pb.Want(handover_id="x" * 300)}, {}])
def test_a_message_that_is_not_for_the_puller_to_send_ends_its_connection(body):
    async def scenario(world: Pair) -> None:
        raw = RawPuller(world.peer.address)
        await raw.hello()
        await raw.send(**body)
        assert not (await raw.next("hello_reply")).hello_reply.accepted
        raw.close()

    run(scenario)


# -- leases and silence ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [True, False])
def test_an_expired_lease_is_quarantined_until_the_puller_answers_or_time_is_up(answers):
    async def scenario(world: Pair) -> None:
        raw = RawPuller(world.peer.address)
        await raw.hello()
        world.offers.open("h", DECODE_REF)
        world.offer("h", 0, [1])
        await raw.send(want=pb.Want(handover_id="h"))
        await raw.next("offer")

        async def beat() -> None:
            while True:  # alive, but it renews nothing
                await raw.send(heartbeat=pb.HandoverHeartbeat())
                await asyncio.sleep(0.05)

        beating = asyncio.create_task(beat())
        await raw.next("revoke")
        assert world.owner.events == [("h", "quarantined")]
        assert world.offer_counters["handover_leases_expired"] == 1
        world.offer("h", 1, [2])
        assert await raw.hears_no("offer", 0.1)
        if answers:
            await raw.send(release=pb.Release(handover_id="h"))
        start = time.monotonic()
        await world.owner.has_seen("h", "resolved")
        assert (time.monotonic() - start < 0.3) == answers
        assert world.owner.events == [("h", "quarantined"), ("h", "resolved")]
        beating.cancel()
        raw.close()

    run(scenario, lease_s=0.3, pull_timeout_s=0.2, heartbeat_timeout_s=0.5)


def test_a_lease_that_nobody_ever_came_for_is_resolved_with_its_expiry():
    async def scenario(world: Pair) -> None:
        world.offers.open("h", DECODE_REF)
        world.offer("h", 0, [1])
        await world.owner.has_seen("h", "resolved")
        assert world.owner.events == [("h", "quarantined"), ("h", "resolved")]

    run(scenario, lease_s=0.1)


def test_a_silent_puller_is_dead_and_its_blocks_come_back():
    async def scenario(world: Pair) -> None:
        raw = RawPuller(world.peer.address)
        await raw.hello()
        for handover_id in ("wanted", "not wanted yet"):
            world.offers.open(handover_id, DECODE_REF)
        await raw.send(want=pb.Want(handover_id="wanted"))
        await world.owner.has_seen("not wanted yet", "released", "unverified")
        assert sorted(world.owner.events) == [
            ("not wanted yet", "released", "unverified"),
            ("wanted", "released", "unverified"),
        ]
        assert world.offer_counters == {"handover_peer_losses": 1}
        raw.close()

    run(scenario, heartbeat_timeout_s=0.3)


def test_a_silent_puller_is_dropped_when_the_stated_time_is_over_and_no_interval_later():
    async def scenario(world: Pair) -> None:
        raw = RawPuller(world.peer.address)
        await raw.hello()
        world.offers.open("h", DECODE_REF)
        await raw.send(want=pb.Want(handover_id="h"))
        await raw.next("heartbeat")  # it has just looked: its next looks are 0.4, 0.8, 1.2 s away
        await asyncio.sleep(0.05)
        await raw.send(heartbeat=pb.HandoverHeartbeat(renew=["h"]))
        start = time.monotonic()
        await world.owner.has_seen("h", "released", "unverified")
        assert 0.7 < time.monotonic() - start < 1.1
        raw.close()

    run(scenario, heartbeat_interval_s=0.4, heartbeat_timeout_s=0.8)


def test_a_restarted_puller_ends_what_its_former_life_held():
    async def scenario(world: Pair) -> None:
        old = RawPuller(world.peer.address)
        await old.hello()
        world.offers.open("h", DECODE_REF)
        await old.send(want=pb.Want(handover_id="h"))
        await until(lambda: world.offers._outgoing["h"].connection is not None)
        new = RawPuller(world.peer.address, PeerIdentity(DECODE.worker_id, 23))
        assert (await new.hello()).accepted
        assert world.owner.events == [("h", "released", "unverified")]
        await new.send(want=pb.Want(handover_id="h"))
        assert "ended" in (await new.next("failed")).failed.reason
        old.close()
        new.close()

    run(scenario, heartbeat_timeout_s=5.0)


def test_a_silent_offerer_is_lost_within_the_stated_bound():
    async def scenario(world: Pair) -> None:
        raw, server = RawOfferer(), FakeLaneServer()
        endpoint = server.start(world.source)
        task = asyncio.create_task(world.intake.take("h", raw.peer, [0], 0, time.monotonic() + 9))
        lane = pb.LaneEndpoint(lane="fake", address=endpoint.address, token=endpoint.token)
        await raw.accept(lane, heartbeat_interval_s=0.4, heartbeat_timeout_s=0.8)
        await raw.next("heartbeat")
        await raw.next("heartbeat")  # it has just looked: its next looks are 0.4, 0.8, 1.2 s away
        await asyncio.sleep(0.05)
        await raw.send(heartbeat=pb.HandoverHeartbeat())
        start = time.monotonic()
        assert (await task).failure == "it fell silent"
        assert 0.7 < time.monotonic() - start < 1.1
        raw.close()

    run(scenario)


# -- giving up ---------------------------------------------------------------------------------------------------------


def test_the_owner_gives_up_at_once_before_anybody_asked_and_by_agreement_afterwards():
    async def scenario(world: Pair) -> None:
        world.offers.open("early", DECODE_REF)
        world.offer("early", 0, [1])
        world.offers.fail("early", "request aborted")
        assert world.owner.events == [("early", "released", "unverified")]

        task = world.take("late", [0, 1])
        world.offers.open("late", DECODE_REF)
        world.offer("late", 0, [5])
        await until(lambda: world.intake_counters.get("handover_blocks_received", 0) == 1)
        world.offers.fail("late", "request aborted")
        assert ("late", "released", "unverified") not in world.owner.events
        result = await task
        assert (result.num_blocks, result.failure) == (1, "the peer gave up: request aborted")
        await world.owner.has_seen("late", "released", "unverified")

    run(scenario)


def test_cancelling_ends_a_stalled_pull_soon_and_nothing_is_written_afterwards():
    async def scenario(world: Pair) -> None:
        task = world.take("h", [0, 1])
        world.offer_all("h", [5, 6])
        plan = world.intake._lanes[0].faults
        assert plan is not None
        await until(lambda: plan.injected["stall"] > 0)
        start = time.monotonic()
        world.intake.cancel("h")
        assert (await task).failure == CANCELLED
        assert time.monotonic() - start < 1.0
        assert await settles_unwritten(world.target)
        await world.owner.has_seen("h", "released", "unverified")
        assert "handover_failures" not in world.intake_counters, "an abort is not a failure"
        world.intake.cancel("h")  # again: no error

    run(scenario, pull_lanes="faulty:fake?stall=1-", pull_timeout_s=8.0)


def test_cancelling_does_not_wait_for_the_turn_of_its_pull():
    async def scenario(world: Pair) -> None:
        tasks = {}
        plan = world.intake._lanes[0].faults
        assert plan is not None
        for number, handover_id in enumerate(("stalled", "stalled too", "queued")):
            tasks[handover_id] = world.take(handover_id, [number])
            await asyncio.sleep(0)
            world.offer_all(handover_id, [number])
        taking = world.intake._takings["queued"]
        await until(lambda: plan.injected["stall"] == 2 and taking.pull is not None)
        start = time.monotonic()
        world.intake.cancel("queued")
        assert (await tasks["queued"]).failure == CANCELLED
        assert time.monotonic() - start < 1.0
        assert not tasks["stalled"].done()

    run(scenario, pull_lanes="faulty:fake?stall=1-", pull_timeout_s=8.0)


def test_a_cancelled_task_returns_only_when_no_thread_writes_any_more():
    async def scenario(world: Pair) -> None:
        task = world.take("h", [0, 1])
        world.offer_all("h", [5, 6])
        plan = world.intake._lanes[0].faults
        assert plan is not None
        await until(lambda: plan.injected["delay"] > 0)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()  # an impatient caller
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await settles_unwritten(world.target)
        await world.owner.has_seen("h", "released", "unverified")
        assert world.intake._takings == {}

    run(scenario, pull_lanes="faulty:fake?delay=1-&delay_s=0.3")


def test_cancelling_while_the_handshake_is_under_way_does_not_wait_for_it():
    async def scenario(world: Pair) -> None:
        raw = RawOfferer()  # never answers
        task = asyncio.create_task(world.intake.take("h", raw.peer, [0], 0, time.monotonic() + 5))
        await raw.next("hello")
        world.intake.cancel("h")
        start = time.monotonic()
        assert (await task).failure == CANCELLED
        assert time.monotonic() - start < 0.5
        raw.close()

    run(scenario)


@pytest.mark.parametrize("opened", [True, False])
def test_the_deadline_ends_a_hand_over_that_never_closes(opened):
    async def scenario(world: Pair) -> None:
        task = world.take("h", [0, 1], timeout_s=0.4)
        if opened:
            world.offers.open("h", DECODE_REF)
            world.offer("h", 0, [5])
        result = await task
        assert result.num_blocks == (1 if opened else 0)
        assert "deadline" in (result.failure or "")

    run(scenario)


def test_a_block_that_the_owner_reuses_before_the_pull_is_a_miss():
    async def scenario(world: Pair) -> None:
        task = world.take("h", [0])
        world.offers.open("h", DECODE_REF)
        world.offers.offer("h", 0, [5], [41])  # the block is at generation 0
        assert "no longer holds" in ((await task).failure or "")
        assert (await task).num_blocks == 0

    run(scenario)


def test_a_block_whose_bytes_change_after_the_offer_is_counted_and_never_verified():
    async def scenario(world: Pair) -> None:
        world.offers.open("h", DECODE_REF)
        world.offer("h", 0, [5, 6])
        await until(lambda: len(world.offers._outgoing["h"].ready) == 1)
        world.source.blocks[6, 100] ^= 1  # without a new generation: memory gone bad
        result = await world.take("h", [0, 1])
        assert (result.num_blocks, world.intake_counters["handover_checksum_failures"]) == (1, 1)
        assert world.same_bytes([5], [0])
        await world.owner.has_seen("h", "released", "unverified")

    run(scenario)


def test_stopping_ends_every_hand_over_on_both_sides():
    async def main() -> None:
        async with pair() as world:
            task = world.take("h", [0])
            world.offers.open("h", DECODE_REF)
            world.offers.open("unwanted", DECODE_REF)
            await until(lambda: world.offers._outgoing["h"].connection is not None)
            await world.intake.stop()
            assert (await task).failure == "the worker stops"
            await world.owner.has_seen("h", "released", "unverified")
            await world.offers.stop()
            assert sorted(world.owner.events) == [
                ("h", "released", "unverified"),
                ("unwanted", "released", "unverified"),
            ]
            world.intake = Intake(DECODE, LAYOUT, world.target, parse_lanes("fake"), OPTIONS, {})
            world.offers = helpers.offer_server(world.source, world.owner, {}, OPTIONS)

    asyncio.run(main())


def test_misuse_by_the_owner_raises_at_the_call():
    async def scenario(world: Pair) -> None:
        world.offers.open("h", DECODE_REF)
        with pytest.raises(ValueError, match="before"):
            world.offers.open("h", DECODE_REF)
        with pytest.raises(ValueError, match="outside"):
            world.offer("h", 0, [helpers.NUM_BLOCKS - 1]) or world.offers.offer("h", 1, [helpers.NUM_BLOCKS], [0])
        with pytest.raises(ValueError, match="due"):
            world.offer("h", 3, [1])

    run(scenario)
