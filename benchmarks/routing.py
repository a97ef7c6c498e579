"""What a routing decision costs, and what each policy makes of public traces, in a model of a cluster.

    python -m benchmarks.routing [--quick] [--json FILE] [--traces conversation,synthetic] [--speeds 1,1.5]

Decisions: an index of 1 M blocks, prompts of 2,048 tokens in pages of 16, half of each common to all workers' caches
and some more held by a few; each has come before. Match is naming the prompt's blocks, which is spared for what came
lately, and the walk through the index; choose is the policy.

Traces: the real registry, index (fed through real KvEvents) and policies, around this model of the rest:

- 6 prefill workers of 9,000 tokens/s, one prompt at a time, first come first served; 4 decode workers. KV is 320 KiB a
  token (a 70B model), hand-over 40 GB/s, overlapped with computing. The time of attention that grows with the context
  is left out. Each worker is about what a node of 8 A800 is in Mooncake's paper.
- A decode step takes 40 ms and 1 ms for each stream; a worker that prefills locally gives half of its time to each.
  Answers have 343 tokens (conversation) or 149 (synthetic), the means of the traces, which give no lengths here.
- Pools hold 1 M tokens a worker, least recently used blocks of 512 go first. What streams hold is not set apart.
- Workers tell changes after 50 ms, and their load in heartbeats each 0.5 s; what they measure is exact. Whoever
  computes a prompt fetches what a worker named in its assignment has, at the rate of the hand-over.
- SLO: first token within 10 s, and a mean step under 100 ms.
"""

import argparse
import gzip
import heapq
import itertools
import json
import random
import statistics
import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from baton.block_names import root_name
from baton.token_ids import pack
from baton.v1 import worker_link_pb2 as wire
from benchmarks.report import Report, add_common_arguments
from benchmarks.retention import BLOCK_TOKENS, DATA, name_of
from coordinator.assignments import holders
from coordinator.block_keys import KEY_BYTES, BlockKeys, KeyMemo
from coordinator.knowledge import Prompt, Told
from coordinator.kv_index import KvIndex
from coordinator.policies import POLICIES
from coordinator.policies.base import Cached, Work
from coordinator.prefixes import STRIDE_TOKENS, Life, PrefixMemory
from coordinator.routing import Route, Router
from coordinator.worker_table import Fixed, Group, Load, WorkerTable
from coordinator.workers import Leg, Worker, WorkerRegistry

INDEX_BLOCKS = 1_000_000
PROMPT_TOKENS, PAGE = 2048, 16
GOAL_S = 100e-6

NUM_PREFILL, NUM_DECODE = 6, 4
PREFILL_TOKENS_PER_S, KV_BYTES, HANDOVER_BYTES_PER_S = 9000.0, 327_680, 40e9
STEP_S, STREAM_S = 0.040, 0.001
POOL_BLOCKS = 1_000_000 // BLOCK_TOKENS
TELL_S, BEAT_S = 0.05, 0.5
ANSWER_TOKENS = {"conversation": 343, "synthetic": 149}
TTFT_SLO_S, ITL_SLO_S = 10.0, 0.1


# Decisions


