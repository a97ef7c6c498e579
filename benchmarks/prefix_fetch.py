"""What a prefix in another worker is worth: time to the first token, fetched, computed, and found in the own cache.

    python -m benchmarks.prefix_fetch [--quick] [--json FILE] [--folder FOLDER]

Two mixed workers that take turns. Each prompt is sent several times: it is computed by the first worker that gets it,
fetched by the other, and found by both from then on. What happened is read off the workers' counters. Then the pools
are made small, so that workers are asked for prompts that they had and evicted: what a question in vain costs.
"""

import argparse
import json
import statistics
import tempfile
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

from benchmarks import random_model
from benchmarks.relay import Client
from benchmarks.report import Report, add_common_arguments
from benchmarks.serving import Serving
from benchmarks.tiers import TOKEN_BYTES, with_long_context

BEAT_S, TIMEOUT_S = 0.7, 60.0
COUNTERS = "prompt_tokens_computed", "prompt_tokens_fetched", "prompt_tokens_cached", "prefix_fetches_empty"
MAX_ASKS = 6


class Workers:
    """Two mixed workers with pools of so many tokens."""

    def __init__(self, folder: Path, pool_tokens: int) -> None:
        self._serving = Serving(
            "--model", str(folder), "--mixed", "2", "--no-restart", "--speculate", "off",
            "--kv-memory", str(pool_tokens * TOKEN_BYTES),
        )  # fmt: skip
        self.client = Client(self._serving.grpc, random_model.VOCABULARY)
        self._before = dict.fromkeys(COUNTERS, 0.0)

    def __enter__(self) -> "Workers":
        self._serving.__enter__()
        for _ in range(4):  # both compute and both connect
            self.ask(self.client.prompt(512))
        shared = self.client.prompt(512)
        for _ in range(3):
            self.ask(shared)
        return self

    def __exit__(self, *error: object) -> None:
        self._serving.stop()

    def ask(self, prompt: list[int]) -> tuple[float, str]:
        """Time to the first token, and where the prompt came from."""
        ttft_s = self.client.streams([prompt], 1)[0].ttft_s
        time.sleep(BEAT_S)  # counters and free blocks come with heartbeats
        with urllib.request.urlopen(self._serving.url + "/status", timeout=TIMEOUT_S) as answer:
            workers = json.load(answer)["workers"]
        now = {name: sum(float(each["counters"].get(name, 0)) for each in workers) for name in COUNTERS}
        delta = {name: now[name] - self._before[name] for name in COUNTERS}
        self._before = now
        for name, source in (("fetched", "fetched"), ("cached", "cached"), ("computed", "computed")):
            if delta[f"prompt_tokens_{name}"] > 0.9 * len(prompt):
                return ttft_s, "in vain" if delta["prefix_fetches_empty"] else source
        return ttft_s, "mixed"


def measure(report: Report, workers: Workers, length: int, repeats: int) -> None:
    """Rows of one length. Raises RuntimeError when a prompt never was fetched, or never found."""
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        prompt = workers.client.prompt(length)
        sources: set[str] = set()
        for _ in range(MAX_ASKS):
            ttft_s, source = workers.ask(prompt)
            found[source].append(ttft_s)
            sources.add(source)
            if {"computed", "fetched", "cached"} <= sources:
                break
        else:
            raise RuntimeError(f"{length} tokens: sent {MAX_ASKS} times, the prompt was {', '.join(sorted(sources))}")
    computed, fetched, cached = (statistics.median(found[each]) for each in ("computed", "fetched", "cached"))
    report.row(f"{length} tokens: TTFT computed", 1000 * computed, "ms")
    report.row(f"{length} tokens: TTFT fetched", 1000 * fetched, "ms", "computed", fetched / computed, "<= 1")
    report.row(f"{length} tokens: TTFT in own cache", 1000 * cached, "ms", "fetched", cached / fetched)


def measure_in_vain(report: Report, folder: Path, length: int, num_asks: int) -> None:
    """What asking a worker in vain costs. Four prompts take turns, and a pool holds less than two."""
    found: dict[str, list[float]] = defaultdict(list)
    with Workers(folder, length + length // 2) as workers:
        prompts = [workers.client.prompt(length) for _ in range(4)]
        for number in range(num_asks):
            # An odd step through an even number of prompts: each meets both workers.
            ttft_s, source = workers.ask(prompts[(number + number // 4) % 4])
            found[source].append(ttft_s)
    if not (found["computed"] and found["in vain"]):
        report.note(f"Asking in vain was not measured: prompts were {', '.join(sorted(found))}.")
        return
    plain, vain = statistics.median(found["computed"]), statistics.median(found["in vain"])
    report.row(f"{length} tokens: TTFT computed, nobody asked", 1000 * plain, "ms")
    report.row(f"{length} tokens: TTFT computed, asked in vain", 1000 * vain, "ms", "nobody asked", vain / plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_common_arguments(parser)
    default = Path(tempfile.gettempdir()) / "baton-random-246m"
    parser.add_argument("--folder", type=Path, default=default, help="where the random model is, or is written to")
    arguments = parser.parse_args()
    folder = with_long_context(arguments.folder)
    report = Report("A prefix in another worker, random 246 M model, two mixed workers")
    lengths, repeats = ((1024, 2048), 3) if arguments.quick else ((1024, 2048, 4096, 8192, 16384), 3)
    with Workers(folder, repeats * sum(lengths) + 4096) as workers:
        for length in lengths:
            measure(report, workers, length, repeats)
    measure_in_vain(report, folder, 1024, 12 if arguments.quick else 24)
    report.note("One host: the bytes came through shared memory. Between hosts nothing was measured.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
