"""A request that makes real workers crash: it is stopped, and those beside it end as if nothing had been."""

import json
import os
import signal
import threading
import time
import urllib.error

import pytest

from tests.system.cluster import Cluster

OPTIONS = ("--dtype", "float32", "--kv-memory", "64MiB", "--heartbeat-interval-s", "0.1")
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


@pytest.mark.slow
def test_a_request_that_crashes_workers_is_stopped_and_others_end_right() -> None:
    prompts = [f"What is {number} and why? " for number in range(4)]
    bodies = [
        {"model": "demo", "prompt": prompt, "max_tokens": 800, "temperature": 0, "ignore_eos": True}
        for prompt in prompts
    ]
    with Cluster("--mixed", "3", *OPTIONS) as cluster:
        expected = [cluster.post("/v1/completions", body)["choices"][0]["text"] for body in bodies]
        answers: dict[int, str] = {}

        def ask(number: int) -> None:
            answers[number] = cluster.post("/v1/completions", bodies[number])["choices"][0]["text"]

        assassin = Assassin(cluster)
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(bodies))]
        for thread in (assassin, *threads):
            thread.start()
        try:
            cluster.post("/v1/completions", POISON)
            raise AssertionError("it was answered")
        except urllib.error.HTTPError as error:
            status, reason = error.code, json.load(error)["error"]["code"]
        finally:
            assassin.done.set()
            for thread in (assassin, *threads):
                thread.join(60)
        assert (status, reason) == (422, "poison"), cluster.log()
        assert 4 <= len(assassin.killed) <= 8
        assert [answers[number] for number in range(len(bodies))] == expected
        assert cluster.metric("baton_suspects_total") > len(assassin.killed), "others were there"
        assert cluster.metric("baton_quarantine_total", event="convicted") == 1
        assert "is poison" in cluster.log()
