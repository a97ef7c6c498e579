"""A step is planned and launched while the one before it is in flight: same streams, whole pool, nothing given away.

The stand-in runs each step as late as it can, and fills what a step writes in vain with garbage.
"""

import itertools

import pytest

from baton.errors import ConfigurationError
from engine.engine import Engine
from engine.plan import PENDING, OnLayer, Sampled, StepPlan, StepResult
from engine.requests import EndReason, EngineRequest, Handover, SamplingParams
from tests.engine.stand_in import PAGE, ROOT, World, make_request, shareable_tokens, undisturbed


def ahead(**options: int) -> World:
    return World(look_ahead=True, **options)


def last_tokens(world: World) -> list[tuple[str, list[int]]]:
    return [(s.request_id, s.token_ids) for s in world.runner.plans[-1].sequences]


def stopping_prompt(at: int) -> tuple[list[int], int]:
    """A prompt and the token that its stream has at index `at` and not before."""
    for first in range(40):
        outputs = undisturbed(make_request("x", [first, 1, 2], max_tokens=20), 64).outputs
        if outputs[at] not in outputs[:at]:
            return [first, 1, 2], outputs[at]
    raise AssertionError("no such prompt")


def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_known() -> None:
    world = ahead()
    stream = world.add(make_request("a", [1, 2, 3], max_tokens=4))
    # 1. The prompt's step and the next are on their way when the first token comes out.
    assert [token.token_id for token in world.step().tokens] == stream.outputs[:1]
    assert len(world.runner.plans) == 2
    assert last_tokens(world) == [("a", [PENDING])]
    # 2. One token a step from then on; the last is not computed, so no step is launched for it.
    assert [len(world.step().tokens) for _ in range(3)] == [1, 1, 1]
    assert world.ended == {"a": EndReason.LENGTH}
    assert len(world.runner.plans) == 4
    assert world.runner.num_in_vain == 0
    world.assert_idle()


def test_chunks_of_a_prompt_follow_each_other_without_waiting() -> None:
    world = ahead(max_batch_tokens=4)
    world.add(make_request("a", list(range(10)), max_tokens=3))
    world.run_to_the_end()
    assert [(s.start, len(s.token_ids)) for plan in world.runner.plans for s in plan.sequences] == [
        (0, 4), (4, 4), (8, 2), (10, 1), (11, 1),
    ]  # fmt: skip
    assert world.runner.num_ahead == 4


def test_a_request_that_arrives_joins_the_next_step() -> None:
    world = ahead()
    world.add(make_request("a", [1, 2, 3], max_tokens=9))
    world.step()
    world.add(make_request("b", [4, 5], max_tokens=9))
    assert [started.request_id for started in world.step().started] == ["b"]
    assert last_tokens(world) == [("a", [PENDING]), ("b", [4, 5])]
    world.run_to_the_end()


def test_what_is_computed_after_a_stop_token_is_dropped_and_its_block_kept_until_then() -> None:
    prompt, stop = stopping_prompt(2)
    world = ahead(num_blocks=4)
    world.add(make_request("a", prompt, max_tokens=9, stop=(stop,)))
    # 1. The stream stops while a step writes position 5, in the second block.
    world.step()
    world.step()
    assert [ended.reason for ended in world.step().ended] == [EndReason.STOP]
    counts = world.allocator.counts()
    assert (counts.held, counts.quarantined) == (0, 1)
    # 2. A taker that would need all blocks waits: what it reserves can be written from outside at any moment.
    world.add(make_request("taken", [9] * 15, Handover.TAKE, max_tokens=1))
    assert world.engine.has_work()
    assert world.step().reserved == []
    # 3. The step is back.
    assert world.runner.num_in_vain == 1
    assert world.step().reserved[0].request_id == "taken"
    world.run_to_the_end()


def test_an_aborted_request_leaves_a_step_in_flight_that_is_waited_for() -> None:
    world = ahead()
    world.add(make_request("a", [1, 2, 3], max_tokens=9))
    world.step()
    assert world.abort("a")
    # 1. Its end is reported, once, and nothing else.
    output = world.step()
    assert [(ended.reason, ended.num_output_tokens) for ended in output.ended] == [(EndReason.ABORTED, 1)]
    assert output.tokens == []
    # 2. The step came back with it; no third was launched.
    assert len(world.runner.plans) == 2
    assert world.runner.num_in_vain == 1
    world.assert_idle()


