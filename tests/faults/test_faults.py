"""A sample of the matrix, the short form of the soak, and that the harness sees what it says it sees."""

import time

import pytest
import uvloop

from tests.faults.matrix import ONE_EACH, TWO_EACH, cells, run_cases, sample, table
from tests.faults.soak import soak

NUM_CASES, SEED, SECONDS = 10, 7, 40.0


@pytest.mark.slow
@pytest.mark.parametrize("fleet", [TWO_EACH, ONE_EACH], ids=["two of each", "one of each"])
def test_a_sample_of_the_matrix_costs_pauses_and_nothing_else(fleet: tuple[tuple[str, int], ...]) -> None:
    planned = [sample(fleet, NUM_CASES, SEED)]
    results = uvloop.run(run_cases(planned, SEED, lambda result: None, time.monotonic() + SECONDS))
    print(table(results))
    assert [(result.seed, result.wrong, result.lost, result.not_kept) for result in results if result.bad] == []
    assert any(result.proven for result in results)


@pytest.mark.slow
def test_nothing_grows_while_workers_come_and_go() -> None:
    result = uvloop.run(soak(45.0, seed=3))
    print(result.show())
    assert result.trouble == []
    assert result.growth() == []
    assert result.faults.total() >= 3
    assert result.num_answers >= 20


def test_the_matrix_has_every_victim_fault_and_moment() -> None:
    every = list(cells())
    assert len(every) == len({(cell.victim.name, cell.fault.name, cell.moment.name) for cell in every})
    assert len({cell.moment.name for cell in every}) == 8
    assert len({cell.fault.name for cell in every}) == 7
