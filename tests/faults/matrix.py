"""The matrix: who suffers, what happens to it, and when. One case is one fault under a load of mixed requests.

Life of a case:

1. A seeded choice of requests starts, each at a moment of its own; prompts are salted, so that no cache has them.
2. The trigger watches every message between the processes. At the first that makes the moment, the fault happens to
   the victim, in the same turn of the loop; on the side of the message (before, after it arrives) that the seed chose.
3. Every answer must end, by itself, as the undisturbed one did.
4. What was stopped goes on, what was cut off is healed, what is dead is started again. Then, within a bound, every
   worker is registered, every block is free or cached, and no coordinator has a request or a descriptor more.

The fault is proven when the victim is seen dead, stopped or held back, and had a part in a live request (etcd: when
there was any). Only where a coordinator suffers may a client go on with its request over another connection.
"""

import asyncio
import random
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product

from benchmarks.report import Report
from tests.faults.fleet import FRONT, LINK, PEERS, STORE, Event, Fleet, NotKept, Process, Worker
from tests.faults.processes import Nursery, send, state
from tests.faults.shapes import SILENCE_S, Answer, Shape, Undisturbed, ask
from tests.system.etcd import INSTALLED

NUM_REQUESTS, STAGGER_S = 6, 0.25
MAX_TRIES = 4
"""Of a case whose fault could not be proven, each with another seed."""
BATCH = 15
STREAMS = 0.85
"""Share of the requests over HTTP that stream."""


# Who


@dataclass(frozen=True)
class Victim:
    """A kind of process in a fleet that has so many of each."""

    name: str
    kind: str
    fleet: tuple[tuple[str, int], ...]

    def choose(self, fleet: Fleet, event: Event, spared: set[str]) -> Process | None:
        """Who suffers: a process with a part in the event's attempt; else, if its kind is done with it, in another."""
        if self.kind == "etcd":
            return fleet.store
        if self.kind == "coordinator":
            return fleet.coordinator_of(event)
        able = [
            worker for worker in fleet.workers.values() if worker.kind == self.kind and worker.name not in spared
        ]  # fmt: skip
        taking_part = [worker for worker in able if event.attempt_id in worker.legs]
        if not taking_part and self.kind == "prefill":
            taking_part = [worker for worker in able if worker.legs]
        return taking_part[0] if taking_part else None


TWO_EACH, ONE_EACH, MIXED, PAIR, FOUND = (
    (("prefill", 2), ("decode", 2)),
    (("prefill", 1), ("decode", 1)),
    (("mixed", 3),),
    (("coordinator", 2), ("prefill", 1), ("decode", 2)),
    (("coordinator", 2), ("etcd", 1), ("prefill", 1), ("decode", 2)),
)
FLEETS = (TWO_EACH, ONE_EACH, MIXED, PAIR, FOUND)
VICTIMS = (
    Victim("prefill, one of 2", "prefill", TWO_EACH),
    Victim("decode, one of 2", "decode", TWO_EACH),
    Victim("prefill, the only", "prefill", ONE_EACH),
    Victim("decode, the only", "decode", ONE_EACH),
    Victim("mixed, one of 3", "mixed", MIXED),
    Victim("coordinator, the only", "coordinator", TWO_EACH),
    Victim("coordinator, one of 2", "coordinator", PAIR),
    Victim("etcd", "etcd", FOUND),
)


# What


class Fault(ABC):
    """Happens to one process. Waits for nothing: what is to come later is in `while_it_lasts`."""

    name: str
    loses_messages = False
    """What the victim has just sent may be lost with it."""

    def __init__(self, fleet: Fleet, victim: Process) -> None:
        self.fleet, self.victim, self.pid = fleet, victim, victim.pid
        self.incarnation = victim.incarnation if isinstance(victim, Worker) else 0

    @abstractmethod
    def strike(self, unsent: bool) -> None:
        """`unsent`: the message that is just passing is lost."""

    async def while_it_lasts(self, chance: random.Random) -> None:  # noqa: B027 - most faults have nothing more to do
        """From the strike to the end of all requests; cancelled then."""

    @abstractmethod
    def proven(self) -> bool:
        """Asked when all requests have ended, before `heal`."""

    @abstractmethod
    def heal(self) -> None:
        """Afterwards the victim can come back."""


