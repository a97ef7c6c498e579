"""What a decoder layer computes, behind one interface: the model reads the same whichever kernels do the work.

`TorchOps` is always there. `kernels.cpu.native.NativeOps` replaces it for bfloat16 on processors that have the
instructions. Heads and slabs are laid out as in `kernels.paged_attention`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from kernels import elementwise, paged_attention, sampling
from kernels.paged_attention import AttentionPlan, SequenceSpan, WritePlan

Plan = TypeVar("Plan")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer's weight, in whatever order its kernels want it, and its bias [out_features]."""

    data: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class Rotation:
    """float32 [tokens, 1, head_dim / 2] each."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norm of each query and key head, weights [head_dim] (Qwen3)."""

    query: Tensor
    key: Tensor


class Ops(ABC, Generic[Plan]):
    name: str
    launches = False
    """Its kernels are launched and run beside the host, on a device with memory of its own."""
    recordable = False
    """The kernels of a step of single tokens are the same for every batch of a size."""

    @abstractmethod
    def matrix(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        """Prepare [out_features, in_features]; the caller gives the weight up."""

    @abstractmethod
    def linear(self, x: Tensor, matrix: Matrix, residual: Tensor | None = None) -> Tensor:
        """[tokens, in_features] -> [tokens, out_features], plus the residual of that shape."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Of each row of [tokens, n]."""

    @abstractmethod
    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """[tokens, 2 * n], gate before up -> [tokens, n]."""

    @abstractmethod
    def rotate_and_store(
        self, qkv: Tensor, slabs: Tensor, layer: int, rotation: Rotation, norms: HeadNorms | None, eps: float,
        plan: Any,
    ) -> Tensor:  # fmt: skip
        """Norm and rotate the heads of [tokens, (heads + 2 * kv_heads) * head_dim], store keys and values.

        `plan`: where to, as these kernels want it: a WritePlan, or kernels.gpu.ops.Places.
        Returns the queries [tokens, heads, head_dim], which may lie in `qkv`.
        """

    @abstractmethod
    def plan_attention(self, slabs: Tensor, spans: Sequence[SequenceSpan], window: int | None) -> Plan:
        """What is the same for all layers of a step that share a window."""

    @abstractmethod
    def attention(self, query: Tensor, slabs: Tensor, layer: int, plan: Plan) -> Tensor:
        """[tokens, heads, head_dim] -> [tokens, heads * head_dim]: causal, over what `slabs` holds."""

    @abstractmethod
    def argmax(self, logits: Tensor) -> Tensor:
        """int64 [rows]: of each row of [rows, n] the place of the highest, the first of equals."""

    @abstractmethod
    def sample(self, logits: Tensor, choices: Tensor) -> Tensor:
        """int64 [rows]: a token of each row of [rows, vocab_size], whatever the other rows hold.

        `choices` float64 [5, rows]: temperature (below GREEDY_BELOW: greedy), top_k (0 keeps all), top_p, min_p, and
        the number in [0, 1) at which the cumulative distribution, in order of ids, is inverted. Probabilities are
        float32 in some kernels: a token at whose edge a number or top_p lies (within 1e-6) depends on the kernel.
        Logits that are NaN or all -inf give some token.
        """


class TorchOps(Ops[AttentionPlan]):
    """Any dtype, any processor."""

    name = "torch"

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        return Matrix(weight, bias, *weight.shape)

    def linear(self, x: Tensor, matrix: Matrix, residual: Tensor | None = None) -> Tensor:
        y = functional.linear(x, matrix.data, matrix.bias)
        return y if residual is None else residual + y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return elementwise.rms_norm(x, weight, eps)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return elementwise.silu_and_mul(gate_up)

    def rotate_and_store(
        self, qkv: Tensor, slabs: Tensor, layer: int, rotation: Rotation, norms: HeadNorms | None, eps: float,
        plan: WritePlan,
    ) -> Tensor:  # fmt: skip
        kv_heads, head_dim = slabs.shape[2], slabs.shape[5]
        heads = qkv.view(len(qkv), -1, head_dim)
        query, key, value = torch.split(heads, [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
        if norms is not None:
            query = elementwise.rms_norm(query, norms.query, eps)
            key = elementwise.rms_norm(key, norms.key, eps)
        query = elementwise.rotate(query, rotation.cos, rotation.sin)
        key = elementwise.rotate(key, rotation.cos, rotation.sin)
        paged_attention.write_kv(slabs, layer, plan, key, value)
        return query

    def plan_attention(self, slabs: Tensor, spans: Sequence[SequenceSpan], window: int | None) -> AttentionPlan:
        return paged_attention.plan_attention(slabs, spans, window)

    def attention(self, query: Tensor, slabs: Tensor, layer: int, plan: AttentionPlan) -> Tensor:
        return paged_attention.paged_attention(query, slabs, layer, plan).flatten(1)

    def argmax(self, logits: Tensor) -> Tensor:
        # That of bfloat16 is not vectorised: widening first is five times faster.
        return logits.float().argmax(-1)

    def sample(self, logits: Tensor, choices: Tensor) -> Tensor:
        return sampling.sample(logits, choices)
