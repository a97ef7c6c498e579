"""KV numbers of one dtype made into those of another; for the dtypes see `kvtransfer.layout`.

Between floats a number too large for the new dtype is refused, because it would become infinite. Quantising refuses
nothing: float8 saturates, as the kernels do, and int8 finds a scale that fits. NaN stays NaN; a token of an int8 head
with NaN or infinity in it is NaN as a whole. Every rounding is to nearest, ties to even.

numpy has no bfloat16 and no float8; their bits are looked up in tables, or are the upper half of a float32.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from baton.errors import TransferError
from kvtransfer.layout import DTYPE_BYTES, FLOAT8, INT8, BlockLayout

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[Any]
Parts = tuple[Numbers, ...]
"""All that is stored for some tokens, [..., layers, heads, 2, tokens, .]: their numbers, and of int8 the scales."""
Cast = Callable[[Parts, Parts], None]
"""(source, target): writes the numbers of one box, [layers, heads, 2, tokens, head_dim], into another of that shape."""

_CHUNK_NUMBERS = 1 << 16
"""Cast at once, so that what lies between two steps of a cast stays in the core's cache."""
LARGEST_FLOAT8 = 448.0
LARGEST_INT8 = 127
_SMALLEST_SCALE = 2.0**-100
"""Of int8. A token with smaller numbers than this has scale 0, and so are they: scales stay exact floats."""

_STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    FLOAT8: np.dtype(np.uint8),
    INT8: np.dtype(np.int8),
}


def parts_of(blocks: Bytes, layout: BlockLayout) -> Parts:
    """Views [n, num_layers, num_kv_heads, 2, page_size_tokens, .] of uint8 [n, block_bytes]; no copy."""
    if layout.dtype != INT8:
        return (blocks.view(_STORED[layout.dtype]).reshape(len(blocks), *layout.shape),)
    heads = blocks.reshape(len(blocks), layout.num_layers, layout.num_kv_heads, layout.head_bytes)
    split = 2 * layout.page_size_tokens * layout.head_dim * DTYPE_BYTES[INT8]
    numbers, scales = heads[..., :split].view(np.int8), heads[..., split:].view(np.float32)
    return numbers.reshape(len(blocks), *layout.shape), scales.reshape(len(blocks), *layout.shape[:-1], 1)


def cast_between(there: BlockLayout, here: BlockLayout, heads: range) -> Cast:
    """For boxes with all layers and these heads of the model."""
    if there.dtype == here.dtype:
        return _copy
    direct = _DIRECT.get((there.dtype, here.dtype))
    if direct is not None:
        return _chunked(direct)
    read, write = _READ[there.dtype], _WRITE[here.dtype]
    scales_there, scales_here = (layout.scales(heads)[..., None, None] for layout in (there, here))

    def cast(source: Parts, target: Parts) -> None:
        for layers in _chunks(source[0]):
            wide = read(_layers(source, layers), scales_there[layers])
            write(wide, _layers(target, layers), scales_here[layers])

    return cast


def _copy(source: Parts, target: Parts) -> None:
    for theirs, ours in zip(source, target, strict=True):
        bits = np.dtype(f"u{theirs.itemsize}")  # of a float, a copy by value could change a signalling NaN
        ours.view(bits)[...] = theirs.view(bits)


