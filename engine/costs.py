"""What a step and a transfer of one model on one machine take: measured by `baton profile`, read by whoever plans.

`CostTable.estimate` answers for any step from the measured ones:

- Prompts alone, or single tokens alone: interpolated linearly between the measured shapes, first in context, then in
  tokens or batch. Below the smallest shape the smallest counts, above the largest the last slope goes on.
- Both in one step: the single tokens as if alone, plus what as many more tokens cost on top of them without context,
  plus what the prompts' context adds. No mixed step goes into that; those that were measured judge it (`errors`).

`Fit` says the same in five numbers, in the manner of Vidur (Agrawal et al., 2024) and DistServe (Zhong et al., 2024):
seconds = step + token * tokens + row * sampled rows + position * positions that single tokens look at
          + pair * (prompt token, position it looks at) pairs. It is smooth where the table has corners, and less exact.

No torch here: a planner and a simulator need none.
"""

import dataclasses
import itertools
import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from baton.errors import ConfigurationError
from baton.files import replace_file
from engine.plan import StepPlan

FORMAT = 1
Points = list[tuple[float, float]]
Rows = dict[int, Points]
"""By size (tokens or batch): (context, seconds), ascending."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What decides how long a step takes. A measured one has at most one chunk."""

    batch: int = 0
    """Single tokens."""
    context: int = 0
    """Mean number of positions before each of them."""
    chunks: tuple[tuple[int, int], ...] = ()
    """Of each prompt: (tokens, positions before them)."""

    @classmethod
    def of(cls, plan: StepPlan) -> "StepShape":
        """Guesses of speculative decoding count as prompt tokens: they are computed like those."""
        singles = [sequence.start for sequence in plan.sequences if len(sequence.token_ids) == 1]
        chunks = tuple((len(s.token_ids), s.start) for s in plan.sequences if len(s.token_ids) > 1)
        return cls(len(singles), round(sum(singles) / len(singles)) if singles else 0, chunks)

    @property
    def prompt_tokens(self) -> int:
        return sum(tokens for tokens, _ in self.chunks)

    def features(self) -> tuple[float, ...]:
        """What `Fit` multiplies."""
        pairs = sum(tokens * (context + (tokens + 1) / 2) for tokens, context in self.chunks)
        tokens, rows = self.batch + self.prompt_tokens, self.batch + len(self.chunks)
        return (1.0, tokens, rows, self.batch * (self.context + 1), pairs)


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """One prompt's chunk alone, its last token sampled."""

    tokens: int
    context: int
    seconds: float

    def shape(self) -> StepShape:
        return StepShape(chunks=((self.tokens, self.context),))


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """One token each of `batch` sequences."""

    batch: int
    context: int
    seconds: float

    def shape(self) -> StepShape:
        return StepShape(self.batch, self.context)


@dataclass(frozen=True, slots=True)
class MixedCost:
    """Both in one step."""

    batch: int
    context: int
    tokens: int
    prompt_context: int
    seconds: float

    def shape(self) -> StepShape:
        return StepShape(self.batch, self.context, ((self.tokens, self.prompt_context),))


@dataclass(frozen=True, slots=True)
class SchedulerCost:
    """Planning and accounting of a step, which the other costs leave out."""

    batch: int
    seconds: float


@dataclass(frozen=True, slots=True)
class TransferCost:
    """`lane` is the name of a lane, or 'checksum' for computing xxh3 of as many bytes."""

    lane: str
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative: 0.1 is ten percent."""

    p50: float
    p90: float
    max: float

    @classmethod
    def of(cls, errors: Iterable[float]) -> "Errors":
        values = np.abs(np.fromiter(errors, np.float64))
        if not len(values):
            return cls(0.0, 0.0, 0.0)
        return cls(*(round(float(np.quantile(values, quantile)), 4) for quantile in (0.5, 0.9, 1.0)))


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients in seconds, see the module; none is negative. `errors`: on the steps that it was fitted to."""

    step: float
    token: float
    row: float
    position: float
    pair: float
    errors: Errors

    def seconds(self, shape: StepShape) -> float:
        coefficients = (self.step, self.token, self.row, self.position, self.pair)
        return sum(each * feature for each, feature in zip(coefficients, shape.features(), strict=True))

    @classmethod
    def to(cls, steps: Sequence[tuple[StepShape, float]]) -> "Fit":
        """Least squares of relative errors, so that short steps count as much as long ones."""
        seconds = np.array([each for _, each in steps])
        features = np.array([shape.features() for shape, _ in steps]) / seconds[:, None]
        used = list(range(features.shape[1]))
        coefficients = np.zeros(features.shape[1])
        while used:
            found = np.linalg.lstsq(features[:, used], np.ones(len(steps)), rcond=None)[0]
            if found.min() >= 0:
                coefficients[used] = found
                break
            del used[int(found.argmin())]
        step, token, row, position, pair = map(float, coefficients)
        return cls(step, token, row, position, pair, Errors.of(features @ coefficients - 1))


