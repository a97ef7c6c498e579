"""Stand-ins that note when the object behind them works: an engine, its runner, its kernels, the lanes.

They are put in place where the parts of a worker are joined, so an engine that is not watched runs exactly the code
that it always runs. Notes are tuples and small records; what they mean is found out afterwards.
"""

import contextlib
import dataclasses
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple, cast

from torch import Tensor

from engine.costs import StepShape
from engine.engine import Engine, OnOutput
from engine.loading import LoadedModel
from engine.plan import OnLayer, Runner, StepPlan, StepResult
from engine.requests import EngineRequest, StepOutput, TokenLogprobs
from engine.weights import Weights
from kernels.ops import Matrix, Ops
from kvtransfer import pulls
from kvtransfer.lanes.base import TO_END, BlockRead, LaneClient, LaneEndpoint
from kvtransfer.lanes.registry import LANES, Lane
from kvtransfer.memory import PoolMemory
from kvtransfer.offers import OfferServer

MAX_STEPS = 20_000
now = time.perf_counter_ns


class KernelCall(NamedTuple):
    """One call of an operation."""

    name: str
    operand: str
    """'head', or of a layer 'qkv', 'down', …; empty where the operation has no weight."""
    layer: int
    """-1 outside of the layers."""
    rows: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an engine: plan from start to run_start, run, apply from run_end to end. Nothing in it is idle."""

    shape: StepShape
    start_ns: int
    run_start_ns: int
    run_end_ns: int
    end_ns: int
    kernels: list[KernelCall]
    output: StepOutput


@dataclass
class Notes:
    """What one watched engine did; written by its thread alone, read when it rests."""

    worker: str
    steps: deque[Step] = field(default_factory=lambda: deque(maxlen=MAX_STEPS))
    added: dict[str, int] = field(default_factory=dict)
    """Request id -> when the engine took it in."""
    reserved: dict[str, tuple[int, int]] = field(default_factory=dict)
    """TAKE request -> when it got its blocks, and how many of them the prefix cache held."""
    received: dict[str, tuple[int, int]] = field(default_factory=dict)
    """TAKE request -> when its KV was there, and how many tokens of it."""
    computed: list[tuple[int, str, int]] = field(default_factory=list)
    """When blocks of a GIVE request became final: (time, request id, number of blocks)."""

    def take_steps(self) -> list[Step]:
        """The steps so far, which are forgotten."""
        steps = list(self.steps)
        self.steps.clear()
        return steps


# -- Kernels ---------------------------------------------------------------------------------------------------------


class WatchedOps:
    """Every method of an Ops, timed. What was called since the last `take` is kept."""

    def __init__(self, ops: Ops[Any], weights: Weights) -> None:
        self._ops = ops
        self._operands = _operands(weights)
        self._calls: list[tuple[str, int, int, int, int, int]] = []
        for name in dir(ops):
            method = getattr(ops, name)
            if callable(method) and not name.startswith("_"):
                setattr(self, name, self._timed(name, method))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def take(self) -> list[KernelCall]:
        """The calls so far, which are forgotten."""
        calls = self._calls.copy()
        self._calls.clear()
        return [
            KernelCall(name, *self._operands.get(key, ("", layer)), rows, start, end)
            for name, key, layer, rows, start, end in calls
        ]

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """About a microsecond a call. Arguments are not kept: activations must be freed as they always are."""
        calls = self._calls

        def timed(first: Any, second: Any = None, *rest: Any, **named: Any) -> Any:
            start = now()
            result = method(first, second, *rest, **named) if second is not None else method(first, *rest, **named)
            end = now()
            layer = rest[0] if rest and type(rest[0]) is int else -1
            rows = first.shape[0] if type(first) is Tensor else 0
            calls.append((name, id(second), layer, rows, start, end))
            return result

        return timed


def _operands(weights: Weights) -> dict[int, tuple[str, int]]:
    """id of each matrix and norm -> (name, layer). The weights outlive whoever uses this."""
    known = {id(weights.norm): ("norm", -1), id(weights.head): ("head", -1)}
    for index, layer in enumerate(weights.layers):
        for each in dataclasses.fields(layer):
            known[id(getattr(layer, each.name))] = (each.name, index)
    known.pop(id(None), None)  # of weights that a model does not have
    return known


def matrix_bytes(matrix: Matrix) -> int:
    return matrix.data.nbytes + (0 if matrix.bias is None else matrix.bias.nbytes)


# -- Engine ----------------------------------------------------------------------------------------------------------


class WatchedRunner:
    """Implements engine.plan.Runner."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.latest: tuple[StepPlan, int, int] | None = None

    def run(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult:
        start = now()
        result = self._runner.run(plan, on_layer)
        self.latest = (plan, start, now())
        return result


class WatchedEngine(Engine):
    """Notes its steps and what became of its requests."""

    def __init__(self, runner: Runner, ops: WatchedOps, notes: Notes, **limits: Any) -> None:
        self._watched = WatchedRunner(runner)
        self._ops = ops
        self._notes = notes
        super().__init__(self._watched, **limits)

    def add(self, request: EngineRequest) -> None:
        super().add(request)
        self._notes.added[request.id] = now()

    def receive(
        self,
        request_id: str,
        num_tokens: int,
        first_token: int | None,
        num_loaded: int = 0,
        same_bits: bool = True,
        fenced: bool = False,
        first_logprobs: TokenLogprobs | None = None,
    ) -> bool:
        received = super().receive(request_id, num_tokens, first_token, num_loaded, same_bits, fenced, first_logprobs)
        if received:
            self._notes.received[request_id] = (now(), num_tokens)
        return received

    def step(self, on_output: OnOutput | None = None) -> StepOutput:
        def early(output: StepOutput) -> None:
            self._note(output, now())
            if on_output is not None:
                on_output(output)

        notes = self._notes
        self._watched.latest = None
        self._ops.take()
        start = now()
        output = super().step(early if on_output is not None else None)
        end = now()
        if self._watched.latest is not None:
            plan, run_start, run_end = self._watched.latest
            shape = StepShape.of(plan)
            notes.steps.append(Step(shape, start, run_start, run_end, end, self._ops.take(), output))
        self._note(output, end)
        return output

    def _note(self, output: StepOutput, at_ns: int) -> None:
        for reserved in output.reserved:
            self._notes.reserved[reserved.request_id] = (at_ns, reserved.num_cached_blocks)
        whole = [each for each in output.computed if each.is_whole and each.block_ids]
        self._notes.computed += [(at_ns, each.request_id, len(each.block_ids)) for each in whole]


@dataclass(frozen=True)
class Watched:
    """What `cli.assembly.assemble` takes to build a worker that is watched."""

    model: LoadedModel
    build: Callable[..., Engine]
    notes: Notes


def watched(model: LoadedModel, worker: str) -> Watched:
    """The model with watched kernels, and the constructor of the engine that belongs to it.

    The engine never looks ahead, so that each part of a step has a time of its own. Kernels that are launched beside
    the host have no time that the host could see: those are let alone, and their steps are whole.
    """
    ops, notes = WatchedOps(model.ops, model.weights), Notes(worker)

    def build(runner: Runner, **limits: Any) -> Engine:
        return WatchedEngine(runner, ops, notes, **{**limits, "look_ahead": False})

    if model.ops.launches:
        return Watched(model, build, notes)
    return Watched(dataclasses.replace(model, ops=cast("Ops[Any]", ops)), build, notes)


class Plain:
    """Builds an engine that nobody watches, and keeps its runner, to be measured by itself."""

    runner: Runner

    def build(self, runner: Runner, **limits: Any) -> Engine:
        self.runner = runner
        return Engine(runner, **{**limits, "look_ahead": False})


# -- Transfers -------------------------------------------------------------------------------------------------------


class TransferSpan(NamedTuple):
    """What one thread did: 'pull' (blocks, bytes and lane are set), 'batch' (a pull and its check), 'checksum'."""

    kind: str
    thread: str
    start_ns: int
    end_ns: int
    lane: str = ""
    num_blocks: int = 0
    num_bytes: int = 0


class WatchedLaneClient(LaneClient):
    def __init__(self, client: LaneClient, block_bytes: int, spans: list[TransferSpan]) -> None:
        self.name = client.name
        self._client = client
        self._block_bytes = block_bytes
        self._spans = spans

    def pull(self, reads: Sequence[BlockRead], deadline: float, cancelled: threading.Event | None = None) -> None:
        start = now()
        self._client.pull(reads, deadline, cancelled)
        num_bytes = sum(
            self._block_bytes - each.offset if each.num_bytes == TO_END else each.num_bytes for each in reads
        )
        self._spans.append(TransferSpan("pull", _thread(), start, now(), self.name, len(reads), num_bytes))

    def close(self) -> None:
        self._client.close()


@contextlib.contextmanager
def watched_transfers() -> Iterator[list[TransferSpan]]:
    """While it lasts, lanes opened and threads started note what they move and check, from whichever thread."""
    spans: list[TransferSpan] = []
    unwatched = dict(LANES)
    before = threading.getprofile()
    LANES.update({name: _watched_lane(lane, spans) for name, lane in unwatched.items()})
    threading.setprofile(_function_watcher(spans))
    try:
        yield spans
    finally:
        threading.setprofile(before)
        LANES.update(unwatched)


def _watched_lane(lane: Lane, spans: list[TransferSpan]) -> Lane:
    def connect(endpoint: LaneEndpoint, local: PoolMemory, deadline: float) -> LaneClient:
        return WatchedLaneClient(lane.connect(endpoint, local, deadline), local.block_bytes, spans)

    return dataclasses.replace(lane, connect=connect)


def _function_watcher(spans: list[TransferSpan]) -> Callable[[FrameType, str, Any], None]:
    """A profile function of the interpreter. Checks have no object that could be stood in for, so calls are watched.

    Only in the threads that copy and check, where calls are few: every other new thread is let alone at once.
    """
    kinds = {pulls.pull_and_verify.__code__: "batch", OfferServer._checksum.__code__: "checksum"}
    starts: dict[int, int] = {}
    known: set[int] = set()

    def watch(frame: FrameType, event: str, _: Any) -> None:
        ident = threading.get_ident()
        if ident not in known:  # asked once: a thread that ends has no name any more
            if not _thread().startswith("kv-"):
                sys.setprofile(None)
                return
            known.add(ident)
        if frame.f_code in kinds:
            if event == "call":
                starts[ident] = now()
            elif event == "return":
                spans.append(TransferSpan(kinds[frame.f_code], _thread(), starts[ident], now()))

    return watch


def _thread() -> str:
    """Name of this thread, and its number, as names repeat."""
    thread = threading.current_thread()
    return f"{thread.name} {thread.native_id}"
