"""The GPU kernels as Ops, and the one place where it is chosen which implementation does what.

Linear layers are cuBLAS through torch. The rest is Triton; on CPU tensors, with TRITON_INTERPRET=1 set before the
import, the same kernels run in Triton's interpreter.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from kernels.gpu import activation, norm, rotary, sampling
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.linear import linear
from kernels.gpu.prefill_attention import PrefillSpans, prefill_attention, prefill_spans
from kernels.ops import HeadNorms, Matrix, Ops, Rotation
from kernels.paged_attention import SequenceSpan


@dataclass(frozen=True, slots=True)
class Places:
    """Where each token's key and value go: int32 [tokens] each."""

    block_ids: Tensor
    """Negative: nowhere."""
    slots: Tensor


@dataclass(frozen=True, slots=True)
class Singles:
    """One query each of B sequences: the first B rows of the batch."""

    tables: Tensor
    """int32 [B, longest]: blocks of each sequence; what is right of them is not read."""
    lengths: Tensor
    """int32 [B]: positions, the query's own included; 0 for rows that pad a batch."""


@dataclass(frozen=True, slots=True)
class GpuPlan:
    window: int | None
    singles: Singles | None
    chunks: PrefillSpans | None


_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.float64): torch.float64}


def block_table(block_ids: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """[sequences, longest], zeros right of each sequence's own."""
    table = np.zeros((len(block_ids), max(map(len, block_ids), default=0)), np.int32)
    for row, blocks in enumerate(block_ids):
        table[row, : len(blocks)] = array("i", blocks)  # three times as fast as from a list
    return table


def to_device(device: torch.device, *numbers: NDArray[np.int32] | NDArray[np.float64]) -> list[Tensor]:
    """Copies there, of arrays of one dtype, in one transfer that waits for nothing. The arrays may change at once.

    Each begins at a multiple of 16 bytes, as Triton compiles a kernel again for pointers that do not.
    """
    dtype, step = numbers[0].dtype, 16 // numbers[0].itemsize
    begins = np.cumsum([0, *(-(-each.size // step) * step for each in numbers)])
    joined = torch.empty(int(begins[-1]), dtype=_DTYPES[dtype], pin_memory=device.type == "cuda")
    for begin, each in zip(begins, numbers, strict=False):
        joined.numpy()[begin : begin + each.size] = each.reshape(-1)
    # torch keeps pinned memory until the copies out of it are done, whoever let go of it.
    sent = joined.to(device, non_blocking=True)
    return [sent[begin : begin + each.size].view(each.shape) for begin, each in zip(begins, numbers, strict=False)]


class GpuOps(Ops[GpuPlan]):
    name = "triton"
    launches = True
    recordable = True

    def __init__(self, device: torch.device, num_heads: int, max_length: int) -> None:
        """`max_length`: longest context. Kernels share work by it, in one way however long the contexts of a step are,
        so that few are compiled."""
        self.device = device
        self._num_heads = num_heads
        self._max_length = max_length

    @staticmethod
    def unsupported(head_dim: int, page_size: int) -> str | None:
        """Why a model of these sizes cannot be served. None: it can."""
        if page_size % 16 or head_dim % 16 or not 32 < head_dim <= 256:
            return f"page size {page_size} and head_dim {head_dim}; both must be multiples of 16, head_dim 48 to 256"
        return None

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        return Matrix(weight.to(self.device), None if bias is None else bias.to(self.device), *weight.shape)

    def linear(self, x: Tensor, matrix: Matrix, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return functional.linear(x, matrix.data, matrix.bias)
        y = torch.addmm(residual, x, matrix.data.t())
        return y if matrix.bias is None else y.add_(matrix.bias)

    def plan_attention(self, slabs: Tensor, spans: Sequence[SequenceSpan], window: int | None) -> GpuPlan:
        """Leading spans of one query are singles, whatever follows is chunks."""
        count = next((index for index, span in enumerate(spans) if span.count > 1), len(spans))
        chunks = prefill_spans(spans[count:], slabs, self._num_heads) if count < len(spans) else None
        if not count:
            return GpuPlan(window, None, chunks)
        lengths = np.array([span.start + 1 for span in spans[:count]], np.int32)
        tables = block_table([span.block_ids for span in spans[:count]])
        sent_lengths, sent_tables = to_device(self.device, lengths, tables)
        return GpuPlan(window, Singles(sent_tables, sent_lengths), chunks)

    def attention(self, query: Tensor, slabs: Tensor, layer: int, plan: GpuPlan) -> Tensor:
        out = query.new_empty(query.shape)
        if (singles := plan.singles) is not None:
            count = len(singles.lengths)
            decode_attention(
                query[:count], slabs, layer, singles.tables, singles.lengths, window=plan.window,
                max_length=self._max_length, out=out[:count],
            )  # fmt: skip
        if plan.chunks is not None:
            prefill_attention(query, slabs, layer, plan.chunks, window=plan.window, out=out)
        return out.flatten(1)

    def argmax(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def sample(self, logits: Tensor, choices: Tensor) -> Tensor:
        temperatures, top_ks, top_ps, min_ps, numbers = choices.unbind()
        return sampling.sample(logits, temperatures, top_ks.int(), top_ps, min_ps, numbers)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.rms_norm(x, weight, eps)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return activation.silu_and_mul(gate_up)

    def rotate_and_store(
        self, qkv: Tensor, slabs: Tensor, layer: int, rotation: Rotation, norms: HeadNorms | None, eps: float,
        plan: Places,
    ) -> Tensor:  # fmt: skip
        return rotary.rotate_and_store(
            qkv, slabs, layer, rotation.cos, rotation.sin, norms, eps, plan.block_ids, plan.slots
        )  # fmt: skip


class DeterministicGpuOps(GpuOps):
    """Kernels whose bits depend on a request alone, as those of `kernels.deterministic` do: products in fixed tiles,
    and the attention of prompts for single queries as well. How its work is cut depends on the batch, so that steps
    cannot be recorded."""

    recordable = False

    def __init__(self, device: torch.device, num_heads: int, max_length: int) -> None:
        super().__init__(device, num_heads, max_length)
        processor = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
        self.name = f"deterministic triton {triton.__version__}, {processor}"

    def linear(self, x: Tensor, matrix: Matrix, residual: Tensor | None = None) -> Tensor:
        return linear(x, matrix.data, matrix.bias, residual)

    def plan_attention(self, slabs: Tensor, spans: Sequence[SequenceSpan], window: int | None) -> GpuPlan:
        return GpuPlan(window, None, prefill_spans(spans, slabs, self._num_heads))
