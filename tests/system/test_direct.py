"""Workers that write straight into others' blocks, as real processes, and what is left when one dies or hangs."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.system.cluster import Cluster
from tests.system.test_failures import FLOAT32, body, kill

DIRECT = (*FLOAT32, "--direct-wait-s", "5", "--max-batch-tokens", "32")
"""Prompts are computed in many small steps, so that a fault is in the middle of them."""
WRITTEN, PULLED = "baton_worker_handover_blocks_direct_total", "baton_worker_handover_blocks_received_total"
HEARTBEAT_S = 0.5
LONG = [f"Number {number}: what does the function do, and why? " * 100 for number in range(6)]


def answer(cluster: Cluster, prompt: str) -> str:
    return str(cluster.post("/v1/completions", {**body(prompt), "max_tokens": 20})["choices"][0]["text"])


def has_met(cluster: Cluster, worker: str) -> bool:
    return cluster.metric(WRITTEN, worker=worker) + cluster.metric(PULLED, worker=worker) > 0


@contextmanager
def load(cluster: Cluster, *decode: str) -> Iterator[list[Future[str]]]:
    """All prompts at once, and the prefill worker in the middle of them."""
    with ThreadPoolExecutor(len(LONG)) as threads:
        for worker in decode:  # the first hand-over of two workers may be pulled: its pool is being lent meanwhile
            met = [threads.submit(answer, cluster, f"{worker} {number} meets. " * 40) for number in range(len(decode))]
            results(met)
            cluster.wait_for(lambda worker=worker: has_met(cluster, worker), f"{worker} has had a hand-over")
        time.sleep(2 * HEARTBEAT_S)  # what was written until now is in the metrics
        before = cluster.metric(WRITTEN, worker="decode-0")
        futures = [threads.submit(answer, cluster, prompt) for prompt in LONG]
        cluster.wait_for(lambda: cluster.metric(WRITTEN, worker="decode-0") > before, "the prefill worker writes")
        yield futures


def results(futures: list[Future[str]]) -> list[str]:
    return [future.result(120) for future in futures]


@pytest.fixture(scope="module")
def undisturbed() -> list[str]:
    with Cluster("--mixed", "1", *FLOAT32) as cluster:
        return [answer(cluster, prompt) for prompt in LONG]


def test_a_killed_writer_leaves_its_prompts_to_decode(undisturbed: list[str]) -> None:
    with Cluster(*DIRECT) as cluster:
        with load(cluster, "decode-0") as futures:
            kill(cluster, "prefill-0")
            assert results(futures) == undisturbed
        assert cluster.metric("baton_worker_local_prefill_fallbacks_total") > 0, "it died in the middle"
        cluster.wait_for(cluster.is_whole, "every block of the decode worker is free or cached")


def test_blocks_of_a_stopped_writer_are_kept_from_everyone_until_it_answers(undisturbed: list[str]) -> None:
    with Cluster(*DIRECT) as cluster:
        with load(cluster, "decode-0") as futures:
            pid = cluster.worker("prefill-0")["pid"]
            os.kill(pid, signal.SIGSTOP)
            try:
                assert results(futures) == undisturbed
                time.sleep(2)
                assert cluster.worker("decode-0")["blocks"]["quarantined"] > 0, "the writer could still write there"
            finally:
                os.kill(pid, signal.SIGCONT)
        cluster.wait_for(lambda: len(cluster.status()["workers"]) == 2, "it registers again")
        cluster.wait_for(cluster.is_whole, "every block is free or cached")
        written = cluster.metric(WRITTEN)
        for text in ("Something new. ", "Something else. "):
            answer(cluster, text * 40)
        cluster.wait_for(lambda: cluster.metric(WRITTEN) > written, "it writes again")


def test_a_killed_decode_worker_takes_its_blocks_with_it(undisturbed: list[str]) -> None:
    with Cluster("--decode", "2", *DIRECT) as cluster:
        with load(cluster, "decode-0", "decode-1") as futures:
            kill(cluster, "decode-0")
            assert results(futures) == undisturbed
        cluster.wait_for(cluster.is_whole, "every block of the workers left is free or cached")
        assert answer(cluster, LONG[0]) == undisturbed[0]
