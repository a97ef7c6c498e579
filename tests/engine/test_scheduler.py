"""Batching, chunks, the prefix cache, preemption and endings of requests that run on one worker.

The stand-in world checks at every step that KV read is right, that blocks written are private, and the tokens.
"""

import pytest

from baton.block_names import root_name
from baton.errors import ConfigurationError, InvalidRequestError
from engine.blocks import BlockAllocator
from engine.limits import SchedulerLimits
from engine.plan import Sampled, StepResult
from engine.requests import EndReason, EngineRequest, Handover, SamplingParams
from engine.scheduler import EngineFull, Scheduler
from tests.engine.stand_in import LONG_PROMPT, PAGE, World, make_request, undisturbed


def shape(world: World) -> list[tuple[str, int, int, bool]]:
    """(request, start, tokens, samples) of the last plan."""
    return [(s.request_id, s.start, len(s.token_ids), s.sample is not None) for s in world.runner.plans[-1].sequences]


def test_a_request_from_arrival_to_end() -> None:
    world = World(num_blocks=4)
    # 1. It waits and holds nothing.
    stream = world.add(make_request("a", list(range(6)), max_tokens=3))
    assert world.engine.load().waiting_prefill_tokens == 6
    # 2. The first step computes the prompt and samples.
    output = world.step()
    assert [(started.request_id, started.num_cached_tokens) for started in output.started] == [("a", 0)]
    assert shape(world) == [("a", 0, 6, True)]
    assert (world.engine.load().running, world.engine.load().waiting) == (1, 0)
    # 3. One token a step; the third block is taken only when position 8 is computed.
    world.step()
    assert world.allocator.counts().held == 2
    output = world.step()
    # 4. The pool is whole, the scheduler is empty.
    assert [(ended.reason, ended.num_output_tokens) for ended in output.ended] == [(EndReason.LENGTH, 3)]
    assert world.outputs["a"] == stream.outputs
    world.assert_idle()


def test_decodes_go_first_and_prompt_chunks_fill_the_budget() -> None:
    world = World(max_batch_tokens=10)
    world.add(make_request("short", [1, 2, 3], max_tokens=9))
    world.step()
    world.add(make_request("long", list(range(14)), max_tokens=2))
    world.add(make_request("next", [7, 8, 9, 10], max_tokens=2))
    world.step()
    assert shape(world) == [("short", 3, 1, True), ("long", 0, 9, False)]
    world.step()
    assert shape(world) == [("short", 4, 1, True), ("long", 9, 5, True), ("next", 0, 4, True)]
    world.step()
    assert shape(world) == [("short", 5, 1, True), ("long", 14, 1, True), ("next", 4, 1, True)]
    world.run_to_the_end()


def test_beside_running_requests_prompts_get_what_the_pace_allows_and_alone_the_whole_batch() -> None:
    world = World(max_batch_tokens=10)
    scheduler = world.engine._scheduler
    world.add(make_request("long", list(range(14)), max_tokens=2))
    plan = scheduler.plan(prompt_tokens=3)
    assert [len(sequence.token_ids) for sequence in plan.sequences] == [10]
    scheduler.apply(plan, StepResult({}))
    world.add(make_request("short", [1], max_tokens=9))
    plan = scheduler.plan(prompt_tokens=3)
    assert [(s.request_id, len(s.token_ids)) for s in plan.sequences] == [("short", 1), ("long", 4)]
    scheduler.apply(plan, StepResult({"long": [Sampled(1)], "short": [Sampled(1)]}))
    world.add(make_request("next", list(range(20, 29)), max_tokens=2))
    plan = scheduler.plan(prompt_tokens=3)
    assert [(s.request_id, len(s.token_ids)) for s in plan.sequences] == [("long", 1), ("short", 1), ("next", 3)]


def test_every_plan_stays_within_budget_and_number_of_running_requests() -> None:
    world = World(num_blocks=64, max_batch_tokens=7, max_running=3)
    for number in range(8):
        world.add(make_request(f"r{number}", [number] * (3 * number + 1), max_tokens=5))
    world.run_to_the_end()
    assert max(plan.num_tokens for plan in world.runner.plans) == 7
    assert max(len(plan.sequences) for plan in world.runner.plans) == 3