def _chunks(numbers: Numbers) -> Iterator[slice]:
    """As many layers at once as fit into the cache."""
    step = max(1, _CHUNK_NUMBERS // numbers[0].size)
    return (slice(first, first + step) for first in range(0, len(numbers), step))


def _layers(parts: Parts, layers: slice) -> Parts:
    return tuple(part[layers] for part in parts)


# -- between floats ----------------------------------------------------------------------------------------------------

FloatCast = Callable[[Numbers, Numbers], None]


def _chunked(cast: FloatCast) -> Cast:
    def cast_chunks(source: Parts, target: Parts) -> None:
        for layers in _chunks(source[0]):
            cast(source[0][layers], target[0][layers])

    return cast_chunks


def _widen_bfloat16(source: Numbers, target: Numbers) -> None:
    np.left_shift(source, 16, out=target.view(np.uint32), dtype=np.uint32)


def _narrow_to_float16(source: Numbers, target: Numbers) -> None:
    try:
        with np.errstate(over="raise", invalid="ignore"):
            target[...] = source
    except FloatingPointError as error:
        raise TransferError(_TOO_LARGE) from error


def _narrow_to_bfloat16(source: Numbers, target: Numbers) -> None:
    """Round to nearest, ties to even, on the bits: add half of the last place, less one where that place is even."""
    bits = source.view(np.uint32)
    rounded = np.right_shift(bits, 16)
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    if (bits & 0x7FFF_FFFF).max() >= _ROUNDS_TO_INFINITY:
        rounded[np.isnan(source)] = 0x7FC0  # the sum may have carried out of a NaN
        if (np.isfinite(source) & (rounded & 0x7FFF == 0x7F80)).any():
            raise TransferError(_TOO_LARGE)
    target[...] = rounded


def _look_up(dtype_there: str, dtype_here: str) -> FloatCast:
    """Of 16 bits there are few enough to cast each pattern once and look the rest up: 3 times faster than numpy."""

    def cast(source: Numbers, target: Numbers) -> None:
        table = _table(dtype_there, dtype_here)
        patterns = source.view(np.uint16)
        sizes = patterns & 0x7FFF
        least, infinity = table.least_too_large, table.infinity
        if sizes.max() >= least and ((sizes >= least) & (sizes < infinity)).any():
            raise TransferError(_TOO_LARGE)
        target[...] = table.numbers.take(patterns, mode="wrap")

    return cast


class _Table(NamedTuple):
    """What each 16-bit pattern of one dtype is in another. The patterns of larger numbers are larger, but for sign."""

    numbers: Numbers
    least_too_large: int
    """Pattern of the least number that would become infinite."""
    infinity: int
    """Pattern of infinity; beyond it nothing is a number."""


@functools.cache
def _table(dtype_there: str, dtype_here: str) -> _Table:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    wide = np.empty(1 << 16, np.float32)
    if dtype_there == "bfloat16":
        _widen_bfloat16(patterns, wide)
    else:
        wide[:] = patterns.view(np.float16)
    infinity = int(np.isinf(wide).argmax())
    if dtype_here == "float16":
        with np.errstate(over="ignore", invalid="ignore"):
            half = wide.astype(np.float16)
        return _Table(half, int(np.isinf(half).argmax()), infinity)
    if dtype_here == "float32":
        return _Table(wide, infinity, infinity)
    narrow = np.empty(1 << 16, np.uint16)  # a bfloat16 has room for every float16
    _narrow_to_bfloat16(wide, narrow)
    return _Table(narrow, infinity, infinity)


_TOO_LARGE = "the peer's KV has numbers that are too large for the dtype here; they would become infinite"
_ROUNDS_TO_INFINITY = 0x7F7F_8000
"""Bits of the least float32 that is infinite as a bfloat16."""

_DIRECT: dict[tuple[str, str], FloatCast] = {
    ("bfloat16", "float32"): _widen_bfloat16,
    ("float16", "float32"): _look_up("float16", "float32"),
    ("float32", "float16"): _narrow_to_float16,
    ("bfloat16", "float16"): _look_up("bfloat16", "float16"),
    ("float32", "bfloat16"): _narrow_to_bfloat16,
    ("float16", "bfloat16"): _look_up("float16", "bfloat16"),
}

# -- quantised KV, by way of float32 -----------------------------------------------------------------------------------

Read = Callable[[Parts, Numbers], Numbers]
"""(box, fixed scales [layers, heads, 2, 1, 1]): its numbers as float32."""
Write = Callable[[Numbers, Parts, Numbers], None]
"""(float32 numbers, box, fixed scales)."""


def _read_float(dtype: str) -> Read:
    def read(source: Parts, scales: Numbers) -> Numbers:
        if dtype == "float32":
            return source[0]
        wide = np.empty(source[0].shape, np.float32)
        _DIRECT[dtype, "float32"](source[0], wide)
        return wide

    return read


def _write_float(dtype: str) -> Write:
    def write(wide: Numbers, target: Parts, scales: Numbers) -> None:
        if dtype == "float32":
            target[0][...] = wide
        else:
            _DIRECT["float32", dtype](wide, target[0])

    return write


def _read_float8(source: Parts, scales: Numbers) -> Numbers:
    return _multiplied(_float8_numbers().take(source[0], mode="wrap"), scales)


def _read_int8(source: Parts, scales: Numbers) -> Numbers:
    numbers, own_scales = source
    return _multiplied(numbers, own_scales)


def _multiplied(numbers: Numbers, scales: Numbers) -> Numbers:
    try:
        with np.errstate(over="raise", invalid="ignore", under="ignore"):
            wide: Numbers = np.multiply(numbers, scales, dtype=np.float32)
    except FloatingPointError as error:
        raise TransferError(_TOO_LARGE) from error
    return wide


def _write_float8(wide: Numbers, target: Parts, scales: Numbers) -> None:
    with np.errstate(all="ignore"):
        bits = np.divide(wide, scales, dtype=np.float32).view(np.uint32)
    # Cut to 16 bits with the last one set where anything was lost: what rounds from these, rounds as from all 32.
    patterns = np.right_shift(bits, 16)
    patterns |= (bits & 0xFFFF) != 0
    target[0][...] = _to_float8().take(patterns, mode="wrap")


def _write_int8(wide: Numbers, target: Parts, scales: Numbers) -> None:
    largest = np.abs(wide).max(axis=-1, keepdims=True)
    is_finite = np.isfinite(largest)
    if not is_finite.all():
        wide = np.where(is_finite, wide, np.float32(0))
    own_scales = largest / np.float32(LARGEST_INT8)
    own_scales[own_scales < _SMALLEST_SCALE] = 0
    quotients = wide / np.where(own_scales > 0, own_scales, np.float32(np.inf))
    target[0][...] = np.rint(quotients, out=quotients)
    target[1][...] = own_scales  # not finite where a number was not: times 0, that is NaN


@functools.cache
def _float8_numbers() -> Numbers:
    """float32 [256]: sign, 4 bits of exponent, 3 of mantissa; no infinity, and one pattern a sign that is NaN."""
    codes = np.arange(128)
    exponents, mantissas = codes >> 3, codes & 7
    numbers = np.where(exponents == 0, mantissas * 2.0**-9, (8 + mantissas) * 2.0 ** (exponents - 10.0))
    numbers[127] = np.nan
    return np.concatenate((numbers, -numbers)).astype(np.float32)


@functools.cache
def _to_float8() -> Numbers:
    """uint8 [65536]: what the upper half of each float32 rounds to; beyond the largest number, that."""
    wide = np.empty(1 << 16, np.float32)
    _widen_bfloat16(np.arange(1 << 16, dtype=np.uint16), wide)
    numbers = _float8_numbers()[:127]
    middles = (numbers[1:] + numbers[:-1]) / 2
    below, not_above = (np.searchsorted(middles, np.abs(wide), side) for side in ("left", "right"))
    codes = np.where(below % 2 == 0, below, not_above)  # the two differ on a tie, and one of them is even
    codes[np.isnan(wide)] = 127
    signs = np.where(np.signbit(wide), 128, 0)
    return np.bitwise_or(codes, signs).astype(np.uint8)


_READ: dict[str, Read] = {name: _read_float(name) for name in ("float32", "float16", "bfloat16")}
_READ |= {FLOAT8: _read_float8, INT8: _read_int8}
_WRITE: dict[str, Write] = {name: _write_float(name) for name in ("float32", "float16", "bfloat16")}
_WRITE |= {FLOAT8: _write_float8, INT8: _write_int8}
