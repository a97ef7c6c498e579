"""Kernels whose bits depend on a request alone: not on its batch, its chunks, its worker or its attempt.

A sum of floats depends on its order, and libraries choose the order by the size of the batch. Batch-invariant kernels
(He et al., "Defeating nondeterminism in LLM inference", Thinking Machines, 2025) keep one order for every element:

    linear      rows are multiplied in pieces of a few widths, all of which were seen to give the same bits
    attention   keys in tiles of 64 that begin at absolute positions; each is multiplied by itself, the highest score
                of all is the same in any order, and the tiles' sums are added one after the other
    the rest    row by row, with functions that were seen to give an element the same bits in any company

"Seen" is: at start, here, with the threads there are. The order that a library takes depends on shapes, alignment and
threads, never on the numbers, so that one product of random numbers shows it. One that keeps no order is refused.
The native kernels were written to keep one order.
"""

import contextlib
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from baton.errors import ConfigurationError
from kernels.cpu.build import library
from kernels.cpu.native import NativeOps
from kernels.ops import HeadNorms, Matrix, Ops, Rotation, TorchOps
from kernels.paged_attention import SequenceSpan, WritePlan

WIDTHS = (4, 8, 16, 32, 64, 128, 256, 512)
"""Rows of one product, where they agree."""
MIN_NUMBERS = 2**20
"""That a width must give the same: of two orders of one sum, rounded to bfloat16, one in some ten thousand tells."""
MAX_ATTENTION_WIDTH = 256
FILLED_WIDTH = 32
"""From here on a product is bound by arithmetic, and pieces are filled rather than padded."""
TILE_KEYS = 64
MAX_GROUP_NUMBERS = 2**21
"""Numbers in the factors and products of runs that are computed together: they should stay in the cache."""
_COUNTS = (1, 2, 3, 5, 7, 16, 33, 100, 600)
"""Rows at which functions are tried: less and more than a vector, alone and shared between threads."""


class DeterministicNativeOps(NativeOps):
    """The native kernels; the name also says how they were compiled, as compilers fuse operations differently."""

    def __init__(self) -> None:
        """Raises Unavailable, and ConfigurationError when torch's functions for rotary angles keep no order."""
        super().__init__()
        check_functions()
        self.name = f"deterministic {NativeOps.name}, {library().stem}"


@dataclass(frozen=True, slots=True)
class Run:
    """Successive queries of one sequence, and the tiles of keys that they see."""

    first_row: int
    count: int
    start: int
    tiles: range
    block_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class RunGroup:
    """B runs of P queries each, which see T tiles of keys; those that see fewer have hidden ones at the end."""

    rows: Tensor
    """int64 [B * P]: rows of the batch."""
    width: int
    """Rows of one product: P times the query heads of a kv head, and padding."""
    key_rows: Tensor
    """int64 [B * kv_heads * T * TILE_KEYS / page_size]: rows of layer 0, as in `kernels.paged_attention`."""
    num_tiles: int
    """T."""
    hidden: list[tuple[slice, Tensor]]
    """Tiles with keys that a query must not see: bool [B, 1, tiles, P, 1, TILE_KEYS]."""
    unused_values: Tensor
    """int64: rows of the gathered values that no query sees. They are zeroed, as they may hold NaN."""


