"""Two real workers: what one has computed the other fetches, and answers are the same whatever becomes of the holder.

A stream that runs on keeps the holder busier than the other worker, so that the same prompt goes to the other.
"""

import os
import signal
import threading
from typing import Any

import pytest

from tests.system.cluster import Cluster, alive

WORDS = ("--mixed", "2", "--dtype", "float32", "--kv-memory", "64MiB", "--speculate", "off", "--no-restart")
PROMPT = "What does the function do, and why does it do so? " * 24
MAX_TOKENS, LONG = 24, 400


def body(max_tokens: int) -> dict[str, Any]:
    return {"model": "demo", "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


def ask(cluster: Cluster, max_tokens: int) -> str:
    return str(cluster.post("/v1/completions", body(max_tokens))["choices"][0]["text"])


@pytest.fixture(scope="module")
def undisturbed() -> tuple[str, str]:
    """The short answer and the long one, by one worker alone."""
    with Cluster("--mixed", "1", *WORDS[2:]) as cluster:
        return ask(cluster, MAX_TOKENS), ask(cluster, LONG)


class Holder:
    """The worker that computed the prompt, and goes on with a long answer to it."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.answer = ""
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()
        cluster.wait_for(lambda: bool(self._busy()), "a worker streams the long answer")
        (self.id,) = self._busy()
        self.pid = cluster.worker(self.id)["pid"]

    def _ask(self) -> None:
        self.answer = ask(self._cluster, LONG)

    def _busy(self) -> list[str]:
        workers = self._cluster.status()["workers"]
        return [each["id"] for each in workers if each["counters"].get("generated_tokens", 0) > 2]

    def finished(self) -> str:
        self._thread.join(120)
        return self.answer


def counted(cluster: Cluster, name: str) -> float:
    return cluster.metric(f"baton_worker_{name}_total")


def test_a_prompt_that_one_worker_computed_is_fetched_by_the_other(undisturbed: tuple[str, str]) -> None:
    with Cluster(*WORDS) as cluster:
        holder = Holder(cluster)
        assert ask(cluster, MAX_TOKENS) == undisturbed[0]
        cluster.wait_for(lambda: counted(cluster, "prompt_tokens_fetched") > 0, "the prompt was fetched")
        cluster.wait_for(
            lambda: cluster.metric("baton_worker_prefix_blocks_lent_total", worker=holder.id) > 0, "by the other"
        )
        assert counted(cluster, "prefix_fetches_failed") == 0
        assert holder.finished() == undisturbed[1]
        cluster.wait_for(cluster.is_whole, "every block of both workers is free or cached")


def test_wrong_bytes_are_detected_counted_and_recomputed(undisturbed: tuple[str, str]) -> None:
    with Cluster(*WORDS, "--lanes", "faulty:shm?corrupt=1-") as cluster:
        holder = Holder(cluster)
        assert ask(cluster, MAX_TOKENS) == undisturbed[0]
        cluster.wait_for(lambda: counted(cluster, "handover_checksum_failures") > 0, "the corruption was seen")
        cluster.wait_for(lambda: counted(cluster, "prefix_fetches_failed") == 1, "the fetch failed")
        assert counted(cluster, "prompt_tokens_fetched") == 0
        assert holder.finished() == undisturbed[1]
        cluster.wait_for(cluster.is_whole, "every block of both workers is free or cached")


def test_a_stopped_holder_is_not_waited_for(undisturbed: tuple[str, str]) -> None:
    with Cluster(*WORDS) as cluster:
        holder = Holder(cluster)
        os.kill(holder.pid, signal.SIGSTOP)
        try:
            assert ask(cluster, MAX_TOKENS) == undisturbed[0]
            cluster.wait_for(lambda: counted(cluster, "prefix_fetches_failed") == 1, "nobody answered")
            assert holder.finished() == undisturbed[1], "it goes on in the other worker"
        finally:
            os.kill(holder.pid, signal.SIGCONT)
        cluster.wait_for(lambda: len(cluster.status()["workers"]) == 2, "it registers again when it wakes up")
        cluster.wait_for(cluster.is_whole, "every block of both workers is free or cached")


def test_a_holder_that_dies_while_it_is_read_leaves_the_rest_to_be_computed(undisturbed: tuple[str, str]) -> None:
    with Cluster(*WORDS, "--lanes", "faulty:shm?stall=1") as cluster:
        holder = Holder(cluster)
        answers: list[str] = []
        asking = threading.Thread(target=lambda: answers.append(ask(cluster, MAX_TOKENS)))
        asking.start()
        cluster.wait_for(
            lambda: cluster.metric("baton_worker_prefix_blocks_lent_total", worker=holder.id) > 0, "it is read"
        )
        os.kill(holder.pid, signal.SIGKILL)
        cluster.wait_for(lambda: not alive(holder.pid), "the holder is dead")
        asking.join(120)
        assert answers == [undisturbed[0]]
        cluster.wait_for(lambda: counted(cluster, "prefix_fetches_failed") == 1, "the fetch ended early")
        assert holder.finished() == undisturbed[1]
        cluster.wait_for(cluster.is_whole, "every block of the worker left is free or cached")
