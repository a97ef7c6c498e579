"""Baton's engine beside llama.cpp, vLLM on CPU and Transformers: the same random weights, the same shapes, one run.

    python -m benchmarks.engine_peers [--quick] [--json FILE] [--peers FOLDER] [--sides llama.cpp,vLLM-CPU,Transformers]

Every side has all cores and no network, decodes greedily and generates a fixed number of tokens; a side that comes back
with other numbers of tokens, or computes other next tokens, is no peer and is left out with the reason. Measurements
take turns between the sides, round after round, and the best of a side counts. Peers live in environments of their own
(`benchmarks.peers`), which a run without --quick installs when they are missing.

Decode is timed from when all streams of a batch have their first token to when all have their last. Each stream has KV
of its own: the prompt is computed once and its KV copied (vLLM, which cannot: other prompts, computed before). The
naive path at 32 x 1024 is `generate` of Transformers at the same batch and context; see `peers/run_transformers.py`.
"""

import argparse
import importlib.util
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from baton.config import EngineOptions
from benchmarks import random_model
from benchmarks.peers.environments import (
    LLAMA_CPP,
    VLLM,
    Environment,
    Recipe,
    Unavailable,
    add_peers_argument,
    ensure,
    find,
)
from benchmarks.peers.process import PeerProcess, run_script
from benchmarks.peers.protocol import Side, Timed
from benchmarks.relay import Limits, measure_limits, read_bytes
from benchmarks.report import Report, add_common_arguments
from cli.assembly import assemble
from engine.loading import load_model
from engine.model_config import ModelConfig
from engine.requests import EngineRequest, Handover, Reserved, SamplingParams, StepOutput

NAIVE = "Transformers"
SIDES = (LLAMA_CPP.name, VLLM.name, NAIVE)
NUM_CHECKS, CHECK_TOKENS, SAME_MODEL = 16, 32, 0.75
GGUF_TIMEOUT_S = 120.0
QUICK_S = 85.0
"""After this --quick begins no further round, so that it ends within two minutes."""
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Case:
    """One shape. Without new tokens it is the prefill of one prompt."""

    batch: int
    context: int
    new_tokens: int
    rounds: int
    goal: str | None = None
    """For Baton's own figure."""
    best_goal: str | None = None
    """For the ratio to the best peer."""
    naive_goal: str | None = None
    without: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"decode {self.batch} x {self.context}" if self.new_tokens else f"prefill of {self.context}"


def cases(quick: bool) -> list[Case]:
    new_tokens, rounds = (16, 3) if quick else (64, 5)
    decode = [
        Case(1, 128, new_tokens, rounds, ">= 72 tok/s"),
        Case(8, 128, new_tokens, rounds, ">= 380 tok/s", ">= 1.6"),
        Case(32, 128, new_tokens, rounds, ">= 600 tok/s", ">= 1.8"),
    ]
    # vLLM cannot be given KV: it would compute 32 x 1024 tokens for a minute and a half first.
    long = Case(
        32, 1024, 4 if quick else 8, 1 if quick else 3, naive_goal=">= 8", without=(VLLM.name,) if quick else ()
    )
    return [*decode, long, Case(1, 2048, 0, 2 if quick else 5, ">= 800 tok/s", ">= 1.25")]


