"""What a hand-over costs beyond its bytes: TTFT and the first inter-token gap, cut into queue, compute, wire and wait.

    python -m benchmarks.handover [--quick] [--json FILE] [--kinds shm,direct,tcp,page64] [--lengths 512,2048]

A `baton serve` with one prefill and one decode worker for each kind of hand-over, whose processes note when they pass
the seams of a hand-over (`benchmarks.watched`). Prompts of random ids, none of which was seen before, come one at a
time and to each kind by turns; one mixed worker, which nobody watches, says which tokens are right.

Beyond the wire: the first gap without the copies and checksums in it and without an ordinary gap, the median of the
later ones. Until decode: from the end of the prompt's last step to the first step of decode, without copies and
checksums; part of that runs beside the first token's way to the client, so that nobody sees it in a gap.
"""

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from baton.v1 import inference_pb2, inference_pb2_grpc
from benchmarks import random_model, watched
from benchmarks.report import Report, add_common_arguments
from benchmarks.serving import Serving
from benchmarks.tiers import CONTEXT, TOKEN_BYTES, with_long_context
from benchmarks.timeline import (
    COMPUTE,
    FRONT_DOOR,
    QUEUE,
    UNNAMED,
    WAIT,
    WIRE,
    HandOver,
    NoHandOver,
    Parts,
    Seen,
    of_kind,
    understand,
)

KINDS = {
    "shm": ("--lanes", "shm"),
    "direct": ("--lanes", "shm", "--direct-wait-s", "1"),
    "tcp": ("--lanes", "tcp"),
    "page64": ("--lanes", "shm", "--page-size", "64"),
}
ABOUT = {
    "shm": "pulled from shared memory, blocks of 256 KiB",
    "direct": "written in place (--direct-wait-s 1)",
    "tcp": "pulled over loopback TCP",
    "page64": "as shm, with blocks of 1 MiB (--page-size 64)",
}
LENGTHS, QUICK_LENGTHS = (512, 1024, 2048, 4096, 8192), (512, 2048)
CHUNK_TOKENS = 512
NEW_TOKENS = 10
GOAL = "<= 5 ms"
TIMEOUT_S = 120.0
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Answer:
    """What the client got; CLOCK_MONOTONIC nanoseconds."""

    sent: int
    times: list[int]
    token_ids: list[int]


async def ask(address: str, prompt: Sequence[int]) -> Answer:
    """One greedy stream, over a connection that is there before the clock starts."""
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
        stub = inference_pb2_grpc.InferenceStub(channel)
        sampling = inference_pb2.Sampling(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=prompt), sampling=sampling)
        answer = Answer(time.monotonic_ns(), [], [])
        async for response in stub.Generate(request, timeout=TIMEOUT_S):
            answer.times.extend([time.monotonic_ns()] * len(response.token_ids))
            answer.token_ids.extend(response.token_ids)
    return answer


class Deployment:
    """A prefill and a decode worker that hand over by one kind, and what their processes noted."""

    def __init__(self, kind: str, words: Sequence[str], folder: Path) -> None:
        self.kind = kind
        self._folder = folder
        folder.mkdir()
        self._serving = Serving(
            *words, *KINDS[kind], "--prefill", "1", "--decode", "1",
            env={"PYTHONPATH": str(ROOT)}, command=(watched.MODULE, str(folder)),
        )  # fmt: skip
        self.answers: list[tuple[int, Answer]] = []

    def __enter__(self) -> "Deployment":
        self._serving.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._serving.stop()

    def ask(self, prompt: Sequence[int]) -> Answer:
        return asyncio.run(ask(self._serving.grpc, prompt))

    def check(self) -> None:
        """Raises SystemExit when blocks came in another way than this kind's."""
        counters = self._serving.worker("decode-0")
        lane, direct = (
            counters["lanes_in_use"].get("prefill-0"),
            counters["counters"].get("handover_blocks_direct", 0.0),
        )
        if lane != KINDS[self.kind][1] or bool(direct) != (self.kind == "direct"):
            raise SystemExit(f"{self.kind}: blocks came by {lane}, {direct:.0f} written in place")

    def hand_overs(self) -> dict[int, list[HandOver]]:
        """By length of the prompt. Raises SystemExit where a request was not handed over."""
        calls = {name: watched.read(self._folder / name) for name in ("prefill", "decode", "coordinator")}
        result = defaultdict(list)
        for length, answer in self.answers:
            inside = {
                name: [call for call in noted if answer.sent <= call.start <= answer.times[-1]]
                for name, noted in calls.items()
            }
            try:
                result[length].append(understand(Seen(answer.sent, answer.times, **inside)))
            except NoHandOver as error:
                raise SystemExit(f"{self.kind}, {length} tokens: {error}") from error
        return result


