"""What KV blocks in host memory and on disk are worth: time to the first token, restored and computed.

    python -m benchmarks.tiers [--quick] [--json FILE] [--folder FOLDER] [--disk FOLDER]

One mixed worker whose pool holds little more than one prompt. Two prompts take turns, so that each pushes the other out
of the pool; the first time they are computed, from then on they are loaded. Then conversations that take turns: each
turn sends all that was said before, with the tiers and without.
"""

import argparse
import json
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from benchmarks import random_model
from benchmarks.relay import Client
from benchmarks.report import Report, add_common_arguments
from benchmarks.serving import Serving

CONTEXT = 16640
TOKEN_BYTES = 2 * random_model.LAYERS * random_model.KV_HEADS * random_model.HEAD_DIM * 2
TURN_TOKENS, ANSWER_TOKENS = 512, 16
SETTLE_S, TIMEOUT_S = 0.3, 60.0


def with_long_context(folder: Path) -> Path:
    """The same weights under a configuration that takes CONTEXT tokens."""
    source, target = random_model.write(folder), folder.with_name(f"{folder.name}-long")
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.name != "config.json" and not (target / path.name).exists():
            (target / path.name).symlink_to(path.absolute())
    config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": CONTEXT}
    (target / "config.json").write_text(json.dumps(config))
    return target


class Worker:
    """One mixed worker with a pool of so many tokens."""

    def __init__(self, folder: Path, pool_tokens: int, *words: str) -> None:
        self._serving = Serving(
            "--model", str(folder), "--mixed", "1", "--no-restart", "--speculate", "off",
            "--kv-memory", str(pool_tokens * TOKEN_BYTES), *words,
        )  # fmt: skip
        self.client = Client(self._serving.grpc, random_model.VOCABULARY)

    def __enter__(self) -> "Worker":
        self._serving.__enter__()
        self.client.streams([self.client.prompt(64)] * 2, 4)
        return self

    def __exit__(self, *error: object) -> None:
        self._serving.stop()

    def counter(self, name: str) -> float:
        with urllib.request.urlopen(self._serving.url + "/status", timeout=TIMEOUT_S) as answer:
            (worker,) = json.load(answer)["workers"]
        return float(worker["counters"].get(name, 0.0))

    def ttft_s(self, prompt: list[int], max_tokens: int = 1) -> float:
        return self.client.streams([prompt], max_tokens)[0].ttft_s

    def settle(self, tier: str) -> None:
        """Until everything has been saved that is going to be."""
        deadline, before, since = time.monotonic() + TIMEOUT_S, -1.0, 0.0
        while time.monotonic() < deadline:
            now = self.counter(f"kv_{tier}_stored")
            if now != before:
                before, since = now, time.monotonic()
            elif time.monotonic() - since > SETTLE_S + 0.6:  # counters come with a heartbeat
                return
            time.sleep(0.05)
        raise RuntimeError("the worker does not stop saving")


def measure_restore(report: Report, folder: Path, tier: str, words: Sequence[str], length: int, repeats: int) -> None:
    """Rows of one tier and length. Raises RuntimeError when blocks were computed that should have been loaded."""
    with Worker(folder, length + 64, *words) as worker:
        prompts = [worker.client.prompt(length) for _ in range(2)]
        computed: list[float] = []
        for prompt in prompts:
            computed.append(worker.ttft_s(prompt))
            worker.settle(tier)
        before = worker.counter("prompt_tokens_loaded")
        loaded = [worker.ttft_s(prompts[number % 2]) for number in range(repeats)]
        worker.settle(tier)
        share = (worker.counter("prompt_tokens_loaded") - before) / (repeats * length)
    if share < 0.9:
        raise RuntimeError(f"{tier}, {length} tokens: only {100 * share:.0f} % of the tokens were loaded")
    restore, recompute = statistics.median(loaded), min(computed)
    name = f"{length} tokens from {tier}"
    report.row(f"{name}: TTFT computed", 1000 * recompute, "ms")
    report.row(f"{name}: TTFT restored", 1000 * restore, "ms", "computed", restore / recompute, "<= 1")
    report.row(f"{name}: bytes a second, all included", length * TOKEN_BYTES / restore / 1e9, "GB/s")


def conversations(folder: Path, words: Sequence[str], num_conversations: int, num_turns: int) -> list[float]:
    """Median time to the first token of each turn. Conversations take turns; the pool holds less than two of them."""
    longest = num_turns * (TURN_TOKENS + ANSWER_TOKENS)
    with Worker(folder, longest + longest // 2, *words) as worker:
        said: list[list[int]] = [[] for _ in range(num_conversations)]
        medians = []
        for _ in range(num_turns):
            times = []
            for each in said:
                each += worker.client.prompt(TURN_TOKENS)
                times.append(worker.ttft_s(each, ANSWER_TOKENS))
                each += worker.client.prompt(ANSWER_TOKENS)  # what the client keeps of an answer need not be the answer
            medians.append(statistics.median(times))
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_common_arguments(parser)
    default = Path(tempfile.gettempdir()) / "baton-random-246m"
    parser.add_argument("--folder", type=Path, default=default, help="where the random model is, or is written to")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="where the disk tier is put")
    arguments = parser.parse_args()
    folder = with_long_context(arguments.folder)
    report = Report("KV blocks restored and computed, random 246 M model, one mixed worker")
    lengths = (1024, 2048) if arguments.quick else (1024, 2048, 4096, 8192, 16384)
    with tempfile.TemporaryDirectory(prefix="baton-kv-", dir=arguments.disk) as disk:
        host = ("--host-kv-memory", "2GiB")
        tiers = {"host": host, "disk": ("--disk-kv-folder", disk, "--disk-kv-memory", "4GiB")}
        for tier, words in tiers.items():
            for length in lengths:
                measure_restore(report, folder, tier, words, length, 4 if arguments.quick else 6)
        size = (3, 3) if arguments.quick else (4, 6)
        without, with_ = conversations(folder, (), *size), conversations(folder, host, *size)
    for turn, (off, on) in enumerate(zip(without, with_, strict=True), 1):
        name = f"{size[0]} conversations, turn {turn}"
        report.row(f"{name}: TTFT without tiers", 1000 * off, "ms")
        report.row(f"{name}: TTFT with host memory", 1000 * on, "ms", "without", on / off)
    report.note("The disk tier reads past the page cache (O_DIRECT) where the filesystem lets it.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