@dataclass(frozen=True)
class ModelFacts:
    name: str
    parameters: int
    layers: int
    kv_bytes_per_token: int


@dataclass(frozen=True)
class CostTable:
    """Seconds are medians of several repetitions of `Runner.run`, sampling included, scheduling not."""

    machine: str
    cpu: str
    threads: int
    kernels: str
    model: ModelFacts
    dtype: str
    page_size: int
    date: str
    """ISO 8601, UTC."""
    version: str
    commit: str
    """Of the clone that ran; empty outside of one."""
    prefill: list[PrefillCost]
    decode: list[DecodeCost]
    mixed: list[MixedCost]
    scheduler: list[SchedulerCost]
    transfer: list[TransferCost]
    read_bytes_per_s: float
    """Memory read by all threads; the limit of a decode step."""
    flops: float
    """Products of matrices in `dtype` by all threads; the limit of a prefill."""
    noise: Errors
    """How far repetitions of a step were from their median."""
    fit: Fit = field(init=False)
    mixed_errors: Errors = field(init=False)
    """Of `estimate` for the mixed steps, of which it uses none."""

    def __post_init__(self) -> None:
        costs: list[PrefillCost | DecodeCost | MixedCost] = [*self.prefill, *self.decode, *self.mixed]
        steps = [(cost.shape(), cost.seconds) for cost in costs]
        object.__setattr__(self, "fit", Fit.to(steps))
        errors = Errors.of(self.estimate(cost.shape()) / cost.seconds - 1 for cost in self.mixed)
        object.__setattr__(self, "mixed_errors", errors)

    # -- Answers -------------------------------------------------------------------------------------------------

    def estimate(self, shape: StepShape) -> float:
        """Seconds of a step; see the module. 0 for one that computes nothing."""
        chunks, batch = shape.chunks, shape.batch
        seconds = self.decode_s(batch, shape.context) if batch else 0.0
        if chunks:
            alone = self.prefill_s(batch, 0) if batch else 0.0
            seconds += max(0.0, self.prefill_s(batch + shape.prompt_tokens, 0) - alone)
            added = (self.prefill_s(tokens, context) - self.prefill_s(tokens, 0) for tokens, context in chunks)
            seconds += sum(max(0.0, each) for each in added)
        return seconds

    def prefill_s(self, tokens: int, context: int) -> float:
        """A prompt's chunk of `tokens` after `context` positions; a chunk of one token is a decode of batch 1."""
        return _bilinear(self._prefill_rows, tokens, context)

    def decode_s(self, batch: int, context: int) -> float:
        """One token for each of `batch` sequences with `context` positions before it on average."""
        return _bilinear(self._decode_rows, batch, context)

    def scheduler_s(self, batch: int) -> float:
        return _interpolate([(cost.batch, cost.seconds) for cost in self.scheduler], batch)

    def transfer_s(self, lane: str, num_bytes: int) -> float:
        """Raises ConfigurationError for a lane that was not measured."""
        points: Points = sorted((cost.bytes, cost.seconds) for cost in self.transfer if cost.lane == lane)
        if not points:
            raise ConfigurationError(f"the cost table has no lane '{lane}'; run `baton profile` with --lanes {lane}")
        return _interpolate(points, num_bytes)

    @cached_property
    def _decode_rows(self) -> Rows:
        return _rows((cost.batch, cost.context, cost.seconds) for cost in self.decode)

    @cached_property
    def _prefill_rows(self) -> Rows:
        rows = _rows((cost.tokens, cost.context, cost.seconds) for cost in self.prefill)
        return {1: self._decode_rows[1], **rows} if 1 in self._decode_rows else rows

    # -- Files ---------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Raises ConfigurationError when it cannot be written. One line a measurement."""
        lists = {each.name for each in dataclasses.fields(self) if isinstance(getattr(self, each.name), list)}
        parts = [f'"format": {FORMAT}']
        for name, value in dataclasses.asdict(self).items():
            rows = ",\n  ".join(json.dumps(row) for row in value) if name in lists else ""
            parts.append(f'"{name}": ' + (f"[\n  {rows}\n ]" if name in lists else json.dumps(value)))
        replace_file(path, "{\n " + ",\n ".join(parts) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> "CostTable":
        """Raises ConfigurationError that names the file and what is wrong with it."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigurationError(f"{path} is not JSON; write a new one with `baton profile`") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ConfigurationError(f"{path} is no cost table of format {FORMAT}; write one with `baton profile`")
        try:
            return cls(**{each.name: _read(each.name, values) for each in dataclasses.fields(cls) if each.init})
        except _Bad as error:
            raise ConfigurationError(f"{path}: {error}; write a new one with `baton profile`") from error


class _Bad(Exception):
    """What is wrong with a field."""


_ROWS: dict[str, type] = {
    "prefill": PrefillCost, "decode": DecodeCost, "mixed": MixedCost, "scheduler": SchedulerCost,
    "transfer": TransferCost,
}  # fmt: skip
_OBJECTS: dict[str, type] = {"model": ModelFacts, "noise": Errors}
_NUMBERS = ("threads", "page_size", "read_bytes_per_s", "flops")
_NEEDED = ("prefill", "decode")


def _read(name: str, values: dict[str, Any]) -> Any:
    """One field of a table out of parsed JSON."""
    if name not in values:
        raise _Bad(f"'{name}' is missing")
    value = values[name]
    if name in _ROWS:
        if not isinstance(value, list) or (name in _NEEDED and not value):
            raise _Bad(f"'{name}' is no list of measurements")
        return [_object(f"{name}[{index}]", _ROWS[name], row) for index, row in enumerate(value)]
    if name in _OBJECTS:
        return _object(name, _OBJECTS[name], value)
    if name in _NUMBERS:
        _number(name, value, (int, float))
    elif not isinstance(value, str):
        raise _Bad(f"'{name}' is {value!r}")
    return value


def _object(where: str, cls: type, value: Any) -> Any:
    """A row or an object with exactly its fields; measured seconds are greater than 0."""
    fields = {each.name: each.type for each in dataclasses.fields(cls)}
    if not isinstance(value, dict) or set(value) != set(fields):
        raise _Bad(f"{where} must have exactly {', '.join(fields)}")
    for name, kind in fields.items():
        if kind is str:
            if not isinstance(value[name], str):
                raise _Bad(f"{where}.{name} is {value[name]!r}")
        else:
            _number(f"{where}.{name}", value[name], (int, float) if kind is float else (int,))
            if name == "seconds" and not value[name]:
                raise _Bad(f"{where}.{name} is 0")
    return cls(**value)


def _number(where: str, value: Any, kinds: tuple[type[int] | type[float], ...]) -> None:
    number: float = value
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= number < math.inf:
        raise _Bad(f"{where} is {value!r}")


# -- Interpolation -----------------------------------------------------------------------------------------------


def _rows(costs: Iterable[tuple[int, int, float]]) -> Rows:
    rows: Rows = {}
    for size, context, seconds in sorted(costs):
        rows.setdefault(size, []).append((context, seconds))
    return rows


def _bilinear(rows: Rows, size: float, context: float) -> float:
    """First in context within the rows on both sides of `size`, then between those.

    A row that was measured up to less context than asked for, as larger batches are where the pool ends, goes on with
    its last slope.
    """
    sizes = sorted(rows)
    place = min(max(bisect_left(sizes, size), 1), len(sizes) - 1) if len(sizes) > 1 else 0
    around = sizes[place - 1 : place + 1] if place else sizes
    return _interpolate([(known, _interpolate(rows[known], context)) for known in around], size)


def _interpolate(points: Points, x: float) -> float:
    """Linear between points sorted by x; the first value before them, the last slope, if it rises, after them."""
    if not points:
        return 0.0
    if x <= points[0][0] or len(points) == 1:
        return points[0][1]
    for (left, low), (right, high) in itertools.pairwise(points):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    (left, low), (right, high) = points[-2:]
    return high + max(0.0, high - low) / (right - left) * (x - right)