def test_an_id_is_free_again_at_once_and_nothing_of_its_former_request_reaches_the_new_one() -> None:
    world = ahead()
    former = make_request("a", [1, 2, 3], max_tokens=9)
    world.add(former)
    world.step()
    assert world.engine.abort("a")
    # 1. While a step of the former is in flight the new one is added.
    stream = world.runner.expect(make_request("a", [8, 9], max_tokens=3))
    world.engine.add(stream.request)
    first = world.engine.step()
    assert [(ended.request_id, ended.reason) for ended in first.ended] == [("a", EndReason.ABORTED)]
    world.drafter.known["a"] = []
    # 2. Its stream is its own.
    tokens = list(first.tokens)
    while world.engine.has_work():
        tokens += world.engine.step().tokens
    assert [(token.index, token.token_id) for token in tokens] == list(enumerate(stream.outputs))
    assert world.runner.num_in_vain == 1
    world.engine.check_idle()


def test_a_giver_ends_with_its_token_and_an_aborted_one_leaves_its_lease() -> None:
    world = ahead(max_batch_tokens=8)
    # 1. Nothing is computed after the token of a giver.
    world.add(make_request("given", [1] * 10, Handover.GIVE))
    while "given" not in world.ended:
        world.step()
    assert world.ended["given"] is EndReason.HANDED_OVER
    assert [len(s.token_ids) for plan in world.runner.plans for s in plan.sequences] == [8, 2]
    # 2. One is aborted while a chunk is in flight: the chunk's blocks are nobody's although the lease ends before it.
    world.add(make_request("cut", [2] * 30, Handover.GIVE))
    world.step()
    assert world.abort("cut")
    assert world.release_lease("cut")
    assert world.allocator.counts().quarantined == 2
    world.step()
    assert world.allocator.counts().quarantined == 0
    world.run_to_the_end()


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=4, repetition_penalty=1.1),
        SamplingParams(max_tokens=4, presence_penalty=0.1),
        SamplingParams(max_tokens=4, frequency_penalty=0.1),
        SamplingParams(max_tokens=4, logit_bias=((3, 1.0),)),
        SamplingParams(max_tokens=4, min_tokens=4),
    ],
)
def test_where_the_host_must_see_a_token_before_the_next_the_engine_waits_for_it(sampling: SamplingParams) -> None:
    world = ahead()
    world.add(EngineRequest("a", (1, 2, 3), 3, sampling, ROOT))
    world.add(make_request("b", [4, 5], max_tokens=8))
    while "a" not in world.ended:
        world.step()
    assert world.runner.num_ahead == 0
    # As soon as that request has ended nobody waits any more.
    world.run_to_the_end()
    assert world.runner.num_ahead == 3


def test_guesses_need_known_tokens_and_without_them_the_engine_looks_ahead_again() -> None:
    world = ahead()
    world.add(make_request("a", [1, 2, 3], max_tokens=20))
    world.drafter.pattern = [[True, False]]
    world.step()
    assert len(world.step().tokens) == 2
    assert world.runner.num_ahead == 0
    world.drafter.pattern = []
    world.step()
    world.step()
    assert world.runner.num_ahead == 2
    # With a step in flight, guesses begin after it.
    world.drafter.pattern = [[True, False]]
    assert len(world.step().tokens) == 1
    assert len(world.step().tokens) == 2
    world.run_to_the_end()


def test_while_guesses_are_in_flight_nothing_is_planned_after_them() -> None:
    world = ahead()
    scheduler = world.engine._scheduler
    world.add(make_request("a", [1, 2, 3], max_tokens=20))
    scheduler.apply(scheduler.plan(), StepResult({"a": [Sampled(1)]}))
    scheduler.plan(drafts={"a": [5, 6]})
    assert not scheduler.can_look_ahead()