class DeterministicOps(Ops[list[RunGroup]]):
    """torch, for any dtype, and any processor whose libraries let an order be kept."""

    name = "deterministic torch"

    def __init__(self, num_heads: int) -> None:
        """Raises ConfigurationError when torch's functions keep no order here."""
        check_functions()
        self._num_heads = num_heads
        self._torch = TorchOps()
        self._linear_widths: dict[tuple[int, int], tuple[int, ...]] = {}
        self._attention_widths: dict[int, tuple[int, ...]] = {}

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        """Raises ConfigurationError when no way to multiply by such a matrix keeps an order."""
        rows, columns = weight.shape
        if (rows, columns) not in self._linear_widths:
            self._linear_widths[rows, columns] = agreeing_widths(
                f"products with {rows} x {columns} matrices of {weight.dtype}",
                _random(WIDTHS[-1], columns).to(weight.dtype),
                [lambda x: x @ weight.T],
            )
        return Matrix(weight, bias, rows, columns)

    def linear(self, x: Tensor, matrix: Matrix, residual: Tensor | None = None) -> Tensor:
        widths = list(pieces(len(x), self._linear_widths[matrix.out_features, matrix.in_features]))
        whole = pad(x, (0, 0, 0, missing)) if (missing := sum(widths) - len(x)) else x
        padded = x.new_empty(len(whole), matrix.out_features)
        for rows, out in zip(torch.split(whole, widths), torch.split(padded, widths), strict=True):
            torch.mm(rows, matrix.data.T, out=out)
        y = padded[: len(x)]
        if matrix.bias is not None:
            y += matrix.bias
        return y if residual is None else y.add_(residual)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._torch.rms_norm(x, weight, eps)

    def argmax(self, logits: Tensor) -> Tensor:
        return self._torch.argmax(logits)

    def sample(self, logits: Tensor, choices: Tensor) -> Tensor:
        return self._torch.sample(logits, choices)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        # torch's silu takes another exponential for what does not fill a vector, in a row or in a thread's share.
        gate, up = gate_up.chunk(2, dim=-1)
        wide = gate.float()
        return (wide / (-wide).exp_().add_(1)).to(gate_up.dtype).mul_(up)

    def rotate_and_store(
        self, qkv: Tensor, slabs: Tensor, layer: int, rotation: Rotation, norms: HeadNorms | None, eps: float,
        plan: WritePlan,
    ) -> Tensor:  # fmt: skip
        return self._torch.rotate_and_store(qkv, slabs, layer, rotation, norms, eps, plan)

    def plan_attention(self, slabs: Tensor, spans: Sequence[SequenceSpan], window: int | None) -> list[RunGroup]:
        """Raises ConfigurationError when no way to multiply heads of this size keeps an order."""
        _, _, kv_heads, _, page_size, head_dim = slabs.shape
        shared = self._num_heads // kv_heads
        widths = self._widths_for(head_dim, shared)
        numbers_of_row = kv_heads * (TILE_KEYS + head_dim) * 2
        runs = [run for span in spans for run in _runs(span, window, page_size, shared, widths[-1], numbers_of_row)]
        groups: list[list[Run]] = []
        for run in sorted(runs, key=lambda each: (each.count, len(each.tiles))):
            numbers_of_tile = numbers_of_row * _width(run.count * shared, widths) + kv_heads * head_dim * TILE_KEYS * 2
            if not groups or not _fits(groups[-1], run, numbers_of_tile):
                groups.append([])
            groups[-1].append(run)
        return [_plan_group(slabs, group, window, _width(group[0].count * shared, widths)) for group in groups]

    def attention(self, query: Tensor, slabs: Tensor, layer: int, plan: list[RunGroup]) -> Tensor:
        output = torch.empty_like(query)
        for group in plan:
            output.index_copy_(0, group.rows, _attend(query.index_select(0, group.rows), slabs, layer, group))
        return output.flatten(1)

    def _widths_for(self, head_dim: int, shared: int) -> tuple[int, ...]:
        """Those in which both products of attention agree, for kv heads that `shared` query heads read."""
        if head_dim not in self._attention_widths:
            self._attention_widths[head_dim] = agreeing_widths(
                f"products of heads of {head_dim}",
                _random(MAX_ATTENTION_WIDTH, head_dim),
                [_attention_products(head_dim, batch) for batch in (1, 2, 33)],
            )
        widths = self._attention_widths[head_dim]
        if widths[-1] < shared:
            raise ConfigurationError(f"--deterministic serves no model of {shared} query heads per kv head here")
        return widths


# -- What libraries do -------------------------------------------------------------------------------------------------