def measure(
    folder: Path, kinds: Sequence[str], lengths: Sequence[int], repeat: int
) -> dict[str, dict[int, list[HandOver]]]:
    """By kind and length. Raises SystemExit when tokens are wrong."""
    pool_tokens = max(lengths) * 5 // 4 + 64
    words = (
        "--model", str(folder), "--dtype", "bfloat16", "--speculate", "off", "--no-restart",
        "--routing", "least_loaded", "--max-batch-tokens", str(CHUNK_TOKENS),
        "--kv-memory", str(pool_tokens * TOKEN_BYTES),
    )  # fmt: skip
    numbers = random.Random(1)

    def prompt(length: int) -> list[int]:
        return [numbers.randrange(3, random_model.VOCABULARY) for _ in range(length)]

    # The longest goes through the whole pool, so that no page of it is touched for the first time while it counts.
    warm_up = [prompt(max(lengths)), prompt(min(lengths))]
    prompts = [prompt(length) for _ in range(repeat) for length in lengths]
    with tempfile.TemporaryDirectory(prefix="baton-handover-") as notes, contextlib.ExitStack() as stack:
        deployments = [stack.enter_context(Deployment(kind, words, Path(notes, kind))) for kind in kinds]
        for each in warm_up:
            for deployment in deployments:
                deployment.ask(each)
        for each in prompts:
            for deployment in deployments:
                deployment.answers.append((len(each), deployment.ask(each)))
        for deployment in deployments:
            deployment.check()
        results = {deployment.kind: deployment.hand_overs() for deployment in deployments}
        answers = {
            deployment.kind: [answer.token_ids for _, answer in deployment.answers] for deployment in deployments
        }
    with Serving(*words, "--mixed", "1") as mixed:
        right = [asyncio.run(ask(mixed.grpc, each)).token_ids for each in prompts]
    for kind, tokens in answers.items():
        wrong = [len(each) for each, ours, theirs in zip(prompts, tokens, right, strict=True) if ours != theirs]
        if wrong:
            raise SystemExit(
                f"{kind}: {len(wrong)} of {len(right)} answers differ from a mixed worker's, lengths {wrong}"
            )
    return results