def test_where_blocks_run_out_the_engine_waits_before_it_sends_somebody_back() -> None:
    world = ahead(num_blocks=5, max_batch_tokens=16)
    for name, prompt in (("old", [1] * 7), ("young", [2] * 8)):
        world.add(make_request(name, prompt, max_tokens=12))
    world.run_to_the_end()
    assert world.engine.counters["preemptions"] >= 1
    assert world.runner.num_ahead > 0
    assert world.runner.num_in_vain == 0


def test_the_source_of_a_copy_stays_until_the_copy_is_made_though_its_request_is_gone() -> None:
    world = ahead(num_blocks=4, max_running=2)
    world.add(make_request("before", list(range(2 * PAGE)), max_tokens=1))
    world.run_to_the_end()
    # 1. A cached prompt: its second block is copied by a step that is in flight when the request is aborted.
    world.add(make_request("first", [7], max_tokens=9))
    world.step()
    world.add(make_request("copies", list(range(2 * PAGE)), max_tokens=9))
    world.step()
    assert len(world.runner.plans[-1].copies) == 1
    assert world.abort("copies")
    # 2. Source and target are kept; one block is left.
    assert world.allocator.counts().quarantined == 2
    world.step()
    assert world.allocator.counts().quarantined == 0
    world.run_to_the_end()


def test_a_line_that_waits_for_blocks_is_served_when_the_step_in_flight_gives_some_back() -> None:
    world = ahead(num_blocks=4)
    world.add(make_request("a", [1] * 12, max_tokens=2))
    world.step()
    # The next step is the last of "a": it needs no other, and "b" does not fit beside it.
    world.add(make_request("b", [2] * 14, max_tokens=2))
    world.run_to_the_end()
    assert list(world.ended) == ["a", "b"]


def test_seconds_in_which_two_steps_overlap_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("engine.engine.time.perf_counter", lambda: float(next(ticks)))
    world = ahead()
    world.add(make_request("a", [1, 2, 3], max_tokens=9))
    world.run_to_the_end()
    assert world.runner.num_ahead == 8
    assert 0 < world.engine.counters["engine_step_seconds"] < next(ticks)


class WaitingRunner:
    def run(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult:
        return StepResult({})


def test_a_runner_that_cannot_launch_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="WaitingRunner"):
        Engine(
            WaitingRunner(),
            num_blocks=4,
            page_size=PAGE,
            max_batch_tokens=8,
            max_running=2,
            max_model_tokens=16,
            shareable_tokens=shareable_tokens,
            look_ahead=True,
        )


def test_blocks_are_announced_group_of_layers_by_group_while_the_next_step_is_in_flight() -> None:
    world = World(look_ahead=True, early=True, max_batch_tokens=8)
    world.add(make_request("a", list(range(1, 20)), Handover.GIVE))
    output = world.step()
    assert world.runner.num_ahead == 1
    assert world.announced_layers == [("a", 2, 2), ("a", 2, 4), ("a", 2, 5)]
    assert output.computed == []
    world.step()
    (computed,) = world.step().computed
    assert world.announced_layers[3:] == [("a", blocks, layers) for blocks in (4, 5) for layers in (2, 4, 5)] + [
        ("a", 5, 5)
    ]
    assert (computed.block_ids, computed.num_tokens, computed.last) == ((), 19, True)
    world.run_to_the_end()


def test_a_request_that_ends_while_its_step_is_in_flight_announces_nothing_more() -> None:
    world = World(look_ahead=True, early=True, max_batch_tokens=8)
    world.add(make_request("a", list(range(1, 20)), Handover.GIVE))
    world.step()
    world.abort("a")
    world.step()
    assert world.announced_layers == [("a", 2, 2), ("a", 2, 4), ("a", 2, 5)]
    assert world.leases == {"a"}
    world.run_to_the_end()


def test_a_request_of_which_no_layer_was_announced_leaves_no_lease() -> None:
    """Its prompt but for one token is cached: a step of single tokens tells of no layers."""
    world = World(look_ahead=True, early=True, max_batch_tokens=8)
    world.add(make_request("warm", list(range(4)), max_tokens=1))
    world.run_to_the_end()
    world.add(make_request("a", list(range(4)), Handover.GIVE, max_tokens=1))
    world.run_to_the_end()
    assert world.announced_layers == []
    assert world.allocator.counts().leased == 0
