"""The engine as its worker sees it."""

from typing import NoReturn

import numpy as np
import pytest

from baton.metrics import WORKER_COUNTERS
from engine.blocks import BlockAccountingError
from engine.engine import Engine
from engine.plan import OnLayer, StepPlan
from engine.requests import EngineLoad, EngineRates, Handover, StepOutput
from tests.engine.stand_in import PAGE, ROOT, World, make_request, shareable_tokens


class BrokenRunner:
    def run(self, plan: StepPlan, on_layer: OnLayer | None = None) -> NoReturn:
        raise RuntimeError("device lost")


def test_an_idle_engine_has_nothing_to_do_and_says_so() -> None:
    world = World()
    assert not world.engine.has_work()
    assert world.engine.step() == StepOutput()
    assert world.runner.plans == []
    world.engine.check_idle()


def test_a_failing_runner_is_seen_by_the_caller() -> None:
    engine = Engine(
        BrokenRunner(),
        num_blocks=4,
        page_size=PAGE,
        max_batch_tokens=8,
        max_running=2,
        max_model_tokens=16,
        shareable_tokens=shareable_tokens,
    )
    engine.add(make_request("a", [1, 2]))
    with pytest.raises(RuntimeError, match="device lost"):
        engine.step()


def test_generations_are_written_where_peers_read_them() -> None:
    generations = np.zeros(4, np.uint64)
    world = World()
    engine = Engine(
        world.runner,
        num_blocks=4,
        page_size=PAGE,
        max_batch_tokens=8,
        max_running=2,
        max_model_tokens=16,
        shareable_tokens=shareable_tokens,
        generations=generations,
    )
    request = make_request("a", [1, 2, 3, 4, 5], Handover.GIVE)
    world.runner.scheduler = None
    world.runner.expect(request)
    engine.add(request)
    (computed,) = engine.step().computed
    assert generations[list(computed.block_ids)].tolist() == list(computed.generations) == [1, 1]


def test_counters_have_registered_names_and_add_up() -> None:
    world = World()
    world.add(make_request("first", list(range(9)), max_tokens=3))
    world.run_to_the_end()
    world.add(make_request("second", list(range(9)), max_tokens=3))
    world.run_to_the_end()
    counters = world.engine.counters
    assert counters.keys() <= WORKER_COUNTERS.keys()
    assert counters["prompt_tokens_computed"] == 9 + 1
    assert counters["prompt_tokens_cached"] == 8
    assert counters["generated_tokens"] == 6
    assert counters["engine_steps"] == len(world.runner.plans) == 6
    assert counters["engine_step_seconds"] > 0


def test_load_tells_what_waits_and_what_runs() -> None:
    world = World(num_blocks=16, max_batch_tokens=8, max_running=2)
    for name, length in (("a", 4), ("b", 11), ("c", 9)):
        world.add(make_request(name, [length] * length, max_tokens=8))
    world.add(make_request("d", [1] * 9, Handover.TAKE))
    world.step()
    blocks = world.allocator.counts()
    assert world.engine.load() == EngineLoad(blocks, running=2, waiting=2, waiting_prefill_tokens=(11 - 4) + 9)
    world.run_to_the_end()


def test_asking_for_cached_tokens_changes_nothing() -> None:
    world = World(num_blocks=4)
    world.add(make_request("a", list(range(11)), max_tokens=1))
    world.run_to_the_end()
    before = (world.allocator.counts(), list(world.allocator._evictable))
    assert world.engine.num_cached_tokens(list(range(11)), ROOT, 11) == 8
    assert world.engine.num_cached_tokens(list(range(7)), ROOT, 7) == 4
    assert world.engine.num_cached_tokens([9, 9, 9, 9], ROOT, 4) == 0
    assert (world.allocator.counts(), list(world.allocator._evictable)) == before


def test_check_idle_notices_a_block_that_a_finished_request_left_behind() -> None:
    world = World()
    world.add(make_request("a", [1, 2, 3], max_tokens=8))
    world.step()
    sequence = world.engine._scheduler._sequences.pop("a")
    with pytest.raises(BlockAccountingError):
        world.engine.check_idle()
    world.engine._scheduler._sequences["a"] = sequence
    world.engine.check_idle()
    sequence.block_ids.append(sequence.block_ids[0])
    with pytest.raises(BlockAccountingError):
        world.engine.check_idle()


@pytest.mark.parametrize("look_ahead", [False, True])
def test_rates_are_those_of_work_and_not_of_rest(monkeypatch: pytest.MonkeyPatch, look_ahead: bool) -> None:
    """Every look at the clock takes 10 ms here; between two requests there are hours."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.010
        return now

    monkeypatch.setattr("time.perf_counter", clock)
    world = World(look_ahead=look_ahead)
    assert world.engine.rates() == EngineRates(0.0, 0.0)
    for number in range(4):
        world.add(
            make_request(f"r{number}", [number] * 12, Handover.TAKE if number % 2 else Handover.NONE, max_tokens=9)
        )
        now += 10_000
        world.run_to_the_end()
        rates = world.engine.rates()
        assert 0.009 < rates.token_s < 0.05
        assert 12 / 0.05 < rates.prompt_tokens_per_s < 12 / 0.009
