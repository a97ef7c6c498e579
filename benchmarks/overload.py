"""What a server is worth when far more is asked of it than it can do: goodput at 0.5 to 10 times its capacity.

    python -m benchmarks.overload [--quick] [--json FILE]

`baton serve` with the bundled model in one mixed worker, on a few slots, so that its capacity is a few requests a
second and neither the refusals nor this client take the machine from it. Arrivals are random and do not wait for
answers (open loop). A request is good when its first token came within the target and its answer is complete; goodput
is good requests a second. Clients hang up after a while without a first token.

    capacity   requests a second with every slot taken, always (closed loop)
    peak       the best goodput of all levels, with admission
    beside     the capacity again, right before and after ten times as much: other load changes it by the minute
    recovery   from the end of ten times the capacity until the first request that is good again

The same is done with admission switched off (--service-classes standard=0/0): then --max-requests alone refuses.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
import urllib.parse
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import uvloop

from benchmarks.report import Report, add_common_arguments
from benchmarks.serving import Serving

SLOTS, TARGET_S, PATIENCE_S = 4, 1.5, 5.0
WANTED_CAPACITY = 4.0
"""Requests a second: answers are made so long."""
PROMPT_TOKENS, FIRST_WORD, LAST_WORD = 16, 300, 4000
FULL_TIMES, QUICK_TIMES = (1.0, 2.0, 5.0, 0.5, 10.0), (1.0, 0.5, 10.0)
"""In this order: the worst comes when nothing is known of any overload any more."""
WARM_S = 2.0
"""Of a level, before it counts: free slots take more than a server can go on with."""
PROBE_S, GIVE_UP_S = 0.1, 60.0


@dataclass(frozen=True)
class Plan:
    times: tuple[float, ...]
    level_s: float
    overload_s: float
    calibrate_s: float
    after_s: float


FULL, QUICK = Plan(FULL_TIMES, 20.0, 60.0, 10.0, 10.0), Plan(QUICK_TIMES, 6.0, 12.0, 3.0, 3.0)


@dataclass(slots=True)
class Sample:
    """What became of one request."""

    status: int = 0
    """0: the client hung up first."""
    ttft_s: float = 0.0
    """Until the status came; a 200 comes with the first token."""
    at_s: float = 0.0
    """When that was, in its level."""
    complete: bool = False

    @property
    def good(self) -> bool:
        return self.complete and self.ttft_s <= TARGET_S


class Load:
    """Sends requests; as little work each as possible, because it shares the machine with what it measures."""

    def __init__(self, url: str, answer_tokens: int) -> None:
        self._host, _, port = urllib.parse.urlparse(url).netloc.partition(":")
        self._port = int(port)
        self.answer_tokens = answer_tokens
        self._random = random.Random(3)

    async def one(self, level_began: float = 0.0) -> Sample:
        sample = Sample()
        prompt = [self._random.randrange(FIRST_WORD, LAST_WORD) for _ in range(PROMPT_TOKENS)]
        fields = {"prompt": prompt, "max_tokens": self.answer_tokens, "ignore_eos": True, "stream": True}
        body = json.dumps(fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        started = time.perf_counter()
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(head.encode() + body)
            async with asyncio.timeout(PATIENCE_S):
                sample.status = int((await reader.readuntil(b"\r\n\r\n"))[9:12])
            now = time.perf_counter()
            sample.ttft_s, sample.at_s = now - started, now - level_began
            end = b""
            while piece := await reader.read(1 << 16):
                end = (end + piece)[-64:]
            sample.complete = sample.status == 200 and b"[DONE]" in end
        except TimeoutError:
            sample.ttft_s = PATIENCE_S
        finally:
            writer.close()
        return sample

    async def closed(self, seconds: float) -> float:
        """Answers a second with SLOTS requests always under way."""
        end, done = time.perf_counter() + seconds, 0

        async def client() -> None:
            nonlocal done
            while time.perf_counter() < end:
                complete = (await self.one()).complete
                done += complete

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(SLOTS)))
        return done / (time.perf_counter() - started)

    async def open(self, rate: float, seconds: float) -> list["asyncio.Task[Sample]"]:
        """Poisson arrivals; returns when the last one has been sent."""
        tasks: list[asyncio.Task[Sample]] = []
        start = due = time.perf_counter()
        while (due := due + self._random.expovariate(rate)) < start + seconds:
            await asyncio.sleep(due - time.perf_counter())
            tasks.append(asyncio.create_task(self.one(start)))
        return tasks


@dataclass(frozen=True)
class Level:
    times: float
    seconds: float
    samples: list[Sample]

    @property
    def goodput(self) -> float:
        """Good first tokens a second, while requests came."""
        counted = sum(sample.good and WARM_S <= sample.at_s < self.seconds for sample in self.samples)
        return counted / (self.seconds - WARM_S)

    @property
    def refused(self) -> list[float]:
        """How long each refusal took."""
        return [sample.ttft_s for sample in self.samples if sample.status == 429]

    def __str__(self) -> str:
        late = sum(sample.status == 200 and not sample.good for sample in self.samples)
        gone = sum(sample.status == 0 for sample in self.samples)
        return f"{len(self.samples)} asked, {len(self.refused)} refused, {late} late, {gone} hung up"


@dataclass(frozen=True)
class Result:
    levels: dict[float, Level]
    recovery_s: float
    after: Level
    beside: float
    """Capacity right before and after the overload: other load on the machine changes it by the minute."""


async def measure(load: Load, capacity: float, plan: Plan, idle: Callable[[], Awaitable[None]]) -> Result:
    levels: dict[float, Level] = {}
    for times in plan.times:
        if times == plan.times[-1]:
            before = await load.closed(plan.calibrate_s)
        seconds = plan.overload_s if times == plan.times[-1] else plan.level_s
        tasks = await load.open(times * capacity, seconds)
        if times != plan.times[-1]:
            await idle()
            levels[times] = Level(times, seconds, await asyncio.gather(*tasks))
    ended = time.perf_counter()
    recovery_s = GIVE_UP_S
    for _ in range(round(GIVE_UP_S / PROBE_S)):
        asked_s = time.perf_counter() - ended
        if (probe := await load.one()).good or asked_s > GIVE_UP_S:
            recovery_s = min(GIVE_UP_S, asked_s + probe.ttft_s)
            break
        await asyncio.sleep(PROBE_S)
    after = await load.open(0.5 * capacity, plan.after_s)
    levels[plan.times[-1]] = Level(plan.times[-1], plan.overload_s, await asyncio.gather(*tasks))
    rest = Level(0.5, plan.after_s, await asyncio.gather(*after))
    await idle()
    return Result(levels, recovery_s, rest, (before + await load.closed(plan.calibrate_s)) / 2)


def serve_and_measure(classes: str, plan: Plan, answer_tokens: int, capacity: float) -> tuple[Result, int, float]:
    """`answer_tokens` and `capacity`: 0 where they are to be found out."""
    words = ("--mixed", "1", "--max-running", str(SLOTS), "--threads", "1", "--speculate", "off")
    with Serving(*words, "--service-classes", classes, "--no-restart") as serving:

        async def run() -> tuple[Result, int, float]:
            load, wanted = Load(serving.url, answer_tokens or 64), capacity
            await load.closed(1.0)
            if not answer_tokens:
                tokens_per_s = await load.closed(plan.calibrate_s) * load.answer_tokens
                load.answer_tokens = max(16, min(1024, round(tokens_per_s / WANTED_CAPACITY)))
            if not capacity:
                wanted = await load.closed(plan.calibrate_s)

            async def idle() -> None:
                for _ in range(round(GIVE_UP_S / PROBE_S)):
                    if not (await asyncio.to_thread(serving.status))["streams"]:
                        return
                    await asyncio.sleep(PROBE_S)

            return await measure(load, wanted, plan, idle), load.answer_tokens, wanted

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    report = Report("Goodput under overload, bundled model, one mixed worker")
    on, answer_tokens, capacity = serve_and_measure(f"standard={TARGET_S:g}/0", plan, 0, 0.0)
    off, _, _ = serve_and_measure("standard=0/0", plan, answer_tokens, capacity)
    peak = max(level.goodput for level in on.levels.values())
    report.row("capacity, closed loop", capacity, "req/s")
    for times, level in on.levels.items():
        other = off.levels[times]
        report.row(f"{times:g} x: goodput", level.goodput, "req/s", f"peak {peak:.2f}", level.goodput / peak)
        report.row(
            f"{times:g} x: goodput, no admission", other.goodput, "req/s", f"peak {peak:.2f}", other.goodput / peak
        )
        report.note(f"{times:g} x, {level.seconds:g} s: {level}; no admission: {other}")
    for name, result in (("10 x: goodput", on), ("10 x: goodput, no admission", off)):
        good, beside = result.levels[plan.times[-1]].goodput, f"capacity beside it {result.beside:.2f}"
        report.row(name, good, "req/s", beside, good / result.beside, ">= 0.9" if result is on else None)
    if refused := on.levels[plan.times[-1]].refused:
        ranked = statistics.quantiles(refused, n=100)
        report.row("10 x: a refusal, median", 1e3 * ranked[49], "ms", f"target {TARGET_S:g} s", ranked[49] / TARGET_S)
        report.row("10 x: a refusal, p99", 1e3 * ranked[98], "ms", f"target {TARGET_S:g} s", ranked[98] / TARGET_S)
    report.row("recovery", on.recovery_s, "s", f"no admission {off.recovery_s:.1f} s", None, f"<= {2 * TARGET_S:g} s")
    for name, result in (("after recovery, 0.5 x: good", on), ("after recovery, 0.5 x: good, no admission", off)):
        asked = len(result.after.samples)
        share = sum(sample.good for sample in result.after.samples) / max(1, asked)
        report.row(name, share, "", f"{asked} asked", share)
    report.note(
        f"{SLOTS} slots, prompts of {PROMPT_TOKENS} tokens, answers of {answer_tokens}; clients without a first"
    )
    report.note(f"token hang up after {PATIENCE_S:g} s. Server, worker and client share this machine.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
