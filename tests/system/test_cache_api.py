"""What clients can say about the KV of their prompts, against real processes: pins and salts."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.system.cluster import Cluster

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
LOADED = "baton_worker_prompt_tokens_loaded_total"
COMPUTED = "baton_worker_prompt_tokens_computed_total"
STORED = "baton_worker_kv_tier_stored_total"


def prompt(number: int) -> str:
    """About 190 tokens, other ones from the first on."""
    return " ".join(f"{WORDS[(number * 7 + index * (number + 1)) % 11]} {number} {index}" for index in range(40))


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, found in the pool."""


def ask(cluster: Cluster, text: str, **more: str) -> Answer:
    answer = cluster.post("/v1/completions", {"prompt": text, "max_tokens": 8, "temperature": 0, **more})
    usage = answer["usage"]
    return Answer(answer["choices"][0]["text"], usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """The pool has room for a few prompts, the tier for four times as many."""
    with Cluster(
        "--mixed", "1", "--dtype", "float32", "--kv-memory", "2MiB", "--host-kv-memory", "8MiB", "--no-restart",
        "--max-model-tokens", "512", "--speculate", "off",
    ) as cluster:  # fmt: skip
        yield cluster


def test_a_pinned_prefix_outlives_a_flood_that_evicts_one_of_equal_age(cluster: Cluster) -> None:
    pinned, other = prompt(0), prompt(1)
    capacity = 4 * cluster.worker("mixed-0")["blocks"]["total"]
    first = [ask(cluster, text) for text in (other, pinned)]
    pin = cluster.post("/v1/cache/pins", {"prompt": pinned, "ttl_s": 600})
    assert pin["blocks"] == first[1].prompt_tokens // 16
    cluster.wait_for(lambda: cluster.metric("baton_worker_kv_tier_pinned") == pin["blocks"], "the worker has the pin")
    num_flooded = 0
    while num_flooded < 2 * capacity:
        num_flooded += ask(cluster, prompt(2 + num_flooded)).prompt_tokens // 16
    cluster.wait_for(lambda: cluster.metric(STORED) >= num_flooded, "all of it went through the tier")
    before = cluster.metric(LOADED), cluster.metric(COMPUTED)
    again = [ask(cluster, text) for text in (other, pinned)]
    assert [answer.text for answer in again] == [answer.text for answer in first]
    assert [answer.cached_tokens for answer in again] == [0, 0], "the pool has neither"
    num_tokens = sum(answer.prompt_tokens for answer in again)
    cluster.wait_for(
        lambda: cluster.metric(LOADED) + cluster.metric(COMPUTED) >= sum(before) + num_tokens, "both are counted"
    )
    assert cluster.metric(LOADED) - before[0] == pin["blocks"] * 16


def test_tenants_with_other_salts_get_equal_answers_and_no_hit(cluster: Cluster) -> None:
    text = prompt(1000)[:150]
    mine = ask(cluster, text, cache_salt="mine")
    for salt in ({"cache_salt": "yours"}, {}):
        theirs = ask(cluster, text, **salt)
        assert (theirs.text, theirs.cached_tokens) == (mine.text, 0)
    again = ask(cluster, text, cache_salt="mine")
    assert again.text == mine.text
    assert again.cached_tokens >= 32
