"""The native kernels as Ops: bfloat16, AVX512-BF16. See native.cpp for layouts and what bounds each kernel."""

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from baton.compiled import Unavailable
from kernels.cpu.build import library
from kernels.ops import HeadNorms, Matrix, Ops, Rotation
from kernels.paged_attention import SequenceSpan, WritePlan

COLUMNS = 32
"""Output columns of a packed block; out_features must be a multiple."""
MAX_GROUP, MAX_HEAD_DIM = 16, 256

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, list[type]] = {
    "pack": [_P, _I, _I, _P],
    "linear": [_P, _I, _I, _P, _I, _P, _P, _P],
    "rms_norm": [_P, _P, _I, _I, _F, _P],
    "argmax": [_P, _I, _I, _P],
    "sample": [_P, _I, _I, _I, _P, _P],
    "silu_and_mul": [_P, _I, _I, _P],
    "rotate_and_store": [_P, _I, _I, _I, _I, _P, _P, _P, _P, _F, _P, _P, _I, _I],
    "attention": [_P, _I, _P, _I, _P, _I, _I, _I, _I, _I, _P, _I, _I, _P],
}


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled library. Raises Unavailable."""
    try:
        # All symbols now: without torch's OpenMP runtime this must fail here, not in the first step.
        native = ctypes.CDLL(str(library()), mode=os.RTLD_NOW)
    except OSError as error:
        raise Unavailable(f"the native kernels do not load: {error}") from error
    for name, arguments in _SIGNATURES.items():
        function = getattr(native, name)
        function.argtypes, function.restype = arguments, None
    return native


@dataclass(frozen=True, slots=True)
class NativePlan:
    """All sequences of a step."""

    window: int | None
    spans: Tensor
    """int64 [sequences, 4]: first row, number of queries, position of the first, where its block table begins."""
    block_ids: Tensor
    """int32: the block tables, one after another."""


class NativeOps(Ops[NativePlan]):
    """Every tensor is bfloat16 and contiguous. `unsupported` says for which models."""

    name = "native avx512-bf16"

    def __init__(self) -> None:
        """Raises Unavailable."""
        self._native = load()

    @staticmethod
    def unsupported(
        out_features: Sequence[int], in_features: Sequence[int], head_dim: int, group: int, page_size: int
    ) -> str | None:
        """Why a model of these sizes cannot be served; `group` is query heads per kv head. None: it can."""
        if page_size % 16:
            return f"--page-size {page_size} is no multiple of 16"
        if any(size % COLUMNS for size in out_features) or any(size % 16 for size in in_features):
            return f"a linear layer's output is no multiple of {COLUMNS}, or its input of 16"
        if head_dim % 32 or head_dim > MAX_HEAD_DIM or group > MAX_GROUP:
            return f"head_dim {head_dim} with {group} query heads per kv head"
        return None

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        rows, columns = weight.shape
        packed = torch.empty_like(weight)
        self._native.pack(weight.data_ptr(), rows, columns, packed.data_ptr())
        return Matrix(packed, bias, rows, columns)

    def linear(self, x: Tensor, matrix: Matrix, residual: Tensor | None = None) -> Tensor:
        out = x.new_empty(x.shape[0], matrix.out_features)
        self._native.linear(
            x.data_ptr(), x.shape[0], matrix.in_features, matrix.data.data_ptr(), matrix.out_features,
            None if matrix.bias is None else matrix.bias.data_ptr(),
            None if residual is None else residual.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        self._native.rms_norm(x.data_ptr(), weight.data_ptr(), x.shape[0], x.shape[1], eps, out.data_ptr())
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        """Takes float32 logits too, as `sample`."""
        if logits.dtype == torch.float32:
            return logits.argmax(-1)
        out = torch.empty(len(logits), dtype=torch.int64)
        self._native.argmax(logits.data_ptr(), *logits.shape, out.data_ptr())
        return out

    def sample(self, logits: Tensor, choices: Tensor) -> Tensor:
        """Takes float32 logits too: those that penalties have changed."""
        out = torch.empty(len(logits), dtype=torch.int64)
        is_float = logits.dtype == torch.float32
        self._native.sample(logits.data_ptr(), is_float, *logits.shape, choices.data_ptr(), out.data_ptr())
        return out

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        self._native.silu_and_mul(gate_up.data_ptr(), gate_up.shape[0], out.shape[1], out.data_ptr())
        return out

    def rotate_and_store(
        self, qkv: Tensor, slabs: Tensor, layer: int, rotation: Rotation, norms: HeadNorms | None, eps: float,
        plan: WritePlan,
    ) -> Tensor:  # fmt: skip
        _, _, kv_heads, _, page_size, head_dim = slabs.shape
        heads = qkv.shape[1] // head_dim - 2 * kv_heads
        self._native.rotate_and_store(
            qkv.data_ptr(), qkv.shape[0], heads, kv_heads, head_dim,
            rotation.cos.data_ptr(), rotation.sin.data_ptr(),
            None if norms is None else norms.query.data_ptr(), None if norms is None else norms.key.data_ptr(), eps,
            slabs.data_ptr(), plan.key_rows.data_ptr(), layer * kv_heads * 2 * page_size, page_size,
        )  # fmt: skip
        return qkv.view(len(qkv), -1, head_dim)[:, :heads]

    def plan_attention(self, slabs: Tensor, spans: Sequence[SequenceSpan], window: int | None) -> NativePlan:
        block_ids: list[int] = []
        rows: list[tuple[int, int, int, int]] = []
        for span in spans:
            rows.append((span.first_row, span.count, span.start, len(block_ids)))
            block_ids += span.block_ids
        return NativePlan(
            window, torch.tensor(rows, dtype=torch.int64), torch.from_numpy(np.array(block_ids, dtype=np.int32))
        )

    def attention(self, query: Tensor, slabs: Tensor, layer: int, plan: NativePlan) -> Tensor:
        tokens, heads, head_dim = query.shape
        _, num_layers, kv_heads, _, page_size, _ = slabs.shape
        out = query.new_empty(tokens, heads, head_dim)
        self._native.attention(
            query.data_ptr(), query.stride(0), plan.spans.data_ptr(), len(plan.spans), plan.block_ids.data_ptr(),
            plan.window or 0, heads, kv_heads, head_dim, page_size, slabs.data_ptr(), layer, num_layers, out.data_ptr(),
        )  # fmt: skip
        return out.flatten(1)
