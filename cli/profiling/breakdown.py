"""Where the time of a step goes. The parts of a step are cut from its timeline, so their sum is the step exactly.

start      run                 first kernel              last kernel      run's end    end
  |scheduler|batch and plans      |kernels and what is between|sampling        |scheduler|
"""

import random
import time
from dataclasses import dataclass

from baton.block_names import root_name
from cli.profiling.watching import KernelCall, Notes, Step, matrix_bytes
from engine.costs import StepShape
from engine.engine import Engine
from engine.loading import LoadedModel
from engine.measuring import Limits, Room
from engine.requests import EngineRequest, SamplingParams

LINEAR, HEAD, ATTENTION = "linear layers", "output head", "attention"
SMALL, OTHER = "norms, rotary, activation", "other kernels"
BATCH, SAMPLING, SCHEDULER = "batch tensors, attention plan", "sampling", "scheduler"
BETWEEN = "between kernels (Python)"
PARTS = (LINEAR, HEAD, ATTENTION, SMALL, OTHER, BATCH, SAMPLING, SCHEDULER, BETWEEN)
_GROUPS = {
    "attention": ATTENTION, "rms_norm": SMALL, "silu_and_mul": SMALL, "rotate_and_store": SMALL, "argmax": SAMPLING,
    "sample": SAMPLING,
}  # fmt: skip
DECODE_BATCHES, DECODE_CONTEXT = (1, 8, 32), 128
MIN_STEPS, MAX_STEPS = 4, 200
PREFILL_CONTEXT = 1536
"""Of the second chunk that is shown, where attention weighs more than in the first."""


@dataclass(frozen=True)
class Breakdown:
    """Seconds of a step, by part; the mean of the faster half of those measured, so that the parts still add up."""

    shape: StepShape
    step_s: float
    parts: dict[str, float]
    sampled_rows: int
    """Rows of logits: none for a chunk that does not end its prompt."""
    unwatched_s: float
    """The same step of an engine that nobody watches, its faster half too: the difference is what watching costs."""


@dataclass(frozen=True)
class Limit:
    """The least that a part can take on this machine, in seconds, and what bounds it."""

    seconds: float
    bound: str


def parts_of(step: Step) -> dict[str, float]:
    """Seconds by part; they sum to the step. A run whose kernels could not be watched is one part."""
    kernels = [call for call in step.kernels if call.name != "plan_attention"]
    parts = dict.fromkeys(PARTS, 0)
    if kernels:
        for call in kernels:
            parts[_group(call)] += call.end_ns - call.start_ns
        first, last = kernels[0].start_ns, kernels[-1].end_ns
        parts[BETWEEN] = last - first - sum(parts.values())
        parts[BATCH] = first - step.run_start_ns
        parts[SAMPLING] += step.run_end_ns - last
    else:
        parts[OTHER] = step.run_end_ns - step.run_start_ns
    parts[SCHEDULER] = (step.run_start_ns - step.start_ns) + (step.end_ns - step.run_end_ns)
    return {name: nanoseconds / 1e9 for name, nanoseconds in parts.items()}


def _group(call: KernelCall) -> str:
    if call.name == "linear":
        return HEAD if call.operand == "head" else LINEAR
    return _GROUPS.get(call.name, OTHER)