def test_a_second_prompt_computes_only_what_the_cache_lacks() -> None:
    world = World()
    world.add(make_request("first", list(range(10))))
    world.run_to_the_end()
    world.add(make_request("second", [*range(8), 99]))
    output = world.step()
    assert output.started[0].num_cached_tokens == 8
    assert shape(world) == [("second", 8, 1, True)]
    assert world.engine.counters["prompt_tokens_cached"] == 8
    world.run_to_the_end()


def test_a_prompt_shares_blocks_with_one_that_is_still_running() -> None:
    world = World()
    world.add(make_request("first", list(range(9)), max_tokens=8))
    world.step()
    held = world.allocator.counts().held
    world.add(make_request("second", list(range(9)), max_tokens=8))
    world.step()
    assert world.allocator.counts().held == held + 1
    world.run_to_the_end()


def test_a_prompt_that_is_cached_whole_copies_the_block_it_must_write() -> None:
    world = World()
    # 1. Another request has the whole prompt and is still reading it.
    world.add(make_request("first", list(range(8)), max_tokens=20))
    world.step()
    # 2. The second computes its last token again, in a copy.
    world.add(make_request("second", list(range(8)), max_tokens=20))
    output = world.step()
    assert output.started[0].num_cached_tokens == 7
    assert ("second", 7, 1, True) in shape(world)
    ((source, target),) = world.runner.plans[-1].copies
    assert source != target
    assert world.engine.counters["blocks_copied_on_write"] == 1
    # 3. A third finds the original, not the copy; everybody's tokens are right.
    world.add(make_request("third", list(range(8)), max_tokens=2))
    world.step()
    assert world.runner.plans[-1].copies[0][0] == source
    world.run_to_the_end()


def test_a_whole_cached_prompt_runs_even_where_the_copy_has_no_room() -> None:
    world = World(num_blocks=3)
    world.add(make_request("first", list(range(12)), max_tokens=1))
    world.run_to_the_end()
    world.add(make_request("second", list(range(12)), max_tokens=1))
    world.step()
    assert shape(world) == [("second", 8, 4, True)]
    assert world.runner.plans[-1].copies == []
    world.run_to_the_end()


def test_the_source_of_a_copy_is_not_handed_out_before_the_copy_is_made() -> None:
    world = World(num_blocks=5, max_batch_tokens=16)
    world.add(make_request("first", list(range(8)), max_tokens=1))
    world.run_to_the_end()
    world.add(make_request("second", list(range(8)), max_tokens=1))
    world.add(make_request("third", [9] * 12, max_tokens=1))
    world.step()
    assert [s.request_id for s in world.runner.plans[-1].sequences] == ["second"]
    assert len(world.runner.plans[-1].copies) == 1
    world.run_to_the_end()


def test_two_copies_of_one_block_can_be_made_in_the_same_step() -> None:
    world = World()
    world.add(make_request("first", list(range(8)), max_tokens=1))
    world.run_to_the_end()
    for name in ("second", "third"):
        world.add(make_request(name, list(range(8)), max_tokens=3))
    world.step()
    (one, other) = world.runner.plans[-1].copies
    assert one[0] == other[0]
    world.run_to_the_end()


def test_output_tokens_are_cached_for_the_next_turn_of_a_conversation() -> None:
    world = World()
    stream = world.add(make_request("first", [1, 2, 3], max_tokens=6))
    world.run_to_the_end()
    world.add(make_request("second", [1, 2, 3, *stream.outputs]))
    assert world.step().started[0].num_cached_tokens == 8
    world.run_to_the_end()