class Kill(Fault):
    name = "kill -9"
    loses_messages = True

    def strike(self, unsent: bool) -> None:
        send(self.pid, signal.SIGKILL)
        if unsent:
            self.fleet.sever(self.victim.name)

    def proven(self) -> bool:
        return state(self.pid) == "X"

    def heal(self) -> None:
        if self.victim.pid == self.pid:
            self.fleet.start(self.victim.name)


class Restart(Kill):
    name = "restart"

    async def while_it_lasts(self, chance: random.Random) -> None:
        self.fleet.start(self.victim.name)


class Drain(Kill):
    """Asked to end: takes nothing new and finishes what it has, as long as it is let."""

    name = "SIGTERM"

    def strike(self, unsent: bool) -> None:
        send(self.pid, signal.SIGTERM)

    def heal(self) -> None:
        send(self.pid, signal.SIGKILL)
        super().heal()


class Freeze(Fault):
    """Stops, and never goes on."""

    name = "SIGSTOP"

    def strike(self, unsent: bool) -> None:
        send(self.pid, signal.SIGSTOP)

    def proven(self) -> bool:
        return state(self.pid) == "T"

    def heal(self) -> None:
        send(self.pid, signal.SIGKILL)
        self.fleet.start(self.victim.name)


class Hang(Freeze):
    """Stops and goes on: before anybody noticed, or in the middle of what others do about it."""

    name = "SIGSTOP, SIGCONT"
    went_on = False

    async def while_it_lasts(self, chance: random.Random) -> None:
        await asyncio.sleep(chance.choice((0.5, 1.5, 2.1, 3.0)))
        self.went_on = state(self.pid) == "T"
        send(self.pid, signal.SIGCONT)

    def proven(self) -> bool:
        return self.went_on or super().proven()

    def heal(self) -> None:
        send(self.pid, signal.SIGCONT)


class CutOff(Fault):
    """Nothing comes or goes, and no connection says so. What was under way arrives when the network is back."""

    networks: dict[str, tuple[str, ...]]
    """By kind of the victim; "" is any worker."""
    loses_messages = True
    held = 0

    def strike(self, unsent: bool) -> None:
        self.held = self.fleet.cuts.held
        for network in self.networks.get(self.victim.kind) or self.networks[""]:
            self.fleet.cuts.cut(network, self.victim.name)

    async def while_it_lasts(self, chance: random.Random) -> None:
        """Where it is the only one, nothing could go on without it: after a while the network is back."""
        if list(self.fleet.coordinators) == [self.victim.name]:
            await asyncio.sleep(chance.choice((1.0, 2.5, 4.0)))
            self.fleet.cuts.heal()

    def proven(self) -> bool:
        return self.fleet.cuts.held > self.held

    def heal(self) -> None:
        self.fleet.cuts.heal()


class CutFromCoordinator(CutOff):
    name, networks = "cut from coordinator", {"": (LINK,)}


class CutFromClients(CutOff):
    name, networks = "cut from clients", {"coordinator": (FRONT,)}


class CutFromWorkers(CutOff):
    name, networks = "cut from workers", {"coordinator": (LINK,), "": (PEERS,)}


class CutFromAll(CutOff):
    name, networks = "cut from all", {"coordinator": (FRONT, LINK), "etcd": (STORE,), "": (LINK, PEERS)}


FAULTS: tuple[type[Fault], ...] = (
    Kill, Restart, Freeze, Hang, CutFromCoordinator, CutFromClients, CutFromWorkers, CutFromAll,
)  # fmt: skip


# When


@dataclass(frozen=True)
class Moment:
    name: str
    makes: Callable[[Event], bool]
    """Whether a message makes the moment."""


def _is_recovery(event: Event) -> bool:
    return event.attempt >= 2 and (event.kind == "token" or (event.kind == "assigned" and event.arrived))


RECOVERY = Moment("during recovery", _is_recovery)
MOMENTS = (
    Moment("queued", lambda event: event.kind == "assigned" and event.arrived),
    Moment("prefilling", lambda event: event.kind == "started" or (event.kind == "progress" and not event.is_last)),
    Moment("offering", lambda event: event.kind == "offer" and not event.arrived),
    Moment("pulling", lambda event: event.kind in ("offer", "closed") and event.arrived),
    Moment("first token", lambda event: event.kind == "token" and event.value == 0),
    Moment("mid-stream", lambda event: event.kind == "token" and event.value >= 3 and not event.is_last),
    Moment("last token", lambda event: event.kind == "token" and event.is_last),
    RECOVERY,
)


