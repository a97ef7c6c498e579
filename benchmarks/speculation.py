"""Decoding with and without n-gram speculation, side by side in one process, through the engine.

Four kinds of text, as what repeats decides everything:

- repetitive: greedy, after a prompt of one word; a random model then says the same few words again and again.
- random: drawn at temperature 1 from 32,000 words; nothing ever repeats, so nothing is guessed.
- misleading: drawn from 24 words; what was said before keeps occurring, and always goes on in another way.
- source code: the demo model goes on with a piece of its own repository, greedily.

The two engines take turns step by step, so that whatever else the machine does slows both; the best of several runs
counts. Prompts have been answered once, so that the prefix cache lets all streams begin together. The share of output
tokens that were guessed is printed with every figure. Speculation must not change a stream: in float32 it never does
(tests/engine). In bfloat16 the arithmetic of a step rounds by its number of rows, so two nearly equal scores may change
places; how many streams are the same is printed, too.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from baton.block_names import root_name
from baton.config import EngineOptions
from benchmarks import random_model
from benchmarks.report import Report, add_common_arguments
from cli.assembly import Parts, assemble
from cli.model import DEMO_FOLDER, threads_for
from engine.loading import LoadedModel, load_model
from engine.requests import EngineRequest, SamplingParams

PROMPT_TOKENS = 128
FEW_WORDS = tuple((100 + word, 40.0) for word in range(24))
OPTIONS = EngineOptions(dtype="bfloat16", kv_memory="256MiB", max_batch_tokens=512, device="cpu")


@dataclass(frozen=True)
class Work:
    """Streams that run side by side."""

    name: str
    prompts: list[list[int]]
    sampling: SamplingParams
    goal: str | None

    def requests(self, run: str) -> list[EngineRequest]:
        """With a seed each, the same in every run."""
        root = root_name("speculation")
        return [
            EngineRequest(
                f"{run} {number}", tuple(prompt), len(prompt), replace(self.sampling, seed=self.sampling.seed + number),
                root,
            )
            for number, prompt in enumerate(self.prompts)
        ]  # fmt: skip


class Run:
    """One engine at work; steps are counted from when all streams have begun until the first has ended."""

    def __init__(self, parts: Parts, requests: list[EngineRequest]) -> None:
        self._engine = parts.engine
        self._guessed_before = parts.engine.counters["draft_tokens_accepted"]
        self._ended = False
        self.seconds = 0.0
        self.num_tokens = 0
        self.streams: dict[str, list[int]] = {request.id: [] for request in requests}
        for request in requests:
            self._engine.add(request)

    @property
    def has_work(self) -> bool:
        return self._engine.has_work()

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.num_tokens / self.seconds

    @property
    def guessed_share(self) -> float:
        """Of the output tokens, those that were right guesses."""
        right = self._engine.counters["draft_tokens_accepted"] - self._guessed_before
        return right / sum(map(len, self.streams.values()))

    def step(self) -> None:
        counts = all(self.streams.values()) and not self._ended
        start = time.perf_counter()
        output = self._engine.step()
        if counts:
            self.seconds += time.perf_counter() - start
            self.num_tokens += len(output.tokens)
        for token in output.tokens:
            self.streams[token.request_id].append(token.token_id)
        self._ended = self._ended or bool(output.ended)


def compare(report: Report, plain: Parts, speculating: Parts, work: Work, repeats: int) -> None:
    """Rows for both; the engine that is behind takes the next step."""
    for parts in (plain, speculating):
        warming = Run(parts, replace(work, sampling=replace(work.sampling, max_tokens=1)).requests(f"{work.name} warm"))
        while warming.has_work:
            warming.step()
    rates: list[tuple[float, float]] = []
    for number in range(repeats):
        requests = work.requests(f"{work.name} {len(work.prompts)} {number}")
        runs = Run(plain, requests), Run(speculating, requests)
        while at_work := [run for run in runs if run.has_work]:
            min(at_work, key=lambda run: run.num_tokens).step()
        rates.append((runs[0].rate, runs[1].rate))
    without, with_ = (max(rate[side] for rate in rates) for side in (0, 1))
    name = f"{work.name}, batch {len(work.prompts)}"
    report.row(f"{name}: plain", without, "tok/s")
    report.row(f"{name}: n-grams", with_, "tok/s", "plain", with_ / without, work.goal)
    same = sum(runs[1].streams[request_id] == stream for request_id, stream in runs[0].streams.items())
    report.note(f"{name}: {100 * runs[1].guessed_share:.0f} % of the tokens were guessed, {same} streams the same")


def random_works(vocabulary: int, batches: Sequence[int], num_tokens: int) -> list[Work]:
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> list[int]:
        drawn: list[int] = torch.randint(3, vocabulary, (count,), generator=generator).tolist()
        return drawn

    works = []
    for batch in batches:
        length = max(24, num_tokens // (1 if batch == 1 else 4))
        greedy = SamplingParams(max_tokens=length)
        drawn = replace(greedy, temperature=1.0, seed=batch)
        one_word = [words(1) * PROMPT_TOKENS for _ in range(batch)]
        mixed = [words(PROMPT_TOKENS) for _ in range(batch)]
        works += [
            Work("repetitive", one_word, greedy, ">= 2" if batch == 1 else None),
            Work("random", mixed, drawn, ">= 0.95"),
            Work("misleading", mixed, replace(drawn, logit_bias=FEW_WORDS), ">= 0.95"),
        ]
    return works


def source_works(num_tokens: int) -> list[Work]:
    tokenizer = Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(Path(__file__).read_text()).ids
    return [
        Work("source code", [ids[start : start + 512] for start in range(0, 64 * batch, 64)],
             SamplingParams(max_tokens=num_tokens), None)
        for batch in (1, 8)
    ]  # fmt: skip


def report_model(report: Report, model: LoadedModel, name: str, works: list[Work], repeats: int) -> None:
    plain, speculating = (assemble(model, replace(OPTIONS, speculate=speculate)) for speculate in ("off", "ngram"))
    try:
        for work in works:
            compare(report, plain, speculating, replace(work, name=f"{name}: {work.name}"), repeats)
    finally:
        plain.memory.close()
        speculating.memory.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "baton-random-246m",
                        help="where the random model is, or is written to (0.5 GB)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes all cores")
    arguments = parser.parse_args()
    repeats, num_tokens = (2, 160) if arguments.quick else (5, 400)
    report = Report("Decoding with n-gram speculation beside plain decoding")
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    model = load_model(random_model.write(arguments.folder), "bfloat16")
    works = random_works(model.config.vocab_size, (1, 8, 32), num_tokens)
    report_model(report, model, "random 246 M", works, repeats)
    torch.set_num_threads(threads_for(OPTIONS, DEMO_FOLDER))
    report_model(report, load_model(DEMO_FOLDER, "bfloat16"), "demo", source_works(num_tokens), repeats)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