def test_kv_that_depends_on_the_prompts_length_is_not_shared() -> None:
    world = World()
    prompt = list(range(LONG_PROMPT + 6))
    world.add(make_request("first", prompt))
    world.run_to_the_end()
    assert world.engine.num_cached_tokens(prompt, make_request("x", [1]).cache_root, len(prompt)) == 8
    world.add(make_request("second", [*prompt, 5]))
    assert world.step().started[0].num_cached_tokens == 8
    world.run_to_the_end()


def test_tenants_do_not_share() -> None:
    world = World()
    world.add(make_request("first", list(range(12))))
    world.run_to_the_end()
    world.add(make_request("second", list(range(12)), cache_root=root_name("stand-in", cache_salt="other")))
    assert world.step().started[0].num_cached_tokens == 0
    world.run_to_the_end()


def test_when_blocks_run_out_the_latest_arrival_gives_way_and_resumes_right() -> None:
    world = World(num_blocks=5, max_batch_tokens=16)
    # 1. Two requests fill the pool.
    for name, prompt in (("old", [1] * 7), ("young", [2] * 8)):
        world.add(make_request(name, prompt, max_tokens=12))
    world.step()
    assert world.allocator.counts().held == 4
    # 2. Both grow, the younger first: it is sent back and the older goes on.
    world.step()
    assert world.allocator.counts().held == 5
    world.step()
    assert world.engine.counters["preemptions"] == 1
    assert world.engine.load().waiting_prefill_tokens == 8 + 2
    assert [s.request_id for s in world.runner.plans[-1].sequences] == ["old"]
    # 3. The younger starts again from what it had, is reported as started only once, and both end right.
    world.run_to_the_end()
    assert world.ended == {"old": EndReason.LENGTH, "young": EndReason.LENGTH}


def test_a_preempted_request_goes_before_those_that_never_ran() -> None:
    world = World(num_blocks=5, max_batch_tokens=12, max_running=2)
    for name in ("old", "young", "waiting"):
        world.add(make_request(name, [len(name)] * 8, max_tokens=12))
    while not world.ended:
        world.step()
    assert world.engine.counters["preemptions"] >= 1
    assert world.ended.keys() == {"old"}
    assert world.started == ["old", "young"]
    world.run_to_the_end()
    assert list(world.ended) == ["old", "young", "waiting"]


def test_a_small_request_does_not_pass_a_large_one_that_waits_for_room() -> None:
    world = World(num_blocks=8)
    world.add(make_request("running", [1] * 20, max_tokens=3))
    world.step()
    world.step()
    world.add(make_request("large", [2] * 24, max_tokens=2))
    world.add(make_request("small", [3], max_tokens=1))
    world.run_to_the_end()
    assert world.started == ["running", "large", "small"]


def test_many_requests_in_a_tiny_pool_all_end_right() -> None:
    world = World(num_blocks=7, max_running=8, max_batch_tokens=8)
    for number in range(12):
        world.add(make_request(f"r{number}", [number % 3] * (number % 5 + 1), max_tokens=20))
    world.run_to_the_end()
    assert len(world.ended) == 12
    assert world.engine.counters["preemptions"] > 5


def test_a_later_attempt_goes_on_at_the_next_index() -> None:
    world = World()
    stream = world.add(make_request("retry", [5, 6, 7], max_tokens=6, num_delivered=4))
    world.step()
    assert shape(world) == [("retry", 0, 7, True)]
    assert world.outputs["retry"] == stream.outputs[:5]
    world.run_to_the_end()
    assert world.outputs["retry"] == stream.outputs


def test_a_stop_token_is_reported_and_ends_the_stream() -> None:
    prompt = [3, 1, 2]
    outputs = undisturbed(make_request("x", prompt, max_tokens=5), 64).outputs
    world = World()
    world.add(make_request("stops", prompt, max_tokens=5, stop=(outputs[2],)))
    world.run_to_the_end()
    assert world.ended["stops"] is EndReason.STOP
    assert world.outputs["stops"] == outputs[: outputs.index(outputs[2]) + 1]