@dataclass(frozen=True)
class Cell:
    victim: Victim
    fault: type[Fault]
    moment: Moment


def cells() -> Iterator[Cell]:
    """Everything that can happen at all."""
    for victim, fault, moment in product(VICTIMS, FAULTS, MOMENTS):
        if fault in faults_of(victim) and _happens(victim, fault, moment):
            yield Cell(victim, fault, moment)


def faults_of(victim: Victim) -> tuple[type[Fault], ...]:
    """What can happen to it."""
    if victim.kind == "etcd":
        return Kill, Restart, Freeze, Hang, CutFromAll
    if victim.kind == "coordinator":
        lasting = (Kill, Freeze) if dict(victim.fleet).get("coordinator") else ()  # none would be left
        return *lasting, Restart, Hang, CutFromClients, CutFromWorkers, CutFromAll
    among_workers = (CutFromWorkers, CutFromAll) if victim.kind != "mixed" else ()
    return Kill, Restart, Freeze, Hang, CutFromCoordinator, *among_workers


def _happens(victim: Victim, fault: type[Fault], moment: Moment) -> bool:
    if moment.name in ("offering", "pulling") and victim.kind == "mixed":
        return False
    if moment is RECOVERY and victim.fleet == ONE_EACH:
        return False  # the first fault leaves one worker, the second would leave none
    between_workers = fault is CutFromWorkers and victim.kind != "coordinator"
    return not between_workers or moment.name in ("queued", "prefilling", "offering", "pulling", "first token")


# A case


@dataclass
class Result:
    victim: str
    fault: str
    moment: str
    seed: int
    fleet: str
    proven: bool = False
    live_parts: int = 0
    """Of the victim, when it was struck."""
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)
    """Of each stream: its longest gap less its usual one."""
    noticed_s: float | None = None
    """From the strike until a coordinator dropped the worker or missed etcd, or the first client its coordinator."""
    not_kept: str = ""
    """What was not as before afterwards."""

    @property
    def bad(self) -> bool:
        return bool(self.wrong or self.lost or self.not_kept)


