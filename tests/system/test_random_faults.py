"""Workers die, hang and drain at random while clients ask: each answer is the undisturbed one, and nothing is left.

The number of seconds can be raised for a soak: BATON_FAULT_SECONDS=600.
"""

import json
import os
import random
import signal
import threading
import time
import urllib.error
from collections import Counter
from typing import Any

import pytest

from tests.system.cluster import Cluster

SECONDS = float(os.environ.get("BATON_FAULT_SECONDS", "20"))
OPTIONS = ("--dtype", "float32", "--kv-memory", "16MiB")
PROMPTS = [f"Prompt {number}: what does the function do, and why? " * (1 + 4 * number) for number in range(8)]
SAMPLINGS: tuple[dict[str, Any], ...] = ({"temperature": 0}, {"temperature": 0.8, "seed": 5, "repetition_penalty": 1.1})
MAX_TOKENS, NUM_CLIENTS = 120, 6


def answer(cluster: Cluster, prompt: int, sampling: int) -> tuple[str, int]:
    body = {"model": "demo", "prompt": PROMPTS[prompt], "max_tokens": MAX_TOKENS, "ignore_eos": True}
    result = cluster.post("/v1/completions", body | SAMPLINGS[sampling])
    return str(result["choices"][0]["text"]), int(result["usage"]["completion_tokens"])


class Client(threading.Thread):
    """Asks again and again until it is time; whatever it raises is kept."""

    def __init__(
        self, cluster: Cluster, seed: int, expected: dict[tuple[int, int], tuple[str, int]], end: float
    ) -> None:
        super().__init__()
        self.num_answers = 0
        self.trouble: list[str] = []
        self._cluster, self._random, self._expected, self._end = cluster, random.Random(seed), expected, end

    def run(self) -> None:
        while time.monotonic() < self._end:
            case = self._random.randrange(len(PROMPTS)), self._random.randrange(len(SAMPLINGS))
            try:
                if answer(self._cluster, *case) != self._expected[case]:
                    self.trouble.append(f"another answer to {case}")
                self.num_answers += 1
            except urllib.error.HTTPError as error:
                self.trouble.append(f"{case}: {error.code} {json.load(error)['error']['message']}")
            except OSError as error:
                self.trouble.append(f"{case}: {error}")


def disturb(cluster: Cluster, chance: random.Random) -> str:
    """Do something bad to one worker; what it was."""
    worker = chance.choice(cluster.status()["workers"])
    fault = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
    os.kill(worker["pid"], fault)
    if fault is signal.SIGSTOP:
        time.sleep(chance.choice([0.3, 1.5, 3.5]))  # shorter and longer than the silence that counts as death
        os.kill(worker["pid"], signal.SIGCONT)
    return f"{fault.name} {worker['roles'][0]}"


@pytest.mark.slow
def test_random_faults_cost_pauses_and_nothing_else() -> None:
    cases = [(prompt, sampling) for prompt in range(len(PROMPTS)) for sampling in range(len(SAMPLINGS))]
    with Cluster("--mixed", "1", *OPTIONS) as cluster:
        expected = {case: answer(cluster, *case) for case in cases}
    with Cluster("--prefill", "2", "--decode", "2", "--max-attempts", "8", *OPTIONS) as cluster:
        end, chance, faults = time.monotonic() + SECONDS, random.Random(1), Counter[str]()
        clients = [Client(cluster, seed, expected, end) for seed in range(NUM_CLIENTS)]
        for client in clients:
            client.start()
        while time.monotonic() < end:
            time.sleep(chance.uniform(1.0, 2.0))
            if len(cluster.status()["workers"]) >= 3:  # one fault at a time, more or less
                faults[disturb(cluster, chance)] += 1
        for client in clients:
            client.join(120)
            assert not client.is_alive(), "a request never ended"
        num_answers = sum(client.num_answers for client in clients)
        print(f"{num_answers} answers through {dict(faults)}")
        assert [trouble for client in clients for trouble in client.trouble] == []
        assert faults.total() >= 3
        assert num_answers >= NUM_CLIENTS
        cluster.wait_for(cluster.is_whole, "every block free or cached", 40.0)