class Bench:
    """Two engines of one model that do the same: one is watched, one is not. Their steps take turns, so that whatever
    else the machine does hits both alike. Requests are greedy, never stop, and no cache holds their prompts.
    """

    def __init__(self, watched: Engine, plain: Engine, notes: Notes, vocab_size: int) -> None:
        self._engines = (watched, plain)
        self._notes = notes
        self._random = random.Random(1)
        self._vocab_size = vocab_size
        self._root = root_name("profile", "", "")
        self._number = 0

    def decode(self, batch: int, context: int, budget_s: float) -> Breakdown:
        """Steps of `batch` streams of `context` positions and a few more."""
        most = min(MAX_STEPS, context // 2)
        ids = [self._add(context, context) for _ in range(batch)]
        waiting = set(ids)
        while waiting:
            for engine in self._engines:
                tokens = engine.step().tokens
            waiting -= {token.request_id for token in tokens}
        self._notes.take_steps()
        end = time.perf_counter() + budget_s
        plain: list[float] = []
        while len(plain) < MIN_STEPS or (len(plain) < most and time.perf_counter() < end):
            plain.append(self._step())
        steps = self._notes.take_steps()
        self._end(ids)
        mean = round(sum(step.shape.context for step in steps) / len(steps))
        return _faster_half(StepShape(batch, mean), steps, plain)

    def prefill(self, tokens: int, contexts: list[int], budget_s: float) -> list[Breakdown]:
        """Chunks of `tokens` of one prompt; `contexts` are multiples of that."""
        steps: dict[int, list[Step]] = {context: [] for context in contexts}
        plain: dict[int, list[float]] = {context: [] for context in contexts}
        end = time.perf_counter() + budget_s
        for repeat in range(MAX_STEPS):
            if repeat >= MIN_STEPS and time.perf_counter() > end:
                break
            id = self._add(max(contexts) + tokens + 1, 2)
            for context in range(0, max(contexts) + 1, tokens):
                seconds = self._step()
                if context in contexts:
                    steps[context] += self._notes.take_steps()
                    plain[context].append(seconds)
                self._notes.take_steps()
            self._end([id])
        shapes = {context: StepShape(chunks=((tokens, context),)) for context in contexts}
        return [_faster_half(shapes[context], steps[context], plain[context]) for context in contexts]

    def _add(self, num_tokens: int, max_tokens: int) -> str:
        self._number += 1
        tokens = tuple(self._random.randrange(self._vocab_size) for _ in range(num_tokens))
        request = EngineRequest(
            f"profile-{self._number}", tokens, num_tokens, SamplingParams(max_tokens=max_tokens), self._root
        )
        for engine in self._engines:
            engine.add(request)
        return request.id

    def _step(self) -> float:
        """One of each engine; returns the seconds of the plain one."""
        watched, plain = self._engines
        watched.step()
        start = time.perf_counter()
        plain.step()
        return time.perf_counter() - start

    def _end(self, ids: list[str]) -> None:
        for engine in self._engines:
            for id in ids:
                engine.abort(id)
            engine.step()
            engine.check_idle()
        self._notes.take_steps()


def _faster_half(shape: StepShape, steps: list[Step], plain: list[float]) -> Breakdown:
    steps = sorted(steps, key=lambda step: step.end_ns - step.start_ns)[: -(-len(steps) // 2)]
    each = [parts_of(step) for step in steps]
    parts = {name: sum(parts[name] for parts in each) / len(each) for name in PARTS}
    step_s = sum(step.end_ns - step.start_ns for step in steps) / len(steps) / 1e9
    faster = sorted(plain)[: -(-len(plain) // 2)]
    return Breakdown(shape, step_s, parts, len(steps[0].output.tokens), sum(faster) / len(faster))


def shapes_to_show(room: Room) -> tuple[list[StepShape], int, list[int]]:
    """Decode shapes, and of the prefill the chunk and its contexts, as far as there is room."""
    context = min(DECODE_CONTEXT, room.max_model_tokens // 4)
    # Each stream grows while it is measured, at most to twice its context.
    decodes = [StepShape(batch, context) for batch in DECODE_BATCHES if room.holds(StepShape(batch, 2 * context + 1))]
    positions = min(room.max_model_tokens, room.num_blocks * room.page_size) - 2
    chunk = min(room.max_batch_tokens, positions)
    later = min(PREFILL_CONTEXT, positions - chunk) // chunk * chunk
    return decodes, chunk, sorted({0, later})


def limits_of(model: LoadedModel, breakdown: Breakdown, limits: Limits, kv_bytes_per_token: int) -> dict[str, Limit]:
    """Of each part that has one: bytes that it must read, or the products that it must form, whichever takes longer.

    Weights are read once a step, KV once for every sequence, by layers without a window. The parts beside those work
    on numbers that are in cache.
    """
    config, weights = model.config, model.weights
    shape, rows = breakdown.shape, breakdown.sampled_rows
    tokens = shape.batch + shape.prompt_tokens
    matrices = [each for layer in weights.layers for each in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    layer_bytes = sum(matrix_bytes(matrix) for matrix in matrices)
    products = sum(matrix.out_features * matrix.in_features for matrix in matrices)
    head = weights.head
    head_bytes = matrix_bytes(head) if rows else 0
    _, _, _, positions, pairs = shape.features()
    read = positions + sum(context + chunk for chunk, context in shape.chunks)
    looks = 4.0 * (positions + pairs) * config.num_heads * config.head_dim * config.num_layers
    return {
        LINEAR: _limit(layer_bytes, 2.0 * tokens * products, limits),
        HEAD: _limit(head_bytes, 2.0 * rows * head.out_features * head.in_features, limits),
        ATTENTION: _limit(read * kv_bytes_per_token, looks, limits),
    }


def _limit(num_bytes: float, flops: float, limits: Limits) -> Limit:
    reading, computing = num_bytes / limits.read_bytes_per_s, flops / limits.flops
    return Limit(reading, "memory") if reading > computing else Limit(computing, "products")
