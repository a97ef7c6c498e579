"""What dies, and what the clients of real processes see of it. Each test proves that its fault happened."""

import json
import os
import signal
import threading
import time
import urllib.error
from dataclasses import dataclass
from typing import Any

import pytest

from tests.system.cluster import Cluster, alive

FLOAT32 = ("--dtype", "float32", "--kv-memory", "64MiB", "--no-restart")
PROMPTS = [f"Number {number}: what does the function do, and why? " * (4 + number) for number in range(8)]
MAX_TOKENS = 250
SLACK_S = 0.4
"""What looking takes on busy cores; less than an interval of heartbeats."""


def body(prompt: str) -> dict[str, Any]:
    return {"model": "demo", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def undisturbed() -> list[str]:
    """What the prompts are answered when nothing fails: by one mixed worker, without any hand-over."""
    with Cluster("--mixed", "1", *FLOAT32) as cluster:
        return [str(cluster.post("/v1/completions", body(prompt))["choices"][0]["text"]) for prompt in PROMPTS]


@dataclass
class Outcome:
    status: int
    text: str
    error: str = ""


class Load:
    """All prompts at once, each in a thread; `outcomes` waits for every answer."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._outcomes: dict[int, Outcome] = {}
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(len(PROMPTS))]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        try:
            answer = self._cluster.post("/v1/completions", body(PROMPTS[number]))
            self._outcomes[number] = Outcome(200, str(answer["choices"][0]["text"]))
        except urllib.error.HTTPError as error:
            self._outcomes[number] = Outcome(error.code, "", json.load(error)["error"]["message"])

    def outcomes(self) -> list[Outcome]:
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a request never ended"
        return [self._outcomes[number] for number in range(len(PROMPTS))]


def kill(cluster: Cluster, worker_id: str) -> None:
    pid = cluster.worker(worker_id)["pid"]
    os.kill(pid, signal.SIGKILL)
    cluster.wait_for(lambda: not alive(pid), f"{worker_id} is dead")
    cluster.wait_for(
        lambda: worker_id not in [worker["id"] for worker in cluster.status()["workers"]],
        f"the coordinator knows that {worker_id} is gone",
    )


def check(outcomes: list[Outcome], undisturbed: list[str]) -> None:
    for outcome, expected in zip(outcomes, undisturbed, strict=True):
        assert outcome.status == 200, outcome.error
        assert outcome.text == expected


def test_a_killed_prefill_worker_leaves_its_prompts_to_decode(undisturbed: list[str]) -> None:
    with Cluster(*FLOAT32) as cluster:
        load = Load(cluster)
        cluster.wait_for(
            lambda: cluster.metric("baton_worker_prompt_tokens_computed_total", worker="prefill-0") > 0,
            "the prefill worker computes",
        )
        kill(cluster, "prefill-0")
        check(load.outcomes(), undisturbed)
        remote = cluster.metric("baton_prefill_choice_total", choice="remote")
        check(Load(cluster).outcomes(), undisturbed)
        assert cluster.metric("baton_prefill_choice_total", choice="remote") == remote, "decode prefills by itself now"
        cluster.wait_for(cluster.is_whole, "every block of the decode worker is free or cached")


def test_streams_of_a_killed_decode_worker_go_on_in_the_other(undisturbed: list[str]) -> None:
    with Cluster("--decode", "2", *FLOAT32) as cluster:
        load = Load(cluster)
        cluster.wait_for(
            lambda: cluster.metric("baton_worker_generated_tokens_total", worker="decode-0") > 3, "decode-0 decodes"
        )
        kill(cluster, "decode-0")
        check(load.outcomes(), undisturbed)
        assert cluster.metric("baton_attempts_failed_total", cause="worker_lost") > 0, "it died in mid-stream"
        check(Load(cluster).outcomes(), undisturbed)
        cluster.wait_for(cluster.is_whole, "every block of the workers left is free or cached")


def test_streams_of_the_only_decode_worker_go_on_in_the_prefill_worker(undisturbed: list[str]) -> None:
    with Cluster(*FLOAT32) as cluster:
        load = Load(cluster)
        cluster.wait_for(
            lambda: cluster.metric("baton_worker_generated_tokens_total", worker="decode-0") > 3, "decode-0 decodes"
        )
        kill(cluster, "decode-0")
        check(load.outcomes(), undisturbed)
        assert cluster.metric("baton_prefill_choice_total", choice="local_no_decode_worker") > 0
        assert cluster.get("/ready")
        check(Load(cluster).outcomes(), undisturbed)
        cluster.wait_for(cluster.is_whole, "every block of the prefill worker is free or cached")


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
def test_a_hung_worker_counts_as_dead_within_the_stated_bound(undisturbed: list[str], victim: str) -> None:
    with Cluster("--decode", "2", *FLOAT32) as cluster:
        load = Load(cluster)
        cluster.wait_for(
            lambda: cluster.metric("baton_worker_generated_tokens_total", worker=victim) > 3, f"{victim} works"
        )
        pid = cluster.worker(victim)["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            stopped = time.monotonic()
            cluster.wait_for(lambda: len(cluster.status()["workers"]) == 2, "the hung worker is dropped", 6.0)
            assert time.monotonic() - stopped < 2.0 + SLACK_S, "of --heartbeat-timeout-s"
            check(load.outcomes(), undisturbed)
            if victim == "decode-0":
                assert cluster.metric("baton_attempts_failed_total", cause="worker_lost") > 0, "it hung in mid-stream"
        finally:
            os.kill(pid, signal.SIGCONT)
        cluster.wait_for(lambda: len(cluster.status()["workers"]) == 3, "it registers again when it wakes up")
        check(Load(cluster).outcomes(), undisturbed)


def test_corrupted_blocks_are_detected_counted_and_recomputed(undisturbed: list[str]) -> None:
    with Cluster(*FLOAT32, "--lanes", "faulty:shm?corrupt=1") as cluster:
        check(Load(cluster).outcomes(), undisturbed)
        cluster.wait_for(
            lambda: cluster.metric("baton_worker_handover_checksum_failures_total", worker="decode-0") > 0,
            "the corruption was seen",
        )
        assert cluster.metric("baton_worker_local_prefill_fallbacks_total", worker="decode-0") > 0
        cluster.wait_for(cluster.is_whole, "every block free or cached")


def test_a_killed_prefill_worker_is_started_again_and_used(undisturbed: list[str]) -> None:
    restarting = [word for word in FLOAT32 if word != "--no-restart"]
    with Cluster(*restarting) as cluster:
        first = cluster.worker("prefill-0")
        kill(cluster, "prefill-0")
        cluster.wait_for(lambda: len(cluster.status()["workers"]) == 2, "prefill-0 is back", 60.0)
        second = cluster.worker("prefill-0")
        assert second["incarnation"] != first["incarnation"]
        check(Load(cluster).outcomes(), undisturbed)
        assert cluster.metric("baton_worker_handover_blocks_received_total", worker="decode-0") > 0
