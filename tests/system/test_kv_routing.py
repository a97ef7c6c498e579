"""Real workers tell what their caches hold, and a prompt goes back to the worker that holds it."""

from typing import Any

from tests.system.cluster import Cluster

WORDS = ("--mixed", "3", "--kv-memory", "64MiB", "--speculate", "off", "--no-restart", "--routing", "cost_based")
PROMPT = "What does the function do, and why does it do so? " * 24


def ask(cluster: Cluster, prompt: str) -> str:
    body = {"model": "demo", "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    return str(cluster.post("/v1/completions", body)["choices"][0]["text"])


def generated(cluster: Cluster) -> dict[str, float]:
    return {each["id"]: each["counters"].get("generated_tokens", 0.0) for each in cluster.status()["workers"]}


def index(cluster: Cluster) -> dict[str, Any]:
    kv: dict[str, Any] = cluster.status()["routing"]["kv"]
    return kv


def settled(cluster: Cluster) -> bool:
    """Everything that workers cached is known, and one of them knows how fast it computes."""
    is_measured = any(each["measured"]["prefill_tokens_per_s"] > 0 for each in cluster.status()["workers"])
    return is_measured and index(cluster)["blocks"] > 0 and cluster.metric("baton_kv_index_lag_messages") == 0


def test_a_repeated_prompt_goes_to_the_worker_that_holds_it() -> None:
    with Cluster(*WORDS) as cluster:
        first = ask(cluster, PROMPT)
        cluster.wait_for(lambda: settled(cluster), "the worker has told what it holds")
        cluster.wait_for(lambda: sum(generated(cluster).values()) == 4, "heartbeats with the first answer")
        (home,) = (id for id, count in generated(cluster).items() if count)
        for _ in range(6):
            assert ask(cluster, PROMPT) == first
        cluster.wait_for(lambda: sum(generated(cluster).values()) == 28, "heartbeats with all answers")
        assert generated(cluster)[home] == 28
        expected = cluster.metric("baton_routed_cached_tokens_total", who="coordinator")
        assert expected == cluster.metric("baton_routed_cached_tokens_total", who="worker") > 0
        assert index(cluster)["mode"] == "exact"
        assert index(cluster)["silent_workers"] == []