def a_cluster(num_workers: int, draw: random.Random) -> tuple[WorkerTable, Told, list[Prompt]]:
    """Half prefill, half decode workers with 1 M blocks in all, and prompts, of which they hold parts."""
    table = WorkerTable()
    told = Told(table, 4 * INDEX_BLOCKS)
    common = [draw.randrange(30_000) for _ in range(PROMPT_TOKENS // 2)]
    prompts = [common + [draw.randrange(30_000) for _ in range(PROMPT_TOKENS // 2)] for _ in range(100)]
    keys = [[*itertools.chain(*BlockKeys(root_name("model"), PAGE, pack(prompt)))] for prompt in prompts]
    for at in range(num_workers):
        prefills = float(at % 2)
        row = table.add(f"w{at}", Group("v", "model", PAGE), Fixed(prefills, 1 - prefills, 0, 65536, 131072, 256))
        waiting = draw.randrange(20_000)
        table.put(row, Load(1, 800_000, draw.randrange(30), waiting, STREAM_S, 1 / PREFILL_TOKENS_PER_S, 1e-5))
        held = keys[0][: len(keys[0]) // 2]
        for its in keys:
            if draw.random() < 3 / num_workers:
                held = held + its[len(its) // 2 : draw.randrange(len(its) // 2, len(its))]
        held = held + [draw.getrandbits(64) for _ in range(INDEX_BLOCKS // num_workers - len(held))]
        change = wire.KvChange(tier=wire.KV_TIER_POOL, stored=array("Q", held).tobytes())
        index = told.index
        index.apply(index.open(row), wire.KvEvents(sequence=1, snapshot=True, changes=[change]))
    return table, told, [Prompt(pack(prompt), "", "v") for prompt in prompts]


def decide(report: Report, num_workers: int, policies: list[str]) -> None:
    table, told, prompts = a_cluster(num_workers, random.Random(num_workers))
    memo = KeyMemo()
    _, keys = ([list(BlockKeys(root_name("model"), PAGE, its.packed, memo)) for its in prompts] for _ in range(2))
    for policy in policies:
        router = Router(table, policy, 64)
        times: dict[str, list[float]] = {"match": [], "choose": [], "walk": []}
        for prompt, its in list(zip(prompts, keys, strict=True)) * 5:
            begin = time.perf_counter()
            cached = told.match(prompt)
            matched = time.perf_counter()
            route = router.choose(Work(PROMPT_TOKENS, PROMPT_TOKENS + 100, cached), table.candidates("v"))
            chosen = time.perf_counter()
            assert route is not None
            told.index.match(its, len(table))
            walked = time.perf_counter()
            for name, seconds in zip(times, (matched - begin, chosen - matched, walked - chosen), strict=True):
                times[name].append(seconds)
        medians = {name: statistics.median(its[len(prompts) :]) * 1e6 for name, its in times.items()}
        total = medians["match"] + medians["choose"]
        where = f"{num_workers} workers, {policy}"
        report.row(f"{where}: match and choose", total, "us", "goal 100 us", total / GOAL_S / 1e6, "<= 100 us")
        if policy == "cost_based":
            both = [sum(pair) for pair in zip(times["match"], times["choose"], strict=True)][len(prompts) :]
            quick = statistics.quantiles(both, n=10)[0] * 1e6
            report.row(f"{where}: the same, quickest tenth", quick, "us", "goal 100 us", quick / GOAL_S / 1e6)
            report.row(f"{where}: choose", medians["choose"], "us")
            report.row(f"{where}: match", medians["match"], "us")
            report.row(f"{where}: of this the walk, names known", medians["walk"], "us")
    loads = [SimpleNamespace(requests=at % 7, free_tokens=at) for at in range(num_workers)]
    looped = []
    for _ in range(200):
        begin = time.perf_counter()
        min(loads, key=lambda load: (load.requests, -load.free_tokens))
        looped.append(time.perf_counter() - begin)
    loop = statistics.median(looped) * 1e6
    report.row(f"{num_workers} workers: a loop in Python for the fewest requests, no caches, no rules", loop, "us")
    report.row(f"{num_workers} workers: memory of the index, estimate", told.index.num_bytes / 2**20, "MiB")


# The model of a cluster


@dataclass(slots=True)
class Asked:
    arrival_s: float
    num_tokens: int
    names: list[bytes]
    keys: list[int] = field(default_factory=list)
    session: int = 0


def load(trace: str, num_requests: int, speed: float) -> list[Asked]:
    names: dict[int, bytes] = {}
    asked = []
    with gzip.open(DATA / f"mooncake_{trace}.jsonl.gz", "rt") as lines:
        for line in itertools.islice(lines, num_requests):
            at_ms, num_tokens, runs = json.loads(line)
            ids = [first + index for first, count in runs for index in range(count)]
            # The last block may be short, and a worker names full ones only.
            its = [names.setdefault(id_, name_of(id_)) for id_ in ids[: num_tokens // BLOCK_TOKENS]]
            keys = [int.from_bytes(name[:KEY_BYTES], "little") for name in its]
            session = int.from_bytes(name_of(ids[:2])[:8], "little")
            asked.append(Asked(at_ms / 1000 / speed, num_tokens, its, keys, session))
    # Arrivals are told on a grid of 3 s in one of the traces: those of one moment are spread until the next.
    draw = random.Random(0)
    moments = sorted({each.arrival_s for each in asked})
    following = dict(itertools.pairwise(moments))
    for each in asked:
        each.arrival_s += draw.random() * (following.get(each.arrival_s, each.arrival_s) - each.arrival_s)
    return sorted(asked, key=lambda each: each.arrival_s)


class Nobody:
    """The link of a worker that is told nothing."""

    def send(self, message: wire.CoordinatorMessage) -> bool:
        return True

    def abort(self) -> None:
        """There is no connection."""


class Machine:
    """One worker: an LRU pool of names, a queue of prompts, streams that share steps."""

    def __init__(self, cluster: "Cluster", worker: Worker) -> None:
        self.cluster = cluster
        self.worker = worker
        self.pool: OrderedDict[bytes, None] = OrderedDict()
        self.busy_s = 0.0
        self.free_at_s = 0.0
        """When what is queued will have been computed."""
        self.queue: list[tuple[float, float, int]] = []
        """(begins, ends, tokens) of prompts."""
        self.streams: list[tuple[float, int, Callable[[float], None]]] = []
        """A heap by the number of steps at which each ends."""
        self._steps = 0.0
        self._steps_at_s = 0.0
        self._step_s = STEP_S
        """Since then."""
        self._plan_number = 0
        self._stored: list[bytes] = []
        self._removed: list[bytes] = []
        self._sequence = 0

    def leading(self, names: list[bytes]) -> int:
        return next((at for at, name in enumerate(names) if name not in self.pool), len(names))

    def keep(self, names: list[bytes]) -> None:
        """These are in the pool now, and were used last; tails go before heads."""
        if not self._stored and not self._removed:
            self.cluster.at(self.cluster.now_s + TELL_S, self._tell)
        for name in reversed(names):
            if name not in self.pool:
                self._stored.append(name)
            self.pool[name] = None
            self.pool.move_to_end(name)
        while len(self.pool) > POOL_BLOCKS:
            self._removed.append(self.pool.popitem(last=False)[0])

    def _tell(self) -> None:
        stored, removed = set(self._stored), set(self._removed)
        change = wire.KvChange(
            tier=wire.KV_TIER_POOL,
            stored=b"".join(name[:KEY_BYTES] for name in stored if name in self.pool),
            removed=b"".join(name[:KEY_BYTES] for name in removed if name not in self.pool),
        )
        self._stored, self._removed = [], []
        self._sequence += 1
        message = wire.KvEvents(sequence=self._sequence, snapshot=self._sequence == 1, changes=[change])
        self.cluster.index.apply(self.cluster.caches[self.worker.id], message)

    # Decoding: all streams share the steps, so each is over after so many of them.

    def _advance(self) -> None:
        self._steps += (self.cluster.now_s - self._steps_at_s) / self._step_s
        self._steps_at_s = self.cluster.now_s

    def decode(self, num_tokens: int, on_end: Callable[[float], None]) -> None:
        self._advance()
        heapq.heappush(self.streams, (self._steps + num_tokens, next(self.cluster.numbers), on_end))
        self._plan()

    def _plan(self) -> None:
        """Something has changed: how long a step is from now on, and when the next change comes by itself."""
        now_s = self.cluster.now_s
        is_prefilling = self.free_at_s > now_s
        self._step_s = (STEP_S + STREAM_S * len(self.streams)) * (2 if is_prefilling else 1)
        self._plan_number += 1
        if self.streams:
            change_s = now_s + max(0.0, self.streams[0][0] - self._steps) * self._step_s
            change_s = min(change_s, self.free_at_s) if is_prefilling else change_s
            self.cluster.at(change_s, lambda number=self._plan_number: self._changed(number))  # type: ignore[misc]

    def _changed(self, plan_number: int) -> None:
        if plan_number != self._plan_number:
            return
        self._advance()
        while self.streams and self.streams[0][0] <= self._steps + 1e-6:
            heapq.heappop(self.streams)[2](self.cluster.now_s)
        self._plan()

    def compute(self, num_tokens: int, fetch_s: float) -> tuple[float, float]:
        """(begin, end) of computing so many tokens of a prompt, once all others before it are computed."""
        seconds = num_tokens / PREFILL_TOKENS_PER_S
        if self.worker.decodes:
            self._advance()
            seconds *= 2 if self.streams else 1
        begin_s = max(self.cluster.now_s, self.free_at_s)
        end_s = self.free_at_s = begin_s + fetch_s + seconds
        self.busy_s += seconds
        self.queue.append((begin_s, end_s, num_tokens))
        if self.worker.decodes:
            self._plan()
        return begin_s, end_s

    def beat(self) -> None:
        now_s = self.cluster.now_s
        self.queue = [entry for entry in self.queue if entry[1] > now_s]
        waiting = sum(num * min(1.0, (end - now_s) / (end - begin + 1e-9)) for begin, end, num in self.queue)
        beat = wire.WorkerHeartbeat(
            blocks=wire.BlockCounts(total=10**6, free=10**6), running_requests=len(self.streams) + len(self.queue),
            waiting_prefill_tokens=int(waiting), prefill_tokens_per_s=PREFILL_TOKENS_PER_S,
            handover_bytes_per_s=HANDOVER_BYTES_PER_S, step_s=self._step_s if self.worker.decodes else 0.0,
        )  # fmt: skip
        self.worker.beat(beat)


class Stream(NamedTuple):
    ttft_s: float
    itl_s: float


@dataclass
class Figures:
    streams: list[Stream] = field(default_factory=list)
    hit_tokens: int = 0
    prompt_tokens: int = 0
    choices: Counter[str] = field(default_factory=Counter)


class Cluster:
    """Discrete events: (time, what happens)."""

    def __init__(self, policy: str, answer_tokens: int, is_guessing: bool, fetches: bool) -> None:
        self.now_s = 0.0
        self.numbers = itertools.count()
        self.index = KvIndex(4_000_000)
        self.figures = Figures()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._answer_tokens = answer_tokens
        self._fetches = fetches
        # As many tokens as the coordinator would remember; a stride is a block here.
        self._memory = PrefixMemory(4096) if is_guessing else None
        registry = WorkerRegistry("model")
        self.machines: dict[str, Machine] = {}
        for role, number in (("prefill", NUM_PREFILL), ("decode", NUM_DECODE)):
            for at in range(number):
                registration = wire.Registration(
                    protocol_version=1, worker_id=f"{role}-{at}", incarnation=1 + at, model="model",
                    roles=[wire.ROLE_PREFILL if role == "prefill" else wire.ROLE_DECODE], page_size_tokens=BLOCK_TOKENS,
                    total_blocks=10**6, max_model_tokens=10**6, block_bytes=BLOCK_TOKENS * KV_BYTES,
                    handover_address="x", model_version="v", model_fingerprint="f",
                )  # fmt: skip
                worker = registry.register(registration, Nobody())
                self.machines[worker.id] = Machine(self, worker)
        self.registry = registry
        self.caches = {id: self.index.open(machine.worker.row) for id, machine in self.machines.items()}
        self._router = Router(registry.table, policy, 64)
        if isinstance(self._router.policy, POLICIES["power_of_two"]):
            self._router.policy._random.seed(1)  # type: ignore[attr-defined]

    def at(self, when_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self.numbers), what))

    def play(self, asked: list[Asked]) -> Figures:
        for each in asked:
            self.at(each.arrival_s, lambda each=each: self._arrive(each))  # type: ignore[misc]
        self._open = len(asked)
        self.at(0.0, self._beat)
        while self._events:
            self.now_s, _, what = heapq.heappop(self._events)
            what()
        return self.figures

    def _beat(self) -> None:
        for machine in self.machines.values():
            machine.beat()
        if self._open:
            self.at(self.now_s + BEAT_S, self._beat)

    def _cached(self, asked: Asked) -> Cached:
        if self._memory is None:
            depths = self.index.match([asked.keys] if asked.keys else [], len(self.registry.table))
        else:
            depths = np.zeros((3, len(self.registry.table)))
            for held in self._memory.holders(asked.names):
                depths[:, self.machines[held.life.worker_id].worker.row] = held.num_tokens // STRIDE_TOKENS
        return Cached(np.minimum(depths * BLOCK_TOKENS, asked.num_tokens - 1))

    def _arrive(self, asked: Asked) -> None:
        work = Work(asked.num_tokens, asked.num_tokens + 1000, self._cached(asked), asked.session)
        route = self._router.choose(work, self.registry.candidates("v"))
        assert route is not None
        figures = self.figures
        figures.choices[route.choice.value] += 1
        decode = self.machines[route.decode]
        computer = self.machines[route.prefill or route.decode]
        found = computer.leading(asked.names)
        fetched = 0
        if self._fetches:
            named = [self.machines[each.worker.worker_id] for each in holders(work, computer.worker, self.registry, ())]
            fetched = max((machine.leading(asked.names) for machine in named), default=0)
        uncached = max(1, asked.num_tokens - max(found, fetched) * BLOCK_TOKENS)
        fetch_s = max(0, fetched - found) * BLOCK_TOKENS * KV_BYTES / HANDOVER_BYTES_PER_S
        figures.hit_tokens += min(max(found, fetched) * BLOCK_TOKENS, asked.num_tokens)
        figures.prompt_tokens += asked.num_tokens
        legs = self._open_legs(asked, route, uncached)
        begin_s, end_s = computer.compute(uncached, fetch_s)
        computer.keep(asked.names[:found])
        moved = (asked.num_tokens - decode.leading(asked.names) * BLOCK_TOKENS) * KV_BYTES / HANDOVER_BYTES_PER_S
        tail_s = max(0.0, moved - (end_s - begin_s)) if route.prefill else 0.0
        self.at(end_s, lambda: self._computed(asked, computer, legs))
        self.at(end_s + tail_s, lambda: self._decode(asked, decode, end_s, legs))

    def _open_legs(self, asked: Asked, route: Route, uncached: int) -> list[Leg]:
        number = next(self.numbers)
        choice: Any = SimpleNamespace(stream_id=f"r{number}")
        legs = []
        for id in filter(None, (route.prefill, route.decode)):
            leg = Leg(choice, 1, self.machines[id].worker, id == route.decode, number)
            computes = id == (route.prefill or route.decode)
            leg.worker.open(leg, asked.num_tokens, uncached if computes else 0)
            legs.append(leg)
        return legs

    def _computed(self, asked: Asked, computer: Machine, legs: list[Leg]) -> None:
        computer.keep(asked.names)
        if self._memory is not None:
            self._memory.record(asked.names, Life(computer.worker.id, 1))
        legs[0].worker.waits(legs[0], 0)
        if len(legs) == 2:
            legs[0].worker.close(legs[0])

    def _decode(self, asked: Asked, decode: Machine, first_s: float, legs: list[Leg]) -> None:
        decode.keep(asked.names)

        def over(now_s: float) -> None:
            legs[-1].worker.close(legs[-1])
            itl_s = (now_s - first_s) / self._answer_tokens
            self.figures.streams.append(Stream(first_s - asked.arrival_s, itl_s))
            self._open -= 1

        decode.decode(self._answer_tokens, over)


def ideal_share(asked: list[Asked]) -> float:
    """Of the prompts' tokens, what one cache without bounds would have."""
    held: set[bytes] = set()
    hits = 0
    for each in asked:
        hits += BLOCK_TOKENS * next((at for at, name in enumerate(each.names) if name not in held), len(each.names))
        held.update(each.names)
    return hits / sum(each.num_tokens for each in asked)


class Workload(NamedTuple):
    name: str
    asked: list[Asked]
    answer_tokens: int
    ideal: float


def replay(report: Report, workload: Workload, policy: str, *, is_guessing: bool = False, fetches: bool = True) -> None:
    _, asked, answer_tokens, ideal = workload
    cluster = Cluster(policy, answer_tokens, is_guessing, fetches)
    figures = cluster.play(asked)
    streams = figures.streams
    assert len(streams) == len(asked)
    ttft = np.array([stream.ttft_s for stream in streams])
    itl = np.array([stream.itl_s for stream in streams])
    good = float(((ttft <= TTFT_SLO_S) & (itl <= ITL_SLO_S)).mean())
    busy = [machine.busy_s for machine in cluster.machines.values() if machine.worker.prefills]
    hits = figures.hit_tokens / figures.prompt_tokens
    where = f"{workload.name}, {policy}{', approximate' if is_guessing else ''}{'' if fetches else ', no fetching'}"
    report.row(f"{where}: TTFT mean", float(ttft.mean()), "s")
    report.row(f"{where}: TTFT p50", float(np.percentile(ttft, 50)), "s")
    report.row(f"{where}: TTFT p99", float(np.percentile(ttft, 99)), "s")
    report.row(f"{where}: ITL p99", 1000 * float(np.percentile(itl, 99)), "ms")
    report.row(f"{where}: tokens found", 100 * hits, "%", f"ideal {100 * ideal:.1f}", hits / ideal)
    report.row(f"{where}: requests within the SLO", 100 * good, "%")
    report.row(f"{where}: busiest prefill worker", max(busy) / statistics.mean(busy), "x mean")
    report.row(f"{where}: prefilled by decode", 100 * (1 - figures.choices["remote"] / len(asked)), "%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--traces", default="conversation,synthetic", help="several separated by commas")
    parser.add_argument("--policies", default=",".join(POLICIES), help="several separated by commas")
    parser.add_argument("--speeds", default="1,1.5", help="how much faster than they did requests come; several")
    parser.add_argument("--only", choices=("decisions", "traces"), help="one half of it")
    arguments = parser.parse_args()
    policies = arguments.policies.split(",")
    report = Report("Routing: decisions, and policies on public traces in a model of a cluster")
    if arguments.only != "traces":
        for num_workers in (10, 100, 1000):
            decide(report, num_workers, policies)
    traces = [] if arguments.only == "decisions" else arguments.traces.split(",")
    for trace, speed in itertools.product(traces, map(float, arguments.speeds.split(","))):
        asked = load(trace, 1000 if arguments.quick else 10**6, speed)
        workload = Workload(f"{trace} x {speed:g}", asked, ANSWER_TOKENS[trace], ideal_share(asked))
        for policy in policies:
            replay(report, workload, policy)
        if "cost_based" in policies:
            replay(report, workload, "cost_based", is_guessing=True)
            replay(report, workload, "cost_based", fetches=False)
    if traces:
        report.note("Traces: a model, see the text of --help; compare policies, not seconds.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
