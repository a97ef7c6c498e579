"""Requests whose blocks live on in a store: host memory, disk, or another host's."""

from dataclasses import replace

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


def world_that_saves_late(**options: int) -> World:
    return World(max_batch_tokens=8, max_running=2, keeps=1.0, save_at_eviction=True, **options)


def serve(world: World, number: int, num_tokens: int = 16) -> list[bytes]:
    """A prompt like no other from its first token on; the names of its blocks."""
    request = make_request(f"r{len(world.ended)}", [number, *range(1, num_tokens)])
    world.add(request)
    world.run_to_the_end()
    return world.engine.names(request)


def test_blocks_are_saved_only_before_they_are_evicted() -> None:
    world = world_that_saves_late(num_blocks=40, max_model_tokens=24)
    num_ahead = 24 // PAGE + 8 // PAGE + 2
    names = [name for number in range(6) for name in serve(world, number)]
    assert world.allocator.counts().free == 40 - len(names) >= num_ahead
    assert not world.store.kv
    names += [name for number in range(6, 20) for name in serve(world, number)]
    kept = len(world.engine._scheduler.tables.cache)
    assert kept + world.allocator.counts().free == 40
    gone = names[: len(names) - kept]
    assert len(gone) > 30
    assert set(gone) <= set(world.store.kv)
    assert len(world.store.kv) <= len(gone) + num_ahead
    assert world.engine.counters["kv_saves_too_late"] == 0
    loaded = world.num_stored
    serve(world, 0)
    assert world.num_stored == loaded + 4


def test_blocks_that_are_evicted_too_soon_to_be_saved_are_counted() -> None:
    world = world_that_saves_late(num_blocks=10, max_model_tokens=40)
    names = serve(world, 0) + serve(world, 1)
    serve(world, 2, 36)
    late = world.engine.counters["kv_saves_too_late"]
    assert late > 0
    assert len(set(names) - set(world.store.kv)) == late


@pytest.mark.parametrize("save_at_eviction", [False, True])
@pytest.mark.parametrize("pays", [True, False])
def test_a_preempted_request_is_loaded_back_where_that_is_cheaper(
    save_at_eviction: bool, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(num_blocks=7, keeps=1.0, save_at_eviction=save_at_eviction)
    if not pays:
        monkeypatch.setattr(world.store, "worth_loading", lambda names, compute_s: 0)
    old, young = [make_request(name, [len(name)] * 12, max_tokens=14) for name in ("old", "young")]
    world.add(old)
    world.add(young)
    while not world.engine.counters["preemptions"]:
        world.store.kv.clear()
        world.step()
    before = dict(world.engine.counters)
    assert set(world.engine.names(young)[:2]) <= set(world.store.kv), "saved at once, although it had been before"
    world.run_to_the_end()
    after = world.engine.counters
    loaded = after["prompt_tokens_fetched"] - before["prompt_tokens_fetched"]  # by the stand-in, as from a peer
    computed = after["prompt_tokens_computed"] - before["prompt_tokens_computed"]
    cached = after["prompt_tokens_cached"] - before["prompt_tokens_cached"]
    assert loaded + computed + cached == 12
    assert (loaded > 0, computed == 0) == (pays, pays)


def test_a_block_belongs_to_the_tenant_that_computed_it_when_it_is_saved() -> None:
    for save_at_eviction in (False, True):
        world = World(num_blocks=12, max_model_tokens=24, keeps=1.0, save_at_eviction=save_at_eviction)
        owners: dict[bytes, bytes] = {}
        for number, tenant in enumerate((b"a", b"b", b"", b"a")):
            request = replace(make_request(f"r{number}", [number] * 16), tenant=tenant)
            world.add(request)
            while world.engine.has_work():
                owners |= {each.name: each.tenant for each in world.step().named}
            for name in world.engine.names(request)[:2]:
                assert owners.get(name, tenant) == tenant
        assert set(owners.values()) >= {b"a", b"b"}
