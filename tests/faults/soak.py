"""`python -m tests.faults.soak`: faults at random under load for a long time; every answer right, and nothing grows.

Prefill and decode workers, coordinators and etcd suffer, one after the other. Those of number 0 live through all of it.
Printed over time: memory and descriptors of these, and the blocks of all workers. Each has to be flat after the
warm-up: its median in the last third of the time at most a little above that in the third before. In the end every
block is free or cached, and no coordinator has a request.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from benchmarks.report import Report
from tests.faults.fleet import Fleet, NotKept, Process
from tests.faults.matrix import VICTIMS, Drain, Fault, faults_of, percentile
from tests.faults.processes import Nursery, Resident, num_descriptors, resident
from tests.faults.shapes import SILENCE_S, Undisturbed, ask
from tests.system.etcd import INSTALLED

NUM_CLIENTS = 4
KINDS = {"coordinator": 2, "etcd": int(INSTALLED), "prefill": 2, "decode": 2}
SUFFERING = ("prefill-1", "decode-1", "coordinator-1", *(("etcd",) if INSTALLED else ()))
DRAINS: dict[str, tuple[type[Fault], ...]] = {"prefill": (Drain,), "decode": (Drain,)}
SAMPLES = 60
MAX_GROWTH_BYTES = 24 << 20
MAX_MAPPED_BYTES = 6 * (50 << 20)
"""Of shared memory: a worker maps its own pool, those of the three others, and for a moment those of the dead."""
MAX_GROWTH_DESCRIPTORS = 12
"""Requests come and go while these are counted."""


@dataclass
class Sample:
    at_s: float
    memory: dict[str, Resident]
    """Of the processes that live through all of it, by name."""
    descriptors: dict[str, int]
    free_or_cached: dict[str, int]


@dataclass
class Soak:
    samples: list[Sample] = field(default_factory=list)
    num_answers: int = 0
    trouble: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    pauses_s: list[float] = field(default_factory=list)
    """Of each stream: its longest gap."""
    resumed: int = 0
    """Answers whose client had to come back for them."""

    def growth(self) -> list[str]:
        """What is not flat."""
        found = []
        for name in self.samples[0].memory:
            before, after = self._thirds([sample.memory[name].private for sample in self.samples])
            if after - before > MAX_GROWTH_BYTES:
                found.append(f"memory of {name}: {before / 2**20:.0f} to {after / 2**20:.0f} MiB")
            mapped = max(sample.memory[name].shared for sample in self.samples)
            if mapped > MAX_MAPPED_BYTES:
                found.append(f"mapped memory of {name}: {mapped / 2**20:.0f} MiB")
            before, after = self._thirds([sample.descriptors[name] for sample in self.samples])
            if after - before > MAX_GROWTH_DESCRIPTORS:
                found.append(f"descriptors of {name}: {before:.0f} to {after:.0f}")
        return found

    def _thirds(self, values: list[int]) -> tuple[float, float]:
        """Medians of the second third, when everything is warm, and of the last."""
        third = len(values) // 3
        return statistics.median(values[third : 2 * third]), statistics.median(values[2 * third :])

    def show(self) -> str:
        names = list(self.samples[0].memory)
        lines = ["   time  " + "".join(f"{name:>20}" for name in names) + "   blocks free or cached"]
        lines.append(" " * 9 + f"{'MiB own+shared, fds':>20}" * len(names))
        for sample in self.samples[:: max(1, len(self.samples) // 20)]:
            memory = "".join(
                f"{sample.memory[name].private / 2**20:>10.1f}+{sample.memory[name].shared / 2**20:<4.0f}"
                f"{sample.descriptors[name]:>5}"
                for name in names
            )
            blocks = ", ".join(f"{name} {count}" for name, count in sample.free_or_cached.items())
            lines.append(f"{sample.at_s:>6.0f} s  {memory}   {blocks}")
        lines.append(
            f"{self.num_answers} answers, {self.resumed} of them resumed, through {self.faults.total()} faults: "
            f"{dict(self.faults)}"
        )
        return "\n".join([*lines, *(f"WRONG {each}" for each in self.trouble)])

    def report(self) -> Report:
        """In the form of benchmarks."""
        report = Report(f"Soak: {self.samples[-1].at_s / 60:.0f} minutes of random faults under load")
        report.row("answers", self.num_answers, "answers")
        report.row("answers wrong or lost", len(self.trouble), "answers", goal="<= 0 answers")
        report.row("answers resumed by their client", self.resumed, "answers")
        report.row("faults", self.faults.total(), "faults")
        for name, count in sorted(self.faults.items()):
            report.row(f"faults: {name}", count, "faults")
        for share, name in ((0.5, "median"), (0.99, "p99"), (1.0, "longest")):
            report.row(f"longest gap of a stream, {name}", percentile(self.pauses_s, share), "s")
        for name in self.samples[0].memory:
            before, after = self._thirds([sample.memory[name].private for sample in self.samples])
            limit = f"<= {MAX_GROWTH_BYTES >> 20} MiB"
            report.row(f"growth of {name}: memory", (after - before) / 2**20, "MiB", goal=limit)
            before, after = self._thirds([sample.descriptors[name] for sample in self.samples])
            report.row(f"growth of {name}: descriptors", after - before, "fds", goal=f"<= {MAX_GROWTH_DESCRIPTORS} fds")
        for line in self.show().splitlines():
            report.note(line)
        return report


async def soak(seconds: float, seed: int) -> Soak:
    """Raises NotKept where after all of it something is not as before."""
    result = Soak()
    with Nursery() as nursery:
        async with Fleet(nursery, {"mixed": 1}) as fleet:
            undisturbed = await Undisturbed.of(fleet, deterministic=False)
        async with Fleet(nursery, KINDS, "--lanes", "shm,tcp", coordinator=("--max-attempts", "8")) as fleet:
            end = time.monotonic() + seconds
            try:
                async with asyncio.TaskGroup() as tasks:
                    for number in range(NUM_CLIENTS):
                        tasks.create_task(_client(fleet, undisturbed, random.Random(f"{seed} {number}"), end, result))
                    tasks.create_task(_disturb(fleet, random.Random(seed), end, result))
                    tasks.create_task(_sample(fleet, end, seconds / SAMPLES, result))
                await fleet.wait_for(fleet.complete, "every worker is registered again")
                await fleet.wait_for(fleet.idle, "no request, and every block free or cached")
            except BaseException:
                print(fleet.log())
                raise
    return result


async def _client(fleet: Fleet, undisturbed: Undisturbed, chance: random.Random, end: float, result: Soak) -> None:
    while time.monotonic() < end:
        shape = chance.choice(undisturbed.shapes)
        salt = f"soak {chance.random()}" if chance.random() < 0.7 else ""
        answer = await ask(fleet, shape, salt, chance.random() < 0.7, SILENCE_S)
        result.num_answers += 1
        result.resumed += bool(answer.breaks_s)
        result.pauses_s += [max(gaps) for gaps in answer.gaps_s()]
        if wrong := answer.trouble or undisturbed.judge(shape, answer):
            result.trouble.append(f"{shape.name}: {wrong}")


async def _disturb(fleet: Fleet, chance: random.Random, end: float, result: Soak) -> None:
    """One process after the other, each time when the one before is back."""
    everybody: dict[str, Process] = {**fleet.processes, **({"etcd": fleet.store} if fleet.store else {})}
    suffering: list[str] = []
    while time.monotonic() < end - 5:
        await asyncio.sleep(chance.uniform(0.5, 2.0))
        if not suffering:  # everybody has a turn before anybody has a second
            suffering = chance.sample(SUFFERING, len(SUFFERING))
        victim = everybody[suffering.pop()]
        kind = next(each for each in VICTIMS if each.kind == victim.kind and "the only" not in each.name)
        fault: Fault = chance.choice((*faults_of(kind), *DRAINS.get(victim.kind, ())))(fleet, victim)
        fault.strike(unsent=chance.random() < 0.5)
        result.faults[f"{fault.name}, {victim.kind}"] += 1
        lasting = asyncio.create_task(fault.while_it_lasts(chance))
        await asyncio.sleep(chance.choice((0.5, 2.5, 5.0)))
        lasting.cancel()
        await asyncio.gather(lasting, return_exceptions=True)
        fault.heal()
        await fleet.wait_for(fleet.complete, f"{victim.name} is back after {fault.name}")


async def _sample(fleet: Fleet, end: float, every_s: float, result: Soak) -> None:
    began = time.monotonic()
    living = {name: process.pid for name, process in fleet.processes.items() if name.endswith("-0")}
    coordinator = fleet.coordinators["coordinator-0"]
    while time.monotonic() < end:
        await asyncio.sleep(every_s)
        blocks = {
            worker["id"]: worker["blocks"]["free"] + worker["blocks"]["cached"]
            for worker in (await fleet.status(coordinator))["workers"]
        }
        memory = {name: resident(pid) for name, pid in living.items()}
        descriptors = {name: num_descriptors(pid) for name, pid in living.items()}
        result.samples.append(Sample(time.monotonic() - began, memory, descriptors, blocks))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: 30)")
    parser.add_argument("--seed", type=int, default=1, help="chooses requests and faults (default: 1)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    try:
        result = uvloop.run(soak(60 * arguments.minutes, arguments.seed))
    except NotKept as error:
        print(f"LEFT {error}")
        return 1
    result.report().finish(arguments.json)
    growth = result.growth()
    for each in growth:
        print(f"GROWS {each}")
    return int(bool(result.trouble or growth))


if __name__ == "__main__":
    sys.exit(main())
