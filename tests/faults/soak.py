"""`python -m tests.faults.soak`: faults at random under load for a long time; every answer right, and nothing grows.

Workers number 1 of each kind suffer, those of number 0 and the coordinator live through all of it. Printed over time:
their memory, the coordinator's descriptors, and the blocks of all. Each has to be flat after the warm-up: its median in
the last third of the time at most a little above that in the third before.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import uvloop

from tests.faults.fleet import Fleet, Worker
from tests.faults.matrix import FAULTS, Drain, Fault
from tests.faults.processes import Nursery, Resident, num_descriptors, resident
from tests.faults.shapes import Undisturbed, ask

NUM_CLIENTS = 4
EVERY_FAULT: tuple[type[Fault], ...] = (*FAULTS, Drain)
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
    descriptors: int
    free_or_cached: dict[str, int]


@dataclass
class Soak:
    samples: list[Sample] = field(default_factory=list)
    num_answers: int = 0
    trouble: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)

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
        before, after = self._thirds([sample.descriptors for sample in self.samples])
        if after - before > MAX_GROWTH_DESCRIPTORS:
            found.append(f"descriptors of the coordinator: {before:.0f} to {after:.0f}")
        return found

    def _thirds(self, values: list[int]) -> tuple[float, float]:
        """Medians of the second third, when everything is warm, and of the last."""
        third = len(values) // 3
        return statistics.median(values[third : 2 * third]), statistics.median(values[2 * third :])

    def show(self) -> str:
        names = list(self.samples[0].memory)
        lines = ["   time  " + "".join(f"{name:>16}" for name in names) + "   descriptors   blocks free or cached"]
        lines.append(" " * 9 + f"{'MiB own+shared':>16}" * len(names))
        for sample in self.samples[:: max(1, len(self.samples) // 20)]:
            memory = "".join(
                f"{sample.memory[name].private / 2**20:>10.1f}+{sample.memory[name].shared / 2**20:<5.0f}"
                for name in names
            )
            blocks = ", ".join(f"{name} {count}" for name, count in sample.free_or_cached.items())
            lines.append(f"{sample.at_s:>6.0f} s  {memory}   {sample.descriptors:>11}   {blocks}")
        lines.append(f"{self.num_answers} answers through {self.faults.total()} faults: {dict(self.faults)}")
        return "\n".join([*lines, *(f"WRONG {each}" for each in self.trouble)])


async def soak(seconds: float, seed: int) -> Soak:
    """Raises NotKept where after all of it something is not as before."""
    result = Soak()
    with Nursery() as nursery:
        async with Fleet(nursery, {"mixed": 1}) as fleet:
            undisturbed = await Undisturbed.of(fleet, deterministic=False)
        kinds = {"prefill": 2, "decode": 2}
        async with Fleet(nursery, kinds, "--lanes", "shm,tcp", coordinator=("--max-attempts", "8")) as fleet:
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
        answer = await ask(fleet, shape, salt, stream=chance.random() < 0.7)
        result.num_answers += 1
        if wrong := answer.trouble or undisturbed.judge(shape, answer):
            result.trouble.append(f"{shape.name}: {wrong}")


async def _disturb(fleet: Fleet, chance: random.Random, end: float, result: Soak) -> None:
    """One worker after the other, each time when the one before is back."""
    while time.monotonic() < end - 5:
        await asyncio.sleep(chance.uniform(0.5, 2.0))
        victim: Worker = fleet.workers[chance.choice(("prefill-1", "decode-1"))]
        fault = chance.choice(EVERY_FAULT)(fleet, victim)
        fault.strike(unsent=chance.random() < 0.5)
        result.faults[f"{fault.name}, {victim.kind}"] += 1
        lasting = asyncio.create_task(fault.while_it_lasts(chance))
        await asyncio.sleep(chance.choice((0.5, 2.5, 5.0)))
        lasting.cancel()
        await asyncio.gather(lasting, return_exceptions=True)
        fault.heal()
        await fleet.wait_for(fleet.complete, f"{victim.name} is registered again")


async def _sample(fleet: Fleet, end: float, every_s: float, result: Soak) -> None:
    began = time.monotonic()
    living = {name: fleet.workers[name].pid for name in ("prefill-0", "decode-0")}
    living["coordinator"] = fleet.coordinator.pid
    while time.monotonic() < end:
        await asyncio.sleep(every_s)
        blocks = {
            worker["id"]: worker["blocks"]["free"] + worker["blocks"]["cached"]
            for worker in (await fleet.status())["workers"]
        }
        memory = {name: resident(pid) for name, pid in living.items()}
        descriptors = num_descriptors(fleet.coordinator.pid)
        result.samples.append(Sample(time.monotonic() - began, memory, descriptors, blocks))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: 30)")
    parser.add_argument("--seed", type=int, default=1, help="chooses requests and faults (default: 1)")
    parser.add_argument("--json", type=Path, help="write the samples here")
    arguments = parser.parse_args()
    result = uvloop.run(soak(60 * arguments.minutes, arguments.seed))
    growth = result.growth()
    print("\n".join([result.show(), *(f"GROWS {each}" for each in growth)]))
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(result), indent=1) + "\n")
    return int(bool(result.trouble or growth))


if __name__ == "__main__":
    sys.exit(main())