class Case:
    def __init__(
        self, fleet: Fleet, undisturbed: Undisturbed, usual_s: dict[str, float], cell: Cell, variant: "Variant",
        seed: int,
    ) -> None:  # fmt: skip
        """`usual_s`: time to the first token of each shape under such a load without faults."""
        self._fleet, self._undisturbed, self._usual_s, self._cell = fleet, undisturbed, usual_s, cell
        self._salted = variant.salted
        self._silence_s = SILENCE_S if cell.victim.kind == "coordinator" else None
        self._chance = random.Random(f"{cell.victim.name} {cell.fault.name} {cell.moment.name} {seed}")
        self._faults: list[Fault] = []
        self._struck = asyncio.Event()
        self._side = self._chance.random() < 0.5
        self._skip = self._chance.choice((0, 0, 1, 2, 5))
        self._struck_at = 0.0
        kinds = "+".join(f"{number} {kind}" for kind, number in cell.victim.fleet)
        self.result = Result(
            cell.victim.name, cell.fault.name, cell.moment.name, seed, ", ".join(filter(None, (kinds, variant.name)))
        )

    async def run(self) -> Result:
        fleet, result = self._fleet, self.result
        fleet.listener = self._on_event
        lasting = asyncio.create_task(self._follow())
        try:
            answers = await asyncio.gather(*(self._ask(number) for number in range(NUM_REQUESTS)))
        finally:
            fleet.listener = None
            lasting.cancel()
            await asyncio.gather(lasting, return_exceptions=True)
        self._judge(answers)
        result.proven = bool(self._wanted and result.live_parts and all(fault.proven() for fault in self._faults))
        for fault in self._faults:
            fault.heal()
        try:
            await fleet.wait_for(fleet.complete, "every worker is registered again")
            await fleet.wait_for(fleet.idle, "no request, and every block free or cached")
            await fleet.wait_for(fleet.has_no_more_descriptors, "as many descriptors as before")
        except NotKept as error:
            result.not_kept = str(error)
        return result

    @property
    def _wanted(self) -> bool:
        """The fault that the cell is about has happened, not only the one that it recovers from."""
        return len(self._faults) == 1 + (self._cell.moment is RECOVERY)

    # The trigger

    def _on_event(self, event: Event) -> None:
        if self._wanted:
            return
        first = self._cell.moment is RECOVERY and not self._faults
        if first:
            if event.kind == "token" and event.value >= 3 and not event.is_last and event.arrived:
                self._strike_first(event)
            return
        if not self._cell.moment.makes(event):
            return
        if event.kind in ("started", "progress", "token") and event.arrived is not self._side:
            return
        victim = self._cell.victim.choose(self._fleet, event, {fault.victim.name for fault in self._faults})
        if victim is None:
            return
        if self._skip:
            self._skip -= 1
            return
        self.result.live_parts = self._fleet.num_live_parts(victim)
        self._struck_at = time.monotonic()
        self._strike(self._cell.fault(self._fleet, victim), unsent=not event.arrived)
        self._struck.set()

    def _strike_first(self, event: Event) -> None:
        """What the case's own fault finds others recovering from: the death of a worker that decodes."""
        victim = self._fleet.workers[event.worker]
        if victim.kind != "prefill":
            self._skip = 0
            self._strike(Kill(self._fleet, victim), unsent=False)

    def _strike(self, fault: Fault, unsent: bool) -> None:
        self._faults.append(fault)
        fault.strike(unsent and fault.loses_messages)

    async def _follow(self) -> None:
        await self._struck.wait()
        fault = self._faults[-1]
        lasting = asyncio.create_task(fault.while_it_lasts(self._chance))
        try:
            while self.result.noticed_s is None and self._silence_s is None:
                if await self._fleet.is_noticed(fault.victim, fault.incarnation):
                    self.result.noticed_s = time.monotonic() - self._struck_at
                await asyncio.sleep(0.03)
            await lasting
        finally:
            lasting.cancel()

    # The requests

    async def _ask(self, number: int) -> tuple[Shape, Answer]:
        chance = random.Random(f"{self.result.seed} {number}")
        shape = chance.choice(self._undisturbed.shapes)
        await asyncio.sleep(chance.random() * STAGGER_S * (number % 3 + 1))
        salt = f"case {self.result.seed} {number} {time.monotonic_ns()}" if chance.random() < self._salted else ""
        return shape, await ask(self._fleet, shape, salt, chance.random() < STREAMS, self._silence_s)

    def _judge(self, answers: list[tuple[Shape, Answer]]) -> None:
        breaks = [at_s for _, answer in answers for at_s in answer.breaks_s if at_s > self._struck_at]
        if self._silence_s is not None and breaks and self._wanted:
            self.result.noticed_s = min(breaks) - self._struck_at
        for shape, answer in answers:
            if answer.trouble or (answer.breaks_s and self._silence_s is None):
                self.result.lost.append(f"{shape.name}: {answer.trouble or 'its client had to come back for it'}")
            elif wrong := self._undisturbed.judge(shape, answer):
                self.result.wrong.append(f"{shape.name}: {wrong}")
            for gaps in answer.gaps_s():
                later = sorted(gaps[1:])
                usual = later[len(later) // 2] if later else 0.0
                first = gaps[0] - self._usual_s.get(shape.name, 0.0)
                self.result.pauses_s.append(max(0.0, first, (later[-1] - usual) if later else 0.0))


# All cases


@dataclass(frozen=True)
class Variant:
    """How the workers of a fleet are started."""

    name: str
    options: tuple[str, ...]
    exact: bool = False
    """They are deterministic."""
    salted: float = 0.85
    """Share of the requests whose prompt no cache has; others may find it here, with another worker or in a tier."""


VARIANTS = (
    Variant("", ("--lanes", "shm,tcp")),
    Variant("deterministic", ("--deterministic", "--lanes", "tcp"), exact=True),
    Variant("direct", ("--lanes", "shm,tcp", "--direct-wait-s", "0.5")),
    Variant("deterministic, prefixes fetched", ("--deterministic", "--lanes", "tcp"), exact=True, salted=0.3),
    Variant(
        "tiers", ("--lanes", "shm,tcp", "--host-kv-memory", "32MiB", "--disk-kv-folder", "{own}.kv"), salted=0.3
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Cases that one fleet goes through, one after the other."""

    fleet: tuple[tuple[str, int], ...]
    variant: Variant
    cells: tuple[Cell, ...]


def batches(num_cases: int, seed: int, victims: str = "") -> list[Batch]:
    """So many cases, spread over all cells: each comes once before any comes twice. Without etcd its own are left out.

    `victims`: only those with this in their name.
    """
    chance = random.Random(seed)
    chosen: list[Cell] = []
    while len(chosen) < num_cases:
        every = [cell for cell in cells() if victims in cell.victim.name and (INSTALLED or cell.victim.kind != "etcd")]
        chance.shuffle(every)
        chosen += every[: num_cases - len(chosen)]
    found = []
    for fleet, (number, variant) in product(FLEETS, enumerate(VARIANTS)):
        its = [cell for cell in chosen if cell.victim.fleet == fleet][number :: len(VARIANTS)]
        if "--direct-wait-s" in variant.options:
            its = [cell for cell in its if cell.moment.name not in ("offering", "pulling")]  # nothing is, there
        found += [Batch(fleet, variant, tuple(its[at : at + BATCH])) for at in range(0, len(its), BATCH)]
    chance.shuffle(found)
    return found


def sample(fleet: tuple[tuple[str, int], ...], num_cases: int, seed: int) -> Batch:
    """Some cases of one deterministic fleet, for each kind of victim that it has, each at another moment: what comes
    with the last token often comes too late to be proven."""
    chance = random.Random(seed)
    chosen: list[Cell] = []
    for victim in (victim for victim in VICTIMS if victim.fleet == fleet):
        own = [cell for cell in cells() if cell.victim is victim]
        moments = list(dict.fromkeys(cell.moment for cell in own))
        chosen += [
            chance.choice([cell for cell in own if cell.moment is moment])
            for moment in chance.sample(moments, min(num_cases, len(moments)))
        ]
    return Batch(fleet, VARIANTS[1], tuple(chosen))


async def run_cases(
    planned: list[Batch], seed: int, on_result: Callable[[Result], None], until_s: float | None = None
) -> list[Result]:
    """The sooner the end (monotonic) `until_s`. What goes wrong in a case is in its result, and raises nothing."""
    results: list[Result] = []
    undisturbed: dict[bool, Undisturbed] = {}
    with Nursery() as nursery:
        for batch in planned:
            exact = batch.variant.exact
            if exact not in undisturbed:
                undisturbed[exact] = await _undisturbed(nursery, exact)
            await _run(nursery, batch, undisturbed[exact], seed, results, on_result, until_s)
    return results


async def _undisturbed(nursery: Nursery, exact: bool) -> Undisturbed:
    """By one mixed worker, without any hand-over."""
    async with Fleet(nursery, {"mixed": 1}, *VARIANTS[exact].options) as fleet:
        return await Undisturbed.of(fleet, exact)


async def _run(
    nursery: Nursery, batch: Batch, undisturbed: Undisturbed, seed: int, results: list[Result],
    on_result: Callable[[Result], None], until_s: float | None,
) -> None:  # fmt: skip
    """A fleet in which something was wrong is replaced."""
    remaining = list(batch.cells)
    while remaining and not _is_over(until_s, results):
        async with Fleet(nursery, dict(batch.fleet), *batch.variant.options) as fleet:
            usual_s = await _usual(fleet, undisturbed)
            while remaining and not _is_over(until_s, results):
                cell = remaining.pop(0)
                for _ in range(MAX_TRIES):
                    case_seed = seed * 1_000_000 + len(results)
                    result = await Case(fleet, undisturbed, usual_s, cell, batch.variant, case_seed).run()
                    results.append(result)
                    on_result(result)
                    if result.proven or result.bad or _is_over(until_s, results):
                        break
                if result.bad:
                    print(fleet.log())
                    break


def _is_over(until_s: float | None, results: list[Result]) -> bool:
    """Not before something is proven, however long a busy machine takes to start a fleet."""
    return until_s is not None and time.monotonic() > until_s and any(result.proven or result.bad for result in results)


async def _usual(fleet: Fleet, undisturbed: Undisturbed) -> dict[str, float]:
    """Everything without a fault, a case's number at a time: how long first tokens take. Hand-overs are set up, too."""
    usual_s: dict[str, float] = {}
    for at in range(0, len(undisturbed.shapes), NUM_REQUESTS):
        shapes = undisturbed.shapes[at : at + NUM_REQUESTS]
        asked = [ask(fleet, shape, f"usual {shape.name}") for shape in shapes]
        for shape, answer in zip(shapes, await asyncio.gather(*asked), strict=True):
            wrong = answer.trouble or undisturbed.judge(shape, answer)
            assert not wrong, f"without any fault: {shape.name}: {wrong}"
            usual_s[shape.name] = max(gaps[0] for gaps in answer.gaps_s())
    await fleet.wait_for(fleet.idle, "no request, and every block free or cached")
    await fleet.count_descriptors()
    return usual_s


# The table


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def table(results: list[Result]) -> str:
    """Rows of victim, fault and moment; then of each fault, and all together."""
    head = (
        f"{'victim':<22} {'fault':<21} {'moment':<16} {'cases':>5} {'proven':>6} {'wrong':>5} {'lost':>4} {'left':>4}"
    )
    head += f"  {'pause p50':>9} {'p99':>7} {'max':>7}  {'noticed p50':>11} {'max':>6}"
    lines = [head, "-" * len(head)]

    def row(victim: str, fault: str, moment: str, its: list[Result]) -> None:
        pauses = [pause for result in its if result.proven for pause in result.pauses_s]
        noticed = [result.noticed_s for result in its if result.proven and result.noticed_s is not None]
        lines.append(
            f"{victim:<22} {fault:<21} {moment:<16} {len(its):>5} {sum(each.proven for each in its):>6} "
            f"{sum(len(each.wrong) for each in its):>5} {sum(len(each.lost) for each in its):>4} "
            f"{sum(bool(each.not_kept) for each in its):>4}  "
            f"{percentile(pauses, 0.5):>8.2f}s {percentile(pauses, 0.99):>6.2f}s {max(pauses, default=0):>6.2f}s  "
            f"{percentile(noticed, 0.5):>10.2f}s {max(noticed, default=0):>5.2f}s"
        )

    for cell in cells():
        names = cell.victim.name, cell.fault.name, cell.moment.name
        if its := [each for each in results if (each.victim, each.fault, each.moment) == names]:
            row(*names, its)
    lines.append("-" * len(head))
    for fault in FAULTS:
        if its := [each for each in results if each.fault == fault.name]:
            row("any", fault.name, "any", its)
    row("any", "any", "any", results)
    return "\n".join(lines)


def report(results: list[Result]) -> Report:
    """In the form of benchmarks: all together, and each fault of each victim."""
    found = Report(f"Faults: {len(results)} cases of the matrix")
    found.row("cases", len(results), "cases")
    found.row("faults proven", sum(each.proven for each in results), "cases")
    found.row("wrong answers", sum(len(each.wrong) for each in results), "answers", goal="<= 0 answers")
    found.row("lost streams", sum(len(each.lost) for each in results), "streams", goal="<= 0 streams")
    found.row(
        "cases that left something behind", sum(bool(each.not_kept) for each in results), "cases", goal="<= 0 cases"
    )
    names = dict.fromkeys((cell.victim.name, cell.fault.name) for cell in cells())
    for victim, fault in (("any", "any"), *names):
        its = [
            each
            for each in results
            if each.proven and (victim == "any" or (each.victim, each.fault) == (victim, fault))
        ]
        if not its:
            continue
        found.row(f"{victim}: {fault}", len(its), "cases")
        pauses = [pause for each in its for pause in each.pauses_s]
        noticed = [each.noticed_s for each in its if each.noticed_s is not None]
        for of, values in (("pause", pauses), ("noticed", noticed)):
            for share, name in ((0.5, "median"), (0.99, "p99"), (1.0, "longest")):
                if values:
                    found.row(f"{victim}: {fault}: {of}, {name}", percentile(values, share), "s")
    found.note("pause: of each stream the longest gap less its usual one. noticed: from the fault until a coordinator")
    found.note(
        "dropped the worker or missed etcd, or the first client its coordinator. Cores are shared by everything."
    )
    return found
