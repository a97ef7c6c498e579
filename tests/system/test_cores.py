"""Which cores compute."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.model import own_cores
from tests.system.cluster import Cluster


@pytest.mark.parametrize(
    ("num_workers", "num_threads", "expected"),
    [
        (2, 2, ["3,4", "5,7"]),
        (1, 4, ["3,4,5,7"]),
        (2, 1, ["", ""]),
        (3, 2, ["", "", ""]),
    ],
)
def test_workers_that_take_the_whole_machine_do_not_share_a_core(
    num_workers: int, num_threads: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: Callable[[int], set[int]] = lambda pid: {7, 3, 4, 5}  # noqa: E731
    monkeypatch.setattr(os, "sched_getaffinity", allowed)
    assert own_cores(num_workers, num_threads) == expected


def test_only_the_computing_thread_stays_on_the_cores_that_were_chosen() -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) == 1:
        pytest.skip("there is one core")
    chosen = max(allowed)
    with Cluster("--mixed", "1", "--cores", str(chosen), "--kv-memory", "32MiB", "--no-restart") as cluster:
        cluster.post("/v1/completions", {"prompt": "def", "max_tokens": 4})
        others = cluster.pids()[1:]
        tasks = [(pid, int(task.name)) for pid in others for task in Path(f"/proc/{pid}/task").iterdir()]
        bound = {pid for pid, task in tasks if os.sched_getaffinity(task) == {chosen}}
        assert len(bound) == 1, "the worker's"
        assert all(os.sched_getaffinity(pid) == allowed for pid in others), "wires run wherever there is room"
