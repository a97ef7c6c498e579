"""Requests whose beginning another worker should have, and leases on what is cached here for others to fetch."""

from dataclasses import replace

import pytest

from baton.block_names import block_name
from engine.requests import Elsewhere, EngineRequest, Handover
from tests.engine.stand_in import PAGE, ROOT, World, make_request

PROMPT = list(range(18))
NUM_FULL = len(PROMPT) // PAGE


def elsewhere(
    request_id: str, num_tokens: int = len(PROMPT), handover: Handover = Handover.NONE, wait_s: float = 0.0
) -> EngineRequest:
    return replace(make_request(request_id, PROMPT, handover), elsewhere=Elsewhere(num_tokens, wait_s, 1e-9))


def names_of(tokens: list[int]) -> list[bytes]:
    names: list[bytes] = []
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
        names.append(block_name(names[-1] if names else ROOT, tokens[start : start + PAGE]))
    return names


@pytest.mark.parametrize("handover", [Handover.NONE, Handover.GIVE])
def test_what_another_worker_has_is_fetched_and_the_rest_is_computed(handover: Handover) -> None:
    world = World()
    world.add(elsewhere("r", handover=handover))
    output = world.step()
    (reserved,) = output.reserved
    assert (reserved.num_cached_blocks, reserved.stored, reserved.from_peer) == (0, (), False)
    assert reserved.elsewhere == tuple(names_of(PROMPT))
    assert not output.tokens, "it waits"
    world.deliver("r", 3 * PAGE)
    assert world.receive("r", 3 * PAGE, with_first_token=False)
    world.run_to_the_end()
    counters = world.engine.counters
    assert (counters["prompt_tokens_fetched"], counters["prompt_tokens_received"]) == (3 * PAGE, 0)
    assert counters["prompt_tokens_computed"] == len(PROMPT) - 3 * PAGE


def test_when_nothing_comes_everything_is_computed_and_nobody_is_asked_again() -> None:
    world = World()
    world.add(elsewhere("r"))
    world.step()
    world.scribble("r")
    assert world.receive("r", 0, with_first_token=False)
    world.run_to_the_end()
    assert world.engine.counters["prompt_tokens_computed"] == len(PROMPT)


def test_what_is_here_or_stored_comes_first() -> None:
    world = World(keeps=1.0, num_blocks=8)
    world.add(make_request("first", PROMPT[: 2 * PAGE + 1]))
    world.run_to_the_end()
    world.add(elsewhere("cached"))
    (reserved,) = world.step().reserved
    assert reserved.num_cached_blocks == 2
    assert reserved.elsewhere == tuple(names_of(PROMPT)[2:])
    assert world.receive("cached", 2 * PAGE, with_first_token=False)
    world.run_to_the_end()
    world.add(make_request("pushes out", [30, *range(26)]))
    world.run_to_the_end()
    for name in names_of(PROMPT)[2:]:
        del world.store.kv[name]
    world.add(elsewhere("stored"))
    (reserved,) = world.step().reserved
    assert reserved.num_cached_blocks == 0
    assert (reserved.stored, reserved.elsewhere) == (tuple(names_of(PROMPT)[:2]), tuple(names_of(PROMPT)[2:]))
    world.run_to_the_end()


@pytest.mark.parametrize(("wait_s", "asks"), [(0.5, True), (3.0, False), (100.0, False)])
def test_nobody_is_asked_where_computing_is_sooner(wait_s: float, asks: bool) -> None:
    """Of eight tokens that another worker should have, computing takes two seconds."""
    world = World()
    world.engine._scheduler.sources.block_compute_s = 1.0
    world.add(elsewhere("r", 2 * PAGE, wait_s=wait_s))
    output = world.step()
    assert bool(output.reserved) == asks
    if asks:
        assert output.reserved[0].compute_s == 2.0
    world.run_to_the_end()


def test_nobody_is_asked_for_what_is_here() -> None:
    world = World()
    world.add(make_request("first", PROMPT))
    world.run_to_the_end()
    world.add(elsewhere("again"))
    assert not world.step().reserved
    world.run_to_the_end()


def test_a_taker_leaves_it_to_its_giver() -> None:
    world = World()
    world.add(elsewhere("r", handover=Handover.TAKE))
    (reserved,) = world.step().reserved
    assert reserved.from_peer
    assert not reserved.elsewhere
    world.run_to_the_end()


def test_blocks_of_an_aborted_fetch_stay_until_nothing_writes_them() -> None:
    world = World()
    world.add(elsewhere("r"))
    world.step()
    assert world.abort("r")
    assert world.allocator.counts().quarantined == NUM_FULL + 1
    world.scribble("r")
    assert world.resolve("r")
    world.run_to_the_end()


def test_a_preempted_request_asks_nobody_a_second_time() -> None:
    world = World(num_blocks=12, max_running=2)
    world.add(make_request("old", [5] * 20, max_tokens=20))
    world.add(replace(make_request("r", PROMPT, max_tokens=20), elsewhere=Elsewhere(len(PROMPT), 0.0, 1e-9)))
    seen = 0
    for _ in range(200):
        seen += sum(bool(reserved.elsewhere) for reserved in world.step().reserved)
        if "r" in world.reserved:
            assert world.receive("r", 0, with_first_token=False)
        if not world.engine.has_work():
            break
    assert world.engine.counters["preemptions"] > 0
    assert seen == 1
    world.run_to_the_end()


# -- Leases on what is cached ------------------------------------------------------------------------------------------


def test_leased_blocks_keep_their_content_until_they_are_released() -> None:
    world = World(num_blocks=12)
    world.add(make_request("first", PROMPT))
    world.run_to_the_end()
    names = names_of(PROMPT)
    assert world.engine.num_held([*names, b"unknown"]) == NUM_FULL
    leased = world.engine.lease("reader", [*names, b"unknown"])
    assert len(leased.block_ids) == NUM_FULL
    assert world.allocator.counts().leased == NUM_FULL
    before = dict(world.runner.kv)
    for number in range(3):  # each would push everything else out
        world.add(make_request(f"other {number}", [30 + number, *range(20)]))
        while f"other {number}" not in world.ended:
            world.step()
    assert tuple(world.allocator.generations[list(leased.block_ids)].tolist()) == leased.generations
    for block in leased.block_ids:
        assert [world.runner.kv[block, offset] for offset in range(PAGE)] == [
            before[block, offset] for offset in range(PAGE)
        ]
    assert world.engine.num_held(names) == NUM_FULL
    assert world.engine.release_lease("reader")
    assert not world.engine.release_lease("reader")
    world.run_to_the_end()


def test_a_lease_that_expires_is_quarantined_until_its_reader_is_resolved() -> None:
    world = World()
    world.add(make_request("first", PROMPT))
    world.run_to_the_end()
    world.engine.lease("reader", names_of(PROMPT))
    assert world.engine.quarantine_lease("reader")
    assert world.allocator.counts().quarantined == NUM_FULL
    assert world.engine.resolve("reader")
    world.run_to_the_end()


def test_readers_get_half_of_the_pool_at_most_and_a_used_id_nothing() -> None:
    world = World(num_blocks=6)
    world.add(make_request("first", PROMPT, max_tokens=1))
    world.run_to_the_end()
    names = names_of(PROMPT)
    assert len(world.engine.lease("reader", names).block_ids) == 3
    assert world.engine.lease("reader", names).block_ids == ()
    assert world.engine.lease("another", names).block_ids == ()
    assert world.engine.release_lease("reader")
    assert not world.engine.release_lease("another")
    world.run_to_the_end()
