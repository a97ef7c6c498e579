"""Requests whose blocks live on in a store: host memory, disk, or another host's."""

import pytest

from engine.requests import Handover
from tests.engine.stand_in import PAGE, World, make_request

PROMPT = list(range(18))


def world_that_forgot(**options: int) -> World:
    """PROMPT was served, and then pushed out of the pool; the store kept its blocks."""
    world = World(num_blocks=8, keeps=1.0, **options)
    world.add(make_request("first", PROMPT))
    world.run_to_the_end()
    world.add(make_request("other", [30, *range(26)]))
    world.run_to_the_end()
    assert world.engine.num_cached_tokens(PROMPT, make_request("x", PROMPT).cache_root, 18) == 0
    return world


@pytest.mark.parametrize("handover", [Handover.NONE, Handover.GIVE])
def test_stored_blocks_are_loaded_and_the_rest_is_computed(handover: Handover) -> None:
    world = world_that_forgot()
    before = dict(world.engine.counters)
    world.add(make_request("again", PROMPT, handover))
    output = world.step()
    (reserved,) = output.reserved
    assert (reserved.num_cached_blocks, len(reserved.stored)) == (0, 4)
    assert not output.tokens, "it waits"
    world.deliver("again", 16)
    assert world.engine.receive("again", 16, None, num_loaded=16)
    del world.reserved["again"]
    world.run_to_the_end()
    after = world.engine.counters
    assert after["prompt_tokens_loaded"] - before["prompt_tokens_loaded"] == 16
    assert after["prompt_tokens_received"] == before["prompt_tokens_received"]
    assert after["prompt_tokens_computed"] - before["prompt_tokens_computed"] == 2


def test_what_did_not_load_is_computed() -> None:
    world = world_that_forgot()
    world.add(make_request("again", PROMPT))
    world.step()
    world.scribble("again")
    world.deliver("again", PAGE)
    assert world.receive("again", PAGE, with_first_token=False)
    world.run_to_the_end()


def test_a_prompt_that_is_stored_whole_computes_its_last_token() -> None:
    world = world_that_forgot()
    world.add(make_request("again", PROMPT[:16]))
    world.step()
    assert world.receive_all("again")
    world.run_to_the_end()


def test_a_taker_is_told_what_is_stored_too() -> None:
    world = world_that_forgot()
    world.add(make_request("again", PROMPT, Handover.TAKE))
    (reserved,) = world.step().reserved
    assert len(reserved.stored) == 4
    assert len(reserved.block_ids) * PAGE > len(PROMPT)
    world.run_to_the_end()


def test_others_run_while_blocks_are_loaded() -> None:
    world = world_that_forgot()
    world.add(make_request("loads", PROMPT))
    world.add(make_request("runs", [7, 7, 7]))
    for _ in range(8):
        world.step()
    assert "runs" in world.ended
    assert "loads" not in world.ended
    world.run_to_the_end()


def test_blocks_of_an_aborted_load_stay_until_nothing_writes_them() -> None:
    world = world_that_forgot()
    world.add(make_request("again", PROMPT))
    world.step()
    assert world.abort("again")
    assert world.allocator.counts().quarantined == 5
    world.scribble("again")
    assert world.resolve("again")
    world.run_to_the_end()


def test_a_request_that_waits_for_room_is_not_one_that_waits_for_blocks() -> None:
    world = world_that_forgot(max_running=1)
    world.add(make_request("runs", [7] * 20, max_tokens=12))
    world.step()
    world.add(make_request("waits", PROMPT))
    world.step()
    assert not world.reserved
    world.run_to_the_end()
    assert world.num_stored == 4


def test_what_the_pool_holds_of_a_prefix_is_saved_when_asked_for() -> None:
    world = World(keeps=1.0)
    world.add(make_request("first", PROMPT))
    world.run_to_the_end()
    world.store.kv.clear()
    names = world.engine.names(make_request("x", [*PROMPT[:12], 7, 7, 7, 7]))
    world.engine.save_cached(names, b"")
    assert world.engine.has_work()
    world.step()
    assert list(world.store.kv) == names[:3]
    assert not world.engine.has_work()