def add_rows(report: Report, kind: str, length: int, hand_overs: Sequence[HandOver], others: dict[str, float]) -> None:
    """`others`: figures of the same prompts by the first kind, by what they are; filled by that kind."""
    name, first = f"{kind}, {length}", not others

    def row(what: str, value: Callable[[HandOver], float], goal: str | None = None) -> None:
        median_ms = statistics.median(map(value, hand_overs)) / 1e6
        other = others.setdefault(what, median_ms)
        compared = bool(other) and not first
        report.row(
            f"{name}: {what}", median_ms, "ms", "pulled" if compared else None, median_ms / other if compared else None,
            goal,
        )  # fmt: skip

    row("TTFT", lambda each: each.ttft.total())
    row("first gap", lambda each: each.first_gap.total())
    row("an ordinary gap", lambda each: each.step)
    row("wire in the first gap", lambda each: of_kind(each.first_gap, WIRE))
    row("wait in the first gap", lambda each: of_kind(each.first_gap, WAIT))
    row("beyond the wire, p50", lambda each: each.beyond_wire, GOAL)
    row("until decode, beyond the wire, p50", lambda each: each.until_decode_beyond_wire, GOAL)
    middle = sorted(hand_overs, key=lambda each: each.beyond_wire)[len(hand_overs) // 2]
    report.note(
        f"{name}: TTFT {sums(middle.ttft, FRONT_DOOR, QUEUE, COMPUTE, WAIT)}; "
        f"first gap {sums(middle.first_gap, WIRE, COMPUTE, WAIT)}"
    )
    report.note(f"{name}: TTFT, p50: {hops([each.ttft for each in hand_overs])}")
    report.note(f"{name}: last step to second token, p50: {hops([each.relay for each in hand_overs])}")


def sums(parts: Parts, *kinds: str) -> str:
    """'10.00 = wire 1.00 + …, residual 0.00' of one request, in milliseconds."""
    named = [(kind, of_kind(parts, kind)) for kind in kinds]
    residual = parts.total() - sum(nanoseconds for _, nanoseconds in named)
    terms = " + ".join(f"{kind} {nanoseconds / 1e6:.2f}" for kind, nanoseconds in named)
    return f"{parts.total() / 1e6:.2f} = {terms}, residual {residual / 1e6:.2f}"


def hops(each: Sequence[Parts]) -> str:
    """Each part's median of all requests, in milliseconds."""
    names = list(dict.fromkeys(part for parts in each for part in parts))
    return "; ".join(
        f"{part.what or UNNAMED} {statistics.median(parts[part] for parts in each) / 1e6:.2f}" for part in names
    )


class Others:
    """What other programs, and other guests of the host, take of the cores from now on."""

    def __init__(self) -> None:
        self._before = self._times()

    def share(self) -> float:
        """Of all cores' time; to be asked when the processes of this one have ended."""
        (total, busy, own), before = self._times(), self._before
        return (busy - before[1] - (own - before[2])) / (total - before[0])

    @staticmethod
    def _times() -> tuple[float, float, float]:
        """Seconds of all cores, of those that were not idle, and of this process and its children."""
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        times = [int(word) / os.sysconf("SC_CLK_TCK") for word in words]
        own = os.times()
        return sum(times), sum(times) - times[3] - times[4], sum(own[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--kinds", default="", help=f"of {','.join(KINDS)}; all, and without page64 with --quick")
    parser.add_argument("--lengths", default="", help="tokens of prompts, such as 512,2048")
    parser.add_argument("--repeat", type=int, help="prompts of each length (default: 9, or 5 with --quick)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "baton-random-246m",
                        help="where the random model is, or is written to (0.5 GB)")  # fmt: skip
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",") if arguments.kinds else list(KINDS)[: 3 if arguments.quick else None]
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds names {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    default_lengths = QUICK_LENGTHS if arguments.quick else LENGTHS
    lengths = [int(word) for word in arguments.lengths.split(",")] if arguments.lengths else list(default_lengths)
    if not all(CHUNK_TOKENS <= length <= CONTEXT - NEW_TOKENS for length in lengths):
        parser.error(f"--lengths are from {CHUNK_TOKENS} to {CONTEXT - NEW_TOKENS}")
    repeat = arguments.repeat or (5 if arguments.quick else 9)
    others = Others()
    results = measure(with_long_context(arguments.folder), kinds, lengths, repeat)
    share = others.share()
    report = Report("Hand-overs beyond the wire: TTFT and the first gap, in parts")
    for length in lengths:
        figures: dict[str, float] = {}
        for kind in kinds:
            add_rows(report, kind, length, results[kind][length], figures)
    for kind in kinds:
        report.note(f"{kind}: {ABOUT[kind]}")
    report.note("All tokens are those of one mixed worker. Not measured here: vLLM's NIXL connector, which is said to "
                "take 168 ms beyond the wire (vLLM#50913).")  # fmt: skip
    report.note(f"Other programs took {100 * share:.0f} % of the cores; above 5 % figures are theirs as much as ours.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