def test_a_stop_token_counts_only_once_min_tokens_are_out() -> None:
    prompt = [3, 1, 2]
    outputs = undisturbed(make_request("x", prompt, max_tokens=5), 64).outputs
    world = World()
    world.add(make_request("goes on", prompt, max_tokens=5, min_tokens=5, stop=tuple(outputs[:4])))
    world.run_to_the_end()
    assert world.outputs["goes on"] == outputs


def test_the_models_context_ends_a_stream() -> None:
    world = World(max_model_tokens=10)
    world.add(make_request("long", [1] * 7, max_tokens=100))
    world.run_to_the_end()
    assert world.ended["long"] is EndReason.LENGTH
    assert len(world.outputs["long"]) == 3


@pytest.mark.parametrize(
    ("token_ids", "num_prompt_tokens", "max_tokens", "handover", "param"),
    [
        ((), 0, 4, Handover.NONE, "prompt"),
        ((1, 2), 0, 4, Handover.NONE, "prompt"),
        ((1, 2), 3, 4, Handover.NONE, "prompt"),
        ((1,) * 40, 40, 4, Handover.NONE, "prompt"),
        ((1, 2), 2, 0, Handover.NONE, "max_tokens"),
        ((1, 2, 3), 2, 1, Handover.NONE, "max_tokens"),
        ((1,) * 20, 20, 6, Handover.NONE, "max_tokens"),
        ((1,) * 20, 20, 6, Handover.TAKE, "max_tokens"),
        ((1,) * 25, 25, 1, Handover.GIVE, "max_tokens"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(
    token_ids: tuple[int, ...], num_prompt_tokens: int, max_tokens: int, handover: Handover, param: str
) -> None:
    world = World(num_blocks=6, max_model_tokens=40)
    sampling = SamplingParams(max_tokens=max_tokens)
    with pytest.raises(InvalidRequestError) as refusal:
        world.engine.add(EngineRequest("bad", token_ids, num_prompt_tokens, sampling, b"root", handover))
    assert refusal.value.param == param
    world.assert_idle()


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "handover"),
    [(20, 5, Handover.NONE), (20, 5, Handover.TAKE), (24, 99, Handover.GIVE), (24, 1, Handover.TAKE)],
)
def test_what_just_fits_the_pool_is_served(num_prompt_tokens: int, max_tokens: int, handover: Handover) -> None:
    world = World(num_blocks=6, max_model_tokens=40)
    world.add(make_request("fits", [1] * num_prompt_tokens, handover, max_tokens=max_tokens))
    world.run_to_the_end()


def test_an_id_in_use_is_refused_and_a_full_line_says_so() -> None:
    world = World(max_waiting=2)
    world.add(make_request("a", [1]))
    with pytest.raises(InvalidRequestError):
        world.engine.add(make_request("a", [1]))
    world.add(make_request("b", [1]))
    with pytest.raises(EngineFull):
        world.engine.add(make_request("c", [1]))
    world.run_to_the_end()


def test_a_budget_that_would_starve_running_requests_is_refused() -> None:
    with pytest.raises(ConfigurationError):
        Scheduler(BlockAllocator(8), SchedulerLimits(PAGE, 3, 4, 64), lambda n: n)


def test_aborting_a_waiting_or_running_request_frees_its_blocks() -> None:
    world = World(max_running=1)
    # 1. One runs in the middle of its prompt, one waits.
    world.add(make_request("running", [1] * 30, max_tokens=8))
    world.add(make_request("waiting", [2] * 30, max_tokens=8))
    world.step()
    # 2. Both are aborted, twice; unknown ids too.
    assert world.abort("waiting")
    assert world.abort("running")
    assert not world.abort("running")
    assert not world.abort("nobody")
    # 3. Both ends are reported once, though nothing is left to compute.
    num_plans = len(world.runner.plans)
    assert world.engine.has_work()
    assert [(ended.request_id, ended.reason) for ended in world.step().ended] == [
        ("waiting", EndReason.ABORTED),
        ("running", EndReason.ABORTED),
    ]
    assert len(world.runner.plans) == num_plans
    # 4. The pool is whole, the scheduler is empty.
    world.assert_idle()