class Baton:
    """The engine of this repository as a side, with the options of a worker."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(CORES)
        # Plain decode, and no stream runs beside a prompt here, so nothing need wait for one.
        options = EngineOptions(dtype="bfloat16", device="cpu", kv_memory="1GiB", step_stretch=0.0, speculate="off")
        self._parts = assemble(load_model(folder, options.dtype, page_size=options.page_size), options)
        self._engine = self._parts.engine
        self._num_requests = 0
        self.about = f"{self._parts.model.ops.name} kernels, {torch.get_num_threads()} threads"

    def next_tokens(self, prompts: Sequence[list[int]]) -> list[int]:
        return [self._finish(self._request(prompt, 1))[0] for prompt in prompts]

    def prefill(self, prompt: list[int]) -> Timed:
        start = time.perf_counter()
        tokens = self._finish(self._request(prompt, 1))
        return Timed(time.perf_counter() - start, len(prompt), [len(prompt) + len(tokens)], tokens)

    def decode(self, prompt: list[int], batch: int, new_tokens: int) -> Timed:
        """The streams take over KV as a decode worker does: copied into their own blocks before they begin."""
        giver = self._request(prompt, 2, Handover.GIVE)
        outputs = self._run()
        given = [block for output in outputs for each in output.computed for block in each.block_ids]
        first_token = outputs[-1].tokens[-1].token_id
        streams = [self._request(prompt, 1 + new_tokens, Handover.TAKE) for _ in range(batch)]
        for reserved in self._reserved(batch):
            self._parts.memory.blocks[list(reserved.block_ids[: len(given)])] = self._parts.memory.blocks[given]
        for stream in streams:
            self._engine.receive(stream, len(prompt), first_token)
        start = time.perf_counter()
        outputs = self._run()
        seconds = time.perf_counter() - start
        self._engine.release_lease(giver)
        tokens = {stream: _tokens(outputs, stream) for stream in streams}
        lengths = [len(prompt) + len(each) for each in tokens.values()]
        return Timed(seconds, sum(map(len, tokens.values())) - batch, lengths, tokens[streams[0]])

    def _request(self, prompt: list[int], max_tokens: int, handover: Handover = Handover.NONE) -> str:
        """Add one that shares no blocks with any other."""
        self._num_requests += 1
        sampling, root = SamplingParams(max_tokens=max_tokens), self._num_requests.to_bytes(16, "big")
        request = EngineRequest(f"{self._num_requests}", tuple(prompt), len(prompt), sampling, root, handover)
        self._engine.add(request)
        return request.id

    def _reserved(self, batch: int) -> list[Reserved]:
        reserved = [each for output in self._run() for each in output.reserved]
        if len(reserved) != batch:
            raise RuntimeError(f"{len(reserved)} of {batch} streams have blocks; there are too few")
        return reserved

    def _run(self) -> list[StepOutput]:
        """Steps until nothing is left to compute."""
        outputs = [self._engine.step()]
        while self._engine.has_work():
            outputs.append(self._engine.step())
        return outputs

    def _finish(self, request_id: str) -> list[int]:
        return _tokens(self._run(), request_id)


def _tokens(outputs: Sequence[StepOutput], request_id: str) -> list[int]:
    return [token.token_id for output in outputs for token in output.tokens if token.request_id == request_id]


@dataclass
class Contest:
    """The sides that take part, what they reached, and why others do not."""

    sides: dict[str, Side] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    best: dict[tuple[str, str], float] = field(default_factory=dict)
    """Tokens a second by (case, side)."""

    def skip(self, name: str, reason: str) -> None:
        """Leave a peer out. Raises SystemExit for Baton: without it there is nothing to compare."""
        if name == "Baton":
            raise SystemExit(f"Baton: {reason}")
        self.skipped[name] = reason
        side = self.sides.pop(name, None)
        if isinstance(side, PeerProcess):
            side.close()

    def measure(self, case: Case, prompt: list[int]) -> None:
        """Once on every side, one after another."""
        for name, side in list(self.sides.items()):
            if name in case.without:
                continue
            try:
                timed = side.decode(prompt, case.batch, case.new_tokens) if case.new_tokens else side.prefill(prompt)
                check_shape(case, timed)
            except Unavailable as reason:
                self.skip(name, str(reason))
                continue
            self.best[case.name, name] = max(timed.rate, self.best.get((case.name, name), 0.0))
            print(f"{case.name}: {name} {timed.rate:.0f} tok/s in {timed.seconds:.2f} s", file=sys.stderr)

    def check_same_model(self, report: Report, prompts: Sequence[list[int]]) -> None:
        """Compare next tokens with those of Transformers, or else of ours; leave out who computes something else."""
        answers: dict[str, list[int]] = {}
        for name, side in list(self.sides.items()):
            try:
                answers[name] = side.next_tokens(prompts)
            except Unavailable as reason:
                self.skip(name, str(reason))
        judge = NAIVE if NAIVE in answers else next(iter(answers))
        for name, tokens in answers.items():
            if name == judge:
                continue
            equal = sum(mine == theirs for mine, theirs in zip(tokens, answers[judge], strict=True))
            report.row(f"same next token as {judge}: {name}", equal, f"of {len(prompts)}", judge,
                       equal / len(prompts), f">= {SAME_MODEL}")  # fmt: skip
            if equal < SAME_MODEL * len(prompts):
                self.skip(name, f"it computes another model: {equal} of {len(prompts)} next tokens as {judge}")


def check_shape(case: Case, timed: Timed) -> None:
    """Raises Unavailable unless a side did exactly the work that was asked for."""
    lengths = [case.context + 1 + case.new_tokens] * case.batch
    num_timed = case.batch * case.new_tokens if case.new_tokens else case.context
    if timed.lengths != lengths or timed.num_timed != num_timed:
        raise Unavailable(
            f"{case.name}: streams of {sorted(set(timed.lengths))} tokens, {timed.num_timed} of them timed; "
            f"{lengths[0]} and {num_timed} were asked for"
        )


def start_peers(contest: Contest, folder: Path, root: Path, names: Sequence[str], install: bool) -> None:
    """Side by side, as each takes its time; then `contest.sides` has those that are ready."""
    starting: dict[str, PeerProcess] = {}
    for name in names:
        try:
            starting[name] = _start(name, folder, root, install)
        except Unavailable as reason:
            contest.skip(name, str(reason))
    for name, process in starting.items():
        try:
            contest.notes.append(f"{name}: {process.wait_until_ready()}")
            contest.sides[name] = process
        except Unavailable as reason:
            contest.skip(name, str(reason))


def _start(name: str, folder: Path, root: Path, install: bool) -> PeerProcess:
    def environment(recipe: Recipe) -> Environment:
        if install:
            return ensure(recipe, root)
        try:
            return find(recipe, root)
        except Unavailable as lack:
            raise Unavailable(f"{lack}; `python -m benchmarks.peers.environments` installs it") from None

    if name == LLAMA_CPP.name:
        prepared = environment(LLAMA_CPP)
        file = folder / "model.gguf"
        if not file.exists() or file.stat().st_mtime < (folder / "model.safetensors").stat().st_mtime:
            run_script(
                prepared, "write_gguf.py", str(folder.absolute()), str(file.absolute()), timeout_s=GGUF_TIMEOUT_S
            )
        return PeerProcess(name, prepared, "run_llama_cpp.py", str(file.absolute()), str(CORES))
    if name == VLLM.name:
        return PeerProcess(name, environment(VLLM), "run_vllm.py", str(folder.absolute()), str(CORES))
    if importlib.util.find_spec("transformers") is None:
        raise Unavailable("transformers is not installed beside Baton; `pip install transformers` does it")
    own = Environment(Path(sys.executable), {})
    return PeerProcess(name, own, "run_transformers.py", str(folder.absolute()), str(CORES))


def limit_rate(case: Case, config: ModelConfig, weight_bytes: int, limits: Limits) -> float:
    """Tokens a second of a machine that reads weights and KV once a step and does nothing but the products.

    The slower of the two counts, as if the other hid behind it completely.
    """
    kv_token_bytes = 4 * config.num_layers * config.num_kv_heads * config.head_dim
    kv_tokens = case.batch * (case.context + case.new_tokens / 2)
    product_flops = weight_bytes if case.new_tokens else weight_bytes - 2 * config.vocab_size * config.hidden_size
    seen = case.context + case.new_tokens / 2 if case.new_tokens else case.context / 2
    flops = product_flops + 4 * seen * config.num_layers * config.num_heads * config.head_dim
    tokens = case.batch if case.new_tokens else case.context
    read_s = (weight_bytes + kv_tokens * kv_token_bytes) / limits.read_bytes_s
    return tokens / max(read_s, tokens * flops / limits.flops)


def add_rows(report: Report, contest: Contest, case: Case, limit: float) -> None:
    ours = contest.best[case.name, "Baton"]
    peers = {name: contest.best[case.name, name] for name in SIDES if (case.name, name) in contest.best}
    best = max(peers, key=lambda name: peers[name], default=None)
    versus, ratio = (f"best peer, {best}", ours / peers[best]) if best else (None, None)
    report.row(f"{case.name}: Baton", ours, "tok/s", versus, ratio, case.goal)
    for name, rate in peers.items():
        goal = case.naive_goal if name == NAIVE and case.naive_goal else case.best_goal if name == best else None
        naive = " (naive)" if name == NAIVE and case.naive_goal else ""
        report.row(f"{case.name}: {name}{naive}", rate, "tok/s", "Baton is", ours / rate, goal)
    report.row(f"{case.name}: limit of the machine", limit, "tok/s", "Baton is", ours / limit)


def run(report: Report, contest: Contest, folder: Path, planned: Sequence[Case], last_round_at: float) -> None:
    """No round but the first begins after `last_round_at`, `time.monotonic()` seconds."""
    config = ModelConfig.load(folder)
    numbers = random.Random(7)

    def prompt(length: int) -> list[int]:
        return [numbers.randrange(3, config.vocab_size) for _ in range(length)]

    contest.check_same_model(report, [prompt(CHECK_TOKENS) for _ in range(NUM_CHECKS)])
    limits = measure_limits()
    fixed = {case.name: prompt(case.context) for case in planned}
    num_rounds = max(case.rounds for case in planned)
    for number in range(num_rounds):
        if number and time.monotonic() > last_round_at:
            contest.notes.append(f"{number} of {num_rounds} rounds: there was no time for more.")
            break
        for case in planned:
            if number < case.rounds:
                # Decode goes on behind the same prompt; for prefill a cache must not know it.
                contest.measure(case, fixed[case.name] if case.new_tokens else prompt(case.context))
        again = measure_limits()
        limits = Limits(max(limits.read_bytes_s, again.read_bytes_s), max(limits.flops, again.flops))
    report.row("memory read, all cores", limits.read_bytes_s / 1e9, "GB/s")
    report.row("bf16 matrix product, all cores", limits.flops / 1e9, "GFLOP/s")
    for case in planned:
        add_rows(report, contest, case, limit_rate(case, config, read_bytes(folder, config), limits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    add_peers_argument(parser)
    parser.add_argument("--sides", default=",".join(SIDES), help="peers to measure (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "baton-random-246m",
                        help="where the random model is, or is written to (1 GB)")  # fmt: skip
    arguments = parser.parse_args()
    names = [name for name in arguments.sides.split(",") if name]
    if unknown := set(names) - set(SIDES):
        parser.error(f"--sides: {', '.join(sorted(unknown))}; choose from {', '.join(SIDES)}")
    folder = random_model.write(arguments.folder)
    last_round_at = time.monotonic() + QUICK_S if arguments.quick else math.inf
    report, contest = Report("The engine beside its peers, random 246 M model, bfloat16"), Contest()
    try:
        start_peers(contest, folder, arguments.peers, names, install=not arguments.quick)
        baton = Baton(folder)
        contest.notes.append(f"Baton: {baton.about}")
        contest.sides = {"Baton": baton, **contest.sides}
        run(report, contest, folder, cases(arguments.quick), last_round_at)
    finally:
        for side in contest.sides.values():
            if isinstance(side, PeerProcess):
                side.close()
    for name, reason in contest.skipped.items():
        report.row(f"{name} skipped: {reason}", 0, "rows")
    for note in contest.notes:
        report.note(note)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
