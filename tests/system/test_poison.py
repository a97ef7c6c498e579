"""A request that makes real workers crash: it is stopped, and those beside it end as if nothing had been."""

import json
import os
import signal
import threading
import time
import urllib.error
from typing import Any

import pytest

from tests.system.cluster import UNREFUSED, Cluster

OPTIONS = ("--dtype", "float32", "--kv-memory", "64MiB", "--heartbeat-interval-s", "0.1", *UNREFUSED)
POISON = {"model": "demo", "prompt": list(range(300, 1500)), "max_tokens": 400, "temperature": 0, "ignore_eos": True}
MANY_TOKENS = 1000
"""Computed at once only for the poison."""


class Assassin(threading.Thread):
    """Kills whichever worker has computed the long prompt, at once, as if computing it had been its death."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()
        self.killed: list[int] = []
        self.done = threading.Event()
        self._cluster = cluster

    def run(self) -> None:
        while not self.done.is_set():
            for worker in self._cluster.status()["workers"]:
                computed = worker["counters"].get("prompt_tokens_computed", 0)
                if computed >= MANY_TOKENS and worker["pid"] not in self.killed:
                    self.killed.append(worker["pid"])
                    os.kill(worker["pid"], signal.SIGKILL)
            time.sleep(0.02)


class Load:
    """Poison at one coordinator, and innocents at all for as long as it kills."""

    def __init__(self, doors: list[Cluster], bodies: list[dict[str, Any]]) -> None:
        self.answers: dict[tuple[str, int], list[str]] = {}
        self.refusal = (0, "")
        self.assassin = Assassin(doors[0])
        threads = [threading.Thread(target=self._ask, args=(door, number, body))
                   for door in doors for number, body in enumerate(bodies)]  # fmt: skip
        for thread in (self.assassin, *threads):
            thread.start()
        try:
            doors[0].post("/v1/completions", POISON)
            raise AssertionError("it was answered")
        except urllib.error.HTTPError as error:
            self.refusal = error.code, json.load(error)["error"]["code"]
        finally:
            self.assassin.done.set()
            for thread in (self.assassin, *threads):
                thread.join(90)

    def _ask(self, door: Cluster, number: int, body: dict[str, Any]) -> None:
        answers = self.answers[door.url, number] = []
        while not (answers and self.assassin.done.is_set()):
            try:
                answers.append(door.post("/v1/completions", body)["choices"][0]["text"])
            except urllib.error.HTTPError as error:
                answers.append(f"failed: {json.load(error)}")
                return


@pytest.mark.slow
@pytest.mark.parametrize("coordinators", [1, 2])
def test_a_request_that_crashes_workers_is_stopped_and_others_end_right(coordinators: int) -> None:
    prompts = [f"What is {number} and why? " for number in range(4)]
    bodies = [
        {"model": "demo", "prompt": prompt, "max_tokens": 800, "temperature": 0, "ignore_eos": True}
        for prompt in prompts
    ]
    with Cluster("--mixed", "3", "--coordinators", str(coordinators), *OPTIONS) as cluster:
        expected = [cluster.post("/v1/completions", body)["choices"][0]["text"] for body in bodies]
        doors = [cluster.at(url) for url in cluster.urls]
        load = Load(doors, bodies)
        assert load.refusal == (422, "poison"), cluster.log()
        killed = load.assassin.killed
        assert 4 <= len(killed) <= 8
        for door in doors:
            for number, text in enumerate(expected):
                assert set(load.answers[door.url, number]) == {text}
            assert door.metric("baton_requests_total", outcome="poisoned") == (door is doors[0])
        assert sum(door.metric("baton_suspects_total") for door in doors) > len(killed), "others were there"
        assert doors[0].metric("baton_quarantine_total", event="convicted") == 1
        assert "is poison" in cluster.log()
