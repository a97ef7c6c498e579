"""A sample of the matrix with every victim, the short form of the soak, and that the pages say what is tested."""

import re
import time
from pathlib import Path

import pytest
import uvloop

from tests.faults.matrix import (
    FAULTS,
    FOUND,
    MIXED,
    MOMENTS,
    ONE_EACH,
    PAIR,
    TWO_EACH,
    VICTIMS,
    cells,
    run_cases,
    sample,
    table,
)
from tests.faults.soak import SUFFERING, soak
from tests.system.etcd import INSTALLED, MISSING

NUM_CASES, SEED, SECONDS = 3, 7, 45.0
FLEETS = [
    pytest.param(TWO_EACH, id="two of each"),
    pytest.param(ONE_EACH, id="one of each"),
    pytest.param(MIXED, id="mixed"),
    pytest.param(PAIR, id="two coordinators"),
    pytest.param(FOUND, id="etcd", marks=pytest.mark.skipif(not INSTALLED, reason=MISSING)),
]
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fleet", FLEETS)
def test_a_sample_of_the_matrix_costs_pauses_and_nothing_else(fleet: tuple[tuple[str, int], ...]) -> None:
    planned = [sample(fleet, NUM_CASES, SEED)]
    results = uvloop.run(run_cases(planned, SEED, lambda result: None, time.monotonic() + SECONDS))
    print(table(results))
    assert [(result.seed, result.wrong, result.lost, result.not_kept) for result in results if result.bad] == []
    assert any(result.proven for result in results)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_grows_while_processes_come_and_go_for_two_minutes() -> None:
    result = uvloop.run(soak(120.0, seed=3))
    print(result.show())
    assert result.trouble == []
    assert result.growth() == []
    assert {name.rpartition(", ")[2] for name in result.faults} == {name.partition("-")[0] for name in SUFFERING}
    assert result.num_answers >= 50


def test_the_matrix_has_every_victim_fault_and_moment() -> None:
    every = list(cells())
    assert len(every) == len({(cell.victim.name, cell.fault.name, cell.moment.name) for cell in every})
    assert {cell.moment for cell in every} == set(MOMENTS)
    assert {cell.fault for cell in every} == set(FAULTS)
    assert {cell.victim for cell in every} == set(VICTIMS)


def test_every_row_of_what_happens_when_something_dies_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "operations.md").read_text().partition("## What happens when")[2].partition("\n##")[0]
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 15
    sources: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        sources[path.name] = sources.get(path.name, "") + path.read_text()
    parts = {victim.name for victim in VICTIMS} | {fault.name for fault in FAULTS} | {each.name for each in MOMENTS}
    pairs = {(cell.victim.name, cell.fault.name) for cell in cells()}
    for row in rows:
        proofs = re.findall(r"`([^`]+)`", row[-1])
        assert proofs, f"no test: {row[0]}"
        for proof in proofs:
            name, _, test = proof.partition("::")
            if test:
                assert f"def {test}(" in sources[name], proof
            else:
                assert name in parts, proof
        victims, faults = ([each.name for each in kind if each.name in proofs] for kind in (VICTIMS, FAULTS))
        assert not victims or any((victim, fault) in pairs for victim in victims for fault in faults), row[0]
