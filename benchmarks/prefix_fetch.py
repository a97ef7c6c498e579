"""What a prefix in another worker is worth: time to the first token, fetched, computed, and found in the own cache.

    python -m benchmarks.prefix_fetch [--quick] [--json FILE] [--folder FOLDER]

Two mixed workers that take turns. Each prompt is sent several times: it is computed by the first worker that gets it,
fetched by the other, and found by both from then on. What happened is read off the workers' counters. Then the pools
are made small, so that workers are asked for prompts that they had and evicted: what a question in vain costs. The
coordinator guesses what workers hold: from those that tell it would hear of the evictions.
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
COUNTERS = (
    "prompt_tokens_computed",
    "prompt_tokens_fetched",
    "prompt_tokens_cached",
    "prefix_fetches_empty",
    "prefix_fetch_seconds",
)
MAX_ASKS = 6


class Workers:
    """Two mixed workers with pools of so many tokens."""

    def __init__(self, folder: Path, pool_tokens: int) -> None:
        self._serving = Serving(
            "--model", str(folder), "--mixed", "2", "--no-restart", "--speculate", "off",
            "--kv-memory", str(pool_tokens * TOKEN_BYTES), "--routing", "round_robin", "--kv-routing", "approximate",
        )  # fmt: skip
        self.client = Client(self._serving.grpc, random_model.VOCABULARY)
        self._before = dict.fromkeys(COUNTERS, 0.0)
        self.fetch_s = 0.0
        """What the latest prompt waited for another worker."""

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
        self.fetch_s = delta["prefix_fetch_seconds"]
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


def measure_in_vain(report: Report, folder: Path, length: int, num_rounds: int) -> None:
    """What asking a worker in vain costs. A pool holds less than two prompts, so all but the latest are evicted.

    In each round a new prompt, for which nobody is asked, and an old one, for which the other worker is, if it had it:
    what the machine does meanwhile falls on both alike.
    """
    new: list[float] = []
    vain: list[float] = []
    questions: list[float] = []
    with Workers(folder, length + length // 2) as workers:
        prompts: list[list[int]] = []
        for number in range(num_rounds):
            prompts.append(workers.client.prompt(length))
            ttft_s, source = workers.ask(prompts[-1])
            if source == "computed":
                new.append(ttft_s)
            if number >= 4:
                ttft_s, source = workers.ask(prompts[number - 4])
                if source == "in vain":
                    vain.append(ttft_s)
                    questions.append(workers.fetch_s)
    if len(vain) < 3:
        report.note(f"Asking in vain was not measured: it happened {len(vain)} times.")
        return
    wait_s = statistics.median(questions)
    ratio = wait_s / statistics.median(new)
    report.row(f"{length} tokens: the question in vain itself", 1000 * wait_s, "ms", "computed", ratio, "<= 0.02")
    for what, choose in (("median", statistics.median), ("best", min)):
        name = f"{length} tokens, {what}: TTFT computed"
        report.row(f"{name}, nobody asked ({len(new)} times)", 1000 * choose(new), "ms")
        ratio = choose(vain) / choose(new)
        report.row(f"{name}, asked in vain ({len(vain)} times)", 1000 * choose(vain), "ms", "nobody asked", ratio)


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
    measure_in_vain(report, folder, 1024, 14 if arguments.quick else 30)
    report.note("One host: the bytes came through shared memory. Between hosts nothing was measured.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
