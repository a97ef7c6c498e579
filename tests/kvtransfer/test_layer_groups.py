"""Blocks that are offered group of layers by group of layers, while the layers behind them are still computed."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np
import pytest
import xxhash

from baton.v1 import handover_pb2 as pb
from kvtransfer.lanes.fake import FakeLaneServer
from kvtransfer.layout import BlockLayout
from kvtransfer.outgoing import MIN_GROUP_BYTES, layer_groups
from tests.kvtransfer.dense import lay_out, read_back
from tests.kvtransfer.test_handover import until
from tests.kvtransfer.world import DECODE_REF, LAYOUT, Pair, RawOfferer, pair, scattered

DEEP = replace(LAYOUT, num_layers=8)
LAYER_BYTES = DEEP.block_bytes // 8


def run(scenario: Callable[[Pair], Awaitable[None]], offered: BlockLayout = DEEP, **options: object) -> None:
    async def main() -> None:
        async with pair(offered=offered, layout=options.pop("here", DEEP), **options) as world:
            await scenario(world)

    asyncio.run(main())


def offer_part(world: Pair, first_block: int, block_ids: list[int], num_layers: int | None) -> None:
    world.offers.offer("h", first_block, block_ids, world.source.generations[block_ids].tolist(), num_layers)


def num_bytes(world: Pair) -> float:
    return world.intake_counters.get("handover_bytes_received", 0)


@pytest.mark.parametrize("lane", ["fake", "shm", "cma", "tcp"])
def test_a_group_of_layers_arrives_while_the_next_is_computed(lane: str) -> None:
    async def scenario(world: Pair) -> None:
        remote, local = scattered(6, 1), scattered(6, 2)
        task = world.take("h", local)
        world.offers.open("h", DECODE_REF)
        for first in (0, 3):
            row, there = local[first : first + 3], remote[first : first + 3]
            for before, layers in ((0, 3), (3, 6), (6, None)):
                # 1. What is behind the group is not final: whatever is there now must not matter.
                world.source.blocks[there, before * LAYER_BYTES :] = random.randrange(256)
                offer_part(world, first, there, layers)
                end = (layers or 8) * LAYER_BYTES
                # 2. The group is here before the next one is offered.
                received = first * DEEP.block_bytes + 3 * end
                await until(lambda received=received: num_bytes(world) == received)
                assert (world.target.blocks[row, :end] == world.source.blocks[there, :end]).all()
                assert not world.target.blocks[row, end:].any()
        world.offers.close("h", 6, 96, 7, 3)
        result = await task
        assert (result.num_blocks, result.first_token_id, result.failure) == (6, 7, None)
        assert world.same_bytes(remote, local)
        assert world.intake_counters["handover_blocks_received"] == world.offer_counters["handover_blocks_offered"] == 6
        await world.owner.has_seen("h", "released", "verified")

    run(scenario, lanes=lane)


@pytest.mark.parametrize("seed", range(12))
def test_a_reader_may_come_at_any_time_and_lack_any_part(seed: int) -> None:
    draw = random.Random(seed)

    async def scenario(world: Pair) -> None:
        num_blocks, first = draw.randint(1, 12), 0
        remote, local = scattered(num_blocks, seed), scattered(num_blocks, seed + 50)
        known, comes_at = draw.randint(0, num_blocks), draw.randint(0, 20)
        world.target.blocks[local[:known]] = world.source.blocks[remote[:known]]
        world.offers.open("h", DECODE_REF)
        task, count = None, 0
        while first < num_blocks:
            end = draw.randint(first + 1, num_blocks)
            for layers in (*sorted(draw.sample(range(1, 8), draw.randint(0, 4))), None):
                offer_part(world, first, remote[first:end], layers)
                count += 1
                if count == comes_at:
                    task = world.take("h", local, first_block=known)
                if draw.random() < 0.3:
                    await asyncio.sleep(0.002)
            first = end
        world.offers.close("h", num_blocks, num_blocks * 16, 7, 3)
        result = await (task or world.take("h", local, first_block=known))
        assert (result.num_blocks, result.num_tokens, result.failure) == (num_blocks, num_blocks * 16, None)
        assert world.same_bytes(remote, local)
        assert num_bytes(world) == (num_blocks - known) * DEEP.block_bytes

    run(scenario)


def test_only_whole_blocks_count_when_the_hand_over_ends_early() -> None:
    async def scenario(world: Pair) -> None:
        task = world.take("h", [0, 1, 2, 3])
        world.offers.open("h", DECODE_REF)
        offer_part(world, 0, [5, 6], None)
        offer_part(world, 2, [7, 8], 6)
        await until(lambda: num_bytes(world) == 2 * DEEP.block_bytes + 2 * 6 * LAYER_BYTES)
        world.offers.fail("h", "aborted")
        result = await task
        assert (result.num_blocks, result.num_tokens) == (2, None)
        await world.owner.has_seen("h", "released", "unverified")

    run(scenario)


def test_layers_that_change_after_their_offer_are_never_verified() -> None:
    async def scenario(world: Pair) -> None:
        world.offers.open("h", DECODE_REF)
        offer_part(world, 0, [5, 6], 4)
        offer_part(world, 0, [5, 6], None)
        await until(lambda: world.offers._outgoing["h"].num_ready == 2)
        world.source.blocks[6, 5 * LAYER_BYTES] ^= 1
        result = await world.take("h", [0, 1])
        assert (result.num_blocks, world.intake_counters["handover_checksum_failures"]) == (1, 1)
        assert "wrong" in str(result.failure) or "other bytes" in str(result.failure)

    run(scenario)


@pytest.mark.parametrize("page_size", [8, 32])
def test_blocks_are_converted_once_all_their_layers_are_here(page_size: int) -> None:
    here = replace(DEEP, page_size_tokens=page_size)

    async def scenario(world: Pair) -> None:
        remote, local = scattered(4, 1), scattered(4 * 16 // page_size, 2)
        task = world.take("h", local)
        world.offers.open("h", DECODE_REF)
        for layers in (2, 5, None):
            assert num_bytes(world) == 0
            offer_part(world, 0, remote, layers)
            await asyncio.sleep(0.01)
        world.offers.close("h", 4, 64, 7, 3)
        assert (await task).num_blocks == len(local)
        dense = read_back(world.source.blocks[remote], DEEP, 64).float()
        assert (world.target.blocks[local] == lay_out(dense, here)).all()

    run(scenario, here=here)


def test_an_owner_that_contradicts_itself_is_told() -> None:
    async def scenario(world: Pair) -> None:
        world.offers.open("h", DECODE_REF)
        offer_part(world, 0, [5, 6], 4)
        for first, blocks, layers in ((0, [5, 6], 4), (0, [5, 6], 3), (0, [5], 6), (0, [5, 6, 7], None), (2, [7], 2)):
            with pytest.raises(ValueError, match="hand-over h"):
                offer_part(world, first, blocks, layers)
        with pytest.raises(ValueError, match="9 layers"):
            offer_part(world, 0, [5, 6], 9)
        offer_part(world, 0, [5, 6], None)

    run(scenario)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ([(0, 5, 1, 4), (0, 5, 1, 4)], "not with more layers"),
        ([(0, 5, 1, 4), (0, 6, 1, 8)], "not with more layers"),
        ([(0, 5, 1, 4), (0, 5, 2, 8)], "not with more layers"),
        ([(0, 5, 1, 9)], "9 layers"),
        ([(1, 5, 1, 8)], "offered block 1 where 0 was due"),
        ([(0, 5, 1, 4), "closed"], "not offered in full"),
    ],
)
def test_offers_that_do_not_fit_together_end_the_hand_over(what: list, words: str) -> None:
    async def scenario(world: Pair) -> None:
        lane, offerer = FakeLaneServer(), RawOfferer()
        world.source.generations[[5, 6]] = 1  # as most of what is offered says: it may be pulled before more is said
        endpoint = lane.start(world.source)
        task = asyncio.create_task(
            world.intake.take("h", offerer.peer, [0, 1, 2], 0, asyncio.get_running_loop().time() + 5)
        )
        await offerer.accept(pb.LaneEndpoint(lane=endpoint.lane, address=endpoint.address, token=endpoint.token))
        await offerer.next("want")
        for each in what:
            if each == "closed":
                await offerer.send(closed=pb.OfferClosed(handover_id="h", num_blocks=1, num_tokens=16))
                continue
            position, block, generation, layers = each
            checksum = xxhash.xxh3_64_intdigest(
                np.ascontiguousarray(world.source.blocks[block, : layers * LAYER_BYTES])
            )
            blocks = [pb.OfferedBlock(block_id=block, generation=generation, checksum=checksum)]
            await offerer.send(offer=pb.Offer(handover_id="h", first_block=position, blocks=blocks, num_layers=layers))
        result = await task
        offerer.close()
        lane.close()
        assert words in str(result.failure)

    run(scenario)


def test_groups_are_not_smaller_than_is_worth_moving() -> None:
    assert layer_groups(16, MIN_GROUP_BYTES) == (16,)
    assert layer_groups(16, 2 * MIN_GROUP_BYTES) == (8, 16)
    assert layer_groups(32, 100 * MIN_GROUP_BYTES) == (4, 8, 12, 16, 20, 24, 28, 32)
    assert layer_groups(3, 100 * MIN_GROUP_BYTES) == (1, 2, 3)
    assert layer_groups(26, 3 * MIN_GROUP_BYTES) == (8, 17, 26)
    assert layer_groups(2, 96 << 10) == (2,)
