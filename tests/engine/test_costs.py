"""The cost table: what it answers between its measurements, and that no file makes it answer nonsense."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import ConfigurationError
from engine.costs import (
    CostTable,
    DecodeCost,
    Errors,
    Fit,
    MixedCost,
    ModelFacts,
    PrefillCost,
    SchedulerCost,
    StepShape,
    TransferCost,
)
from engine.measuring import (
    BudgetTooSmall,
    Room,
    decode_shapes,
    measure_steps,
    mixed_shapes,
    plan_of,
    prefill_shapes,
)
from engine.plan import OnLayer, StepPlan, StepResult

LAW = Fit(step=2e-3, token=1e-4, row=1e-5, position=1e-8, pair=1e-9, errors=Errors(0.0, 0.0, 0.0))
"""The machine of these tests: what a step of any shape takes there."""


def table(**changes: Any) -> CostTable:
    def seconds(shape: StepShape) -> float:
        return LAW.seconds(shape)

    fields: dict[str, Any] = {
        "machine": "m", "cpu": "c", "threads": 2, "kernels": "k", "dtype": "bfloat16", "page_size": 16,
        "date": "2026-01-01T00:00:00+00:00", "version": "0", "commit": "",
        "model": ModelFacts("tiny", 1000, 2, 64),
        "prefill": [
            PrefillCost(n, c, seconds(StepShape(chunks=((n, c),)))) for n in (16, 64, 256) for c in (0, 512, 2048)
        ],
        "decode": [
            DecodeCost(b, c, seconds(StepShape(b, c))) for b in (1, 8, 32) for c in (16, 128, 512) if b * c <= 8192
        ],
        "mixed": [MixedCost(8, 128, 64, 512, seconds(StepShape(8, 128, ((64, 512),))))],
        "scheduler": [SchedulerCost(1, 1e-4), SchedulerCost(8, 2e-4)],
        "transfer": [TransferCost("shm", 1 << 20, 1e-3), TransferCost("shm", 1 << 22, 4e-3)],
        "read_bytes_per_s": 3e10, "flops": 4e11, "noise": Errors(0.01, 0.02, 0.03),
    }  # fmt: skip
    return CostTable(**{**fields, **changes})


COSTS = table()


def test_a_measured_step_is_answered_as_measured() -> None:
    costs = table()
    for cost in (*costs.prefill, *costs.decode):
        assert costs.estimate(cost.shape()) == pytest.approx(cost.seconds)


def test_between_measured_steps_the_answer_lies_on_the_line_between_them() -> None:
    costs = table()
    assert costs.decode_s(8, 70) == pytest.approx((costs.decode_s(8, 16) * 58 + costs.decode_s(8, 128) * 54) / 112)
    assert costs.decode_s(20, 128) == pytest.approx((costs.decode_s(8, 128) + costs.decode_s(32, 128)) / 2)
    assert costs.prefill_s(160, 0) == pytest.approx((costs.prefill_s(64, 0) + costs.prefill_s(256, 0)) / 2)
    assert costs.scheduler_s(4) == pytest.approx(1e-4 + 3e-4 / 7)
    assert costs.transfer_s("shm", 2 << 20) == pytest.approx(2e-3)


def test_beyond_what_was_measured_the_last_slope_goes_on_and_below_it_the_smallest_counts() -> None:
    costs = table()
    assert costs.decode_s(32, 512) == pytest.approx(LAW.seconds(StepShape(32, 512)), rel=1e-3)  # the pool ended before
    assert costs.decode_s(64, 128) > costs.decode_s(32, 128)
    assert costs.transfer_s("shm", 1) == pytest.approx(1e-3)
    assert costs.transfer_s("shm", 1 << 23) == pytest.approx(8e-3)
    assert costs.prefill_s(1, 16) == costs.decode_s(1, 16), "a chunk of one token is a decode"


def test_a_mixed_step_costs_its_decodes_and_what_its_prompts_add() -> None:
    costs = table()
    shape = StepShape(8, 128, ((64, 512), (16, 0)))
    assert costs.estimate(shape) == pytest.approx(LAW.seconds(shape), rel=0.05)
    assert costs.mixed_errors.max < 0.05
    assert costs.estimate(StepShape()) == 0.0


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 100), context=st.integers(0, 5000),
    chunks=st.lists(st.tuples(st.integers(2, 1000), st.integers(0, 5000)), max_size=3),
)  # fmt: skip
def test_no_step_is_free_and_more_context_is_never_cheaper(
    batch: int, context: int, chunks: list[tuple[int, int]]
) -> None:
    costs = COSTS
    seconds = costs.estimate(StepShape(batch, context, tuple(chunks)))
    assert math.isfinite(seconds)
    assert seconds > 0 or not (batch or chunks)
    more = StepShape(batch, context + 100, tuple((tokens, before + 100) for tokens, before in chunks))
    assert costs.estimate(more) >= seconds - 1e-12


def test_the_fit_finds_the_law_that_made_the_measurements() -> None:
    fit = table().fit
    for shape in (StepShape(4, 100), StepShape(chunks=((100, 1000),)), StepShape(2, 2000, ((300, 0),))):
        assert fit.seconds(shape) == pytest.approx(LAW.seconds(shape), rel=1e-3)
    assert fit.errors.max < 1e-3


def test_a_shape_is_read_off_the_plan_of_the_scheduler() -> None:
    shape = StepShape(3, 40, ((20, 100),))
    assert StepShape.of(plan_of(shape, 16)) == shape


def test_a_saved_table_is_the_same_when_loaded(tmp_path: Path) -> None:
    costs = table()
    path = tmp_path / "costs.json"
    costs.save(path)
    loaded = CostTable.load(path)
    assert loaded == costs
    assert loaded.estimate(StepShape(5, 99, ((77, 300),))) == costs.estimate(StepShape(5, 99, ((77, 300),)))
    assert [each.name for each in tmp_path.iterdir()] == ["costs.json"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": 2}, "format"),
        ({"prefill": []}, "prefill"),
        ({"decode": 7}, "decode"),
        ({"decode": [{"batch": 1, "seconds": 1.0}]}, r"decode\[0\]"),
        ({"decode": [{"batch": 1, "context": 1, "seconds": 0.0}]}, "seconds"),
        ({"decode": [{"batch": 1, "context": 1, "seconds": float("nan")}]}, "seconds"),
        ({"decode": [{"batch": "1", "context": 1, "seconds": 1.0}]}, "batch"),
        ({"transfer": [{"lane": 3, "bytes": 1, "seconds": 1.0}]}, "lane"),
        ({"model": {"name": "x"}}, "model"),
        ({"cpu": None}, "cpu"),
        ({"threads": True}, "threads"),
        ({"flops": -1.0}, "flops"),
    ],
)
def test_a_file_that_is_no_cost_table_is_refused_with_a_reason(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    path = tmp_path / "costs.json"
    table().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigurationError, match=complaint) as raised:
        CostTable.load(path)
    assert "costs.json" in str(raised.value)


def test_a_missing_or_torn_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.json"):
        CostTable.load(tmp_path / "nowhere.json")
    torn = tmp_path / "torn.json"
    table().save(torn)
    torn.write_text(torn.read_text()[:200])
    with pytest.raises(ConfigurationError, match=r"torn\.json is not JSON"):
        CostTable.load(torn)
    fields = json.loads(json.dumps(dataclasses.asdict(table()))) | {"format": 1}
    del fields["kernels"]
    torn.write_text(json.dumps(fields))
    with pytest.raises(ConfigurationError, match="'kernels' is missing"):
        CostTable.load(torn)


def test_an_unmeasured_lane_is_named() -> None:
    with pytest.raises(ConfigurationError, match="'tcp'"):
        table().transfer_s("tcp", 1)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 600), running=st.integers(1, 80), longest=st.integers(64, 5000), blocks=st.integers(8, 900)
)
def test_every_shape_to_be_measured_fits_the_engine(tokens: int, running: int, longest: int, blocks: int) -> None:
    room = Room(max(tokens, running), running, min(longest, 16 * blocks), blocks, 16)
    shapes = [*prefill_shapes(room), *decode_shapes(room), *mixed_shapes(room)]
    assert len(set(shapes)) == len(shapes)
    assert any(shape.batch for shape in shapes)
    assert any(shape.chunks for shape in shapes)
    for shape in shapes:
        assert room.holds(shape), shape
        used = [block for sequence in plan_of(shape, 16).sequences for block in sequence.block_ids]
        assert len(set(used)) == len(used) <= blocks


class _Clockwork:
    """A runner whose steps are counted."""

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []

    def run(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult:
        self.plans.append(plan)
        return StepResult({})


def test_every_shape_is_measured_several_times_and_in_turns() -> None:
    runner, shapes = _Clockwork(), [StepShape(1, 16), StepShape(2, 16), StepShape(chunks=((32, 0),))]
    lines: list[str] = []
    measured = measure_steps(runner, shapes, 16, 30.0, lines.append)
    assert [each.shape for each in measured] == shapes
    assert [StepShape.of(plan) for plan in runner.plans[:6]] == shapes * 2
    assert all(len(each.deviations) >= 2 and each.seconds > 0 for each in measured)
    assert lines[1] == "steps: 0.7 rounds of 3 shapes, 0.0 of 30.0 s"


def test_a_budget_that_is_too_small_is_said_with_what_would_do() -> None:
    with pytest.raises(BudgetTooSmall) as raised:
        measure_steps(_Clockwork(), [StepShape(1, 16)] * 50, 16, 0.0, lambda line: None)
    assert raised.value.needed_s > 0