def agreeing_widths(what: str, rows: Tensor, products: Sequence[Callable[[Tensor], Tensor]]) -> tuple[int, ...]:
    """The WIDTHS in which all `products` of any of the `rows` have the bits that one thread gives all of them at once.

    A product maps [width, n] to [..., width, m]. Widths beyond the number of rows are not tried. Raises
    ConfigurationError when there are none.
    """
    with _one_thread():
        expected = products[0](rows)
    order = torch.arange(len(rows)).roll(5)  # rows must agree wherever they stand
    num_rows = -(-MIN_NUMBERS // (expected.numel() // len(rows)))
    widths = tuple(
        width
        for width in WIDTHS
        if width <= len(rows)
        and all(
            _equals(product(rows[some]), expected[..., some, :])
            for some in torch.split(order, width)[: max(1, min(len(rows), num_rows) // width)]
            for product in products
        )
    )
    if not widths:
        raise ConfigurationError(f"--deterministic cannot be kept: {what} depend on the size of the batch here")
    return widths


def check_functions() -> None:
    """Raises ConfigurationError when an element or a row has other bits in other company or with other threads."""
    functions: list[Callable[[Tensor], Tensor]] = [
        torch.exp, torch.cos, torch.sin, torch.rsqrt, torch.reciprocal, lambda x: x.sum(-1), lambda x: x.mean(-1),
    ]  # fmt: skip
    for columns in (3, 20, TILE_KEYS, 100):
        numbers = _random(_COUNTS[-1], columns).add_(0.5).mul_(50)
        for function in functions:
            with _one_thread():
                expected = function(numbers)
            for count in _COUNTS:
                if not torch.equal(function(numbers[-count:].clone()), expected[-count:]):
                    raise ConfigurationError("--deterministic cannot be kept: functions of torch depend on the batch")


def bits_depend_on(ops: Ops[Any]) -> list[str]:
    """Everything but model and prompt that the bits of deterministic kernels may depend on: equal here, equal there."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    processor = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    return [ops.name, torch.__version__, torch.__config__.show(), *platform.libc_ver(), platform.machine(), *processor]


def pieces(count: int, widths: Sequence[int]) -> Iterator[int]:
    """Some of the ascending `widths`, of which all but the last can be filled with `count` rows.

    Small pieces would read a matrix again and again, so that padding is cheaper there.
    """
    for width in reversed(widths):
        while count >= width >= FILLED_WIDTH:
            yield width
            count -= width
    while count > 0:
        width = next((width for width in widths if width >= count), widths[-1])
        yield width
        count -= width


def _width(count: int, widths: Sequence[int]) -> int:
    return next(width for width in widths if width >= count)


def _attention_products(head_dim: int, batch: int) -> Callable[[Tensor], Tensor]:
    keys, values = (_random(TILE_KEYS, head_dim, seed).repeat(batch, 1, 1) for seed in (1, 2))
    return lambda x: torch.bmm(torch.bmm(x.repeat(batch, 1, 1), keys.transpose(1, 2)), values)


def _equals(result: Tensor, expected: Tensor) -> bool:
    return torch.equal(result, expected.expand_as(result))


def _random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).sub_(0.5)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# -- Attention ---------------------------------------------------------------------------------------------------------


def _runs(
    span: SequenceSpan, window: int | None, page_size: int, shared: int, max_width: int, numbers_of_row: int
) -> Iterator[Run]:
    """Cut a span into runs short enough for one product, and for the cache where contexts are long."""
    end, step = span.start + span.count, max(page_size, TILE_KEYS)
    num_tiles = -(-end // TILE_KEYS)
    longest = max(1, min(max_width, MAX_GROUP_NUMBERS // (num_tiles * numbers_of_row)) // shared)
    for first in range(span.start, end, longest):
        last = min(first + longest, end)
        oldest = 0 if window is None else max(0, first - window + 1)
        tiles = range(oldest // step * step // TILE_KEYS, -(-last // step) * step // TILE_KEYS)
        yield Run(span.first_row + first - span.start, last - first, first, tiles, span.block_ids)


def _fits(group: list[Run], run: Run, numbers_of_tile: int) -> bool:
    """Whether run, which sees at least as many tiles as the group does, may join: padding and memory are bounded."""
    return (
        run.count == group[0].count
        and len(run.tiles) <= len(group[0].tiles) * 1.5 + 1
        and len(run.tiles) * (len(group) + 1) * numbers_of_tile <= MAX_GROUP_NUMBERS
    )


def _plan_group(slabs: Tensor, runs: list[Run], window: int | None, width: int) -> RunGroup:
    _, num_layers, kv_heads, _, page_size, _ = slabs.shape
    num_tiles, count = max(len(run.tiles) for run in runs), runs[0].count
    blocks = torch.empty(len(runs), num_tiles * TILE_KEYS // page_size, dtype=torch.int64)
    for row, run in enumerate(runs):
        seen = run.block_ids[run.tiles.start * TILE_KEYS // page_size : run.tiles.stop * TILE_KEYS // page_size]
        blocks[row] = run.block_ids[0]  # padding: a block this sequence may read
        blocks[row, : len(seen)] = torch.tensor(seen)
    key_rows = (blocks[:, None] * (num_layers * kv_heads * 2) + torch.arange(kv_heads)[:, None] * 2).flatten()
    starts = torch.tensor([[run.start, run.tiles.start * TILE_KEYS] for run in runs])
    queries = starts[:, :1, None] + torch.arange(count)[:, None]
    keys = (starts[:, 1:] + torch.arange(num_tiles * TILE_KEYS))[:, None]
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    unused = hidden.all(1, keepdim=True).expand(-1, kv_heads, -1).flatten().nonzero().squeeze(1)
    tiled = hidden.view(len(runs), count, num_tiles, TILE_KEYS).transpose(1, 2)[:, None, :, :, None]
    # Most tiles of a long context are seen whole: only the edges of what is seen need a mask.
    whole = (~tiled.any(-1).any(3).any(0).flatten()).nonzero().flatten().tolist() or [0, -1]
    edges = [slice(0, whole[0]), slice(whole[-1] + 1, num_tiles)]
    masks = [(edge, tiled[:, :, edge].contiguous()) for edge in edges if edge.start < edge.stop]
    rows = torch.tensor([run.first_row for run in runs])[:, None] + torch.arange(count)
    return RunGroup(rows.flatten(), width, key_rows, num_tiles, masks, unused)


def _attend(query: Tensor, slabs: Tensor, layer: int, group: RunGroup) -> Tensor:
    """[B * P, heads, head_dim] -> same shape; the arithmetic is in float32."""
    _, _, kv_heads, _, page_size, head_dim = slabs.shape
    shared, num_tiles = query.shape[1] // kv_heads, group.num_tiles
    num_runs = len(group.key_rows) * page_size // (kv_heads * num_tiles * TILE_KEYS)
    count = len(query) // num_runs
    stacked = query.float().view(num_runs, count, kv_heads, shared, head_dim).transpose(1, 2)
    stacked = stacked.reshape(num_runs * kv_heads, count * shared, head_dim) * head_dim**-0.5
    stacked = pad(stacked, (0, 0, 0, group.width - count * shared))
    matrix, key_rows = slabs.view(-1, page_size * head_dim), group.key_rows + layer * kv_heads * 2
    keys = matrix.index_select(0, key_rows).float().view(-1, TILE_KEYS, head_dim)
    values = matrix.index_select(0, key_rows + 1).float().view(-1, head_dim)
    values.index_fill_(0, group.unused_values, 0)
    repeated = stacked[:, None].expand(-1, num_tiles, -1, -1).reshape(-1, group.width, head_dim)
    scores = torch.bmm(repeated, keys.transpose(1, 2))
    scores = scores.view(num_runs * kv_heads, num_tiles, group.width, TILE_KEYS)
    of_heads = scores[:, :, : count * shared].view(num_runs, kv_heads, num_tiles, count, shared, TILE_KEYS)
    for tiles, hidden in group.hidden:
        of_heads[:, :, tiles].masked_fill_(hidden, -torch.inf)
    weights = scores.sub_(scores.amax((1, 3), keepdim=True)).exp_()
    parts = torch.bmm(weights.view(-1, group.width, TILE_KEYS), values.view_as(keys)).view(*weights.shape[:3], head_dim)
    totals = weights.sum(-1, keepdim=True)
    attended, total = parts[:, 0] + 0.0, totals[:, 0] + 0.0
    for tile in range(1, num_tiles):  # tiles that are hidden, before or behind, add nothing, not a sign to a zero
        attended += parts[:, tile]
        total += totals[:, tile]
    result = (attended / total)[:, : count * shared]
    result = result.reshape(num_runs, kv_heads, count, shared, head_dim)
    return result.transpose(1, 2).reshape(query.shape).to(query.dtype)
