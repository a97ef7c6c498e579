"""Several coordinators over the same workers: each serves with all of them, and the death of one is not the others'."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.cluster import Cluster, alive

WORDS = ("--coordinators", "2", "--dtype", "float32", "--kv-memory", "64MiB")
PROMPTS = [f"Number {number}: what does the function do, and why? " * (4 + number) for number in range(6)]


def body(prompt: str, max_tokens: int = 60) -> dict[str, Any]:
    return {"model": "demo", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


def ask(cluster: Cluster, prompt: str) -> str:
    return str(cluster.post("/v1/completions", body(prompt))["choices"][0]["text"])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(*WORDS) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> list[str]:
    """One request after the other at one coordinator."""
    return [ask(cluster, prompt) for prompt in PROMPTS]


class Load:
    """Every prompt at once, `times` times over, at each of the coordinators."""

    def __init__(self, doors: list[Cluster], times: int = 3) -> None:
        self._answers: dict[tuple[str, int], list[str]] = {}
        self._threads = [
            threading.Thread(target=self._ask, args=(door, number, times))
            for door in doors
            for number in range(len(PROMPTS))
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, door: Cluster, number: int, times: int) -> None:
        self._answers[door.url, number] = []
        for _ in range(times):
            try:
                self._answers[door.url, number].append(ask(door, PROMPTS[number]))
            except OSError as error:  # of urllib as well
                self._answers[door.url, number].append(f"failed: {error}")

    def answers(self, door: Cluster) -> list[list[str]]:
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a request never ended"
        return [self._answers[door.url, number] for number in range(len(PROMPTS))]


def incarnations(door: Cluster) -> dict[str, str]:
    return {worker["id"]: worker["incarnation"] for worker in door.status()["workers"]}


def coordinators(cluster: Cluster) -> list[int]:
    """Pids, in the order of their start."""
    words = {pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in cluster.pids()[1:]}
    return [pid for pid in sorted(words) if "coordinator" in words[pid]]


def test_both_serve_with_the_same_workers_at_the_same_time(cluster: Cluster, expected: list[str]) -> None:
    doors = [cluster.at(url) for url in cluster.urls]
    assert len(doors) == 2
    assert incarnations(doors[0]) == incarnations(doors[1])
    assert set(incarnations(doors[0])) == {"prefill-0", "decode-0"}
    before = [door.metric("baton_completion_tokens_total") for door in doors]
    load = Load(doors)
    for door, tokens in zip(doors, before, strict=True):
        assert load.answers(door) == [[text] * 3 for text in expected]
        assert door.metric("baton_completion_tokens_total") - tokens == 3 * 60 * len(PROMPTS)
        assert door.metric("baton_attempts_failed_total") == 0
        door.wait_for(door.is_whole, "every block is free or cached")


def test_each_counts_the_load_that_the_other_gives(cluster: Cluster) -> None:
    one, two = (cluster.at(url) for url in cluster.urls)
    seen = threading.Event()

    def streams() -> None:  # one may be over before a heartbeat tells of it
        while not seen.is_set():
            one.post("/v1/completions", body("A long one: ", 700))

    asking = threading.Thread(target=streams)
    asking.start()
    try:
        two.wait_for(
            lambda: two.worker("decode-0")["running"] == 1 and two.status()["streams"] == 0, "the other's load is seen"
        )
    finally:
        seen.set()
    asking.join(60)
    assert not asking.is_alive()


def test_a_worker_that_is_started_anew_is_new_to_both(cluster: Cluster, expected: list[str]) -> None:
    doors = [cluster.at(url) for url in cluster.urls]
    before = incarnations(doors[0])
    load = Load(doors, times=1)
    pid = cluster.worker("decode-0")["pid"]
    os.kill(pid, signal.SIGKILL)
    cluster.wait_for(lambda: not alive(pid), "decode-0 is dead")
    for door in doors:
        assert load.answers(door) == [[text] for text in expected]
        door.wait_for(lambda door=door: "decode-0" in incarnations(door), "decode-0 is back", 60)  # type: ignore[misc]
    after = incarnations(doors[0])
    assert after == incarnations(doors[1])
    assert after["decode-0"] != before["decode-0"]
    assert after["prefill-0"] == before["prefill-0"]
    load = Load(doors, times=1)
    for door in doors:
        assert load.answers(door) == [[text] for text in expected]
        assert door.metric("baton_worker_handover_checksum_failures_total") == 0
        assert door.metric("baton_attempts_failed_total", cause="diverged") == 0
        door.wait_for(door.is_whole, "every block is free or cached")


def test_the_other_serves_on_when_one_is_killed_and_that_one_comes_back_with_all_workers(
    cluster: Cluster, expected: list[str]
) -> None:
    one, two = (cluster.at(url) for url in cluster.urls)
    load = Load([one, two])
    two.wait_for(lambda: one.status()["streams"] > 0 and two.status()["streams"] > 0, "both are at work")
    pid = coordinators(cluster)[0]
    os.kill(pid, signal.SIGKILL)
    cluster.wait_for(lambda: not alive(pid), "it is dead")
    assert load.answers(two) == [[text] * 3 for text in expected]
    assert any(text.startswith("failed") for texts in load.answers(one) for text in texts), "it was at work"
    assert two.metric("baton_attempts_failed_total", cause="worker_lost") <= 6, "only those of the test before"

    def is_back() -> bool:
        try:
            return incarnations(one) == incarnations(two)
        except OSError:
            return False

    two.wait_for(is_back, "it is back at the same address, with all workers", 60)
    again = Load([one, two], times=1)
    for door in (one, two):
        assert again.answers(door) == [[text] for text in expected]
        door.wait_for(door.is_whole, "nothing of the dead coordinator's requests is left")
