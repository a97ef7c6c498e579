"""The decoder that all supported families share: RMS norm, rotary attention, SwiGLU.

Tokens of all sequences of a step form one ragged batch [tokens, ...]; which token belongs to whom is known to the
attention plan alone.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import embedding

from engine.model_config import ModelConfig
from engine.plan import OnLayer
from engine.weights import Weights
from kernels.ops import Ops, Rotation


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's tokens and everything about them that is the same in all layers."""

    token_ids: Tensor
    """int64 [tokens]."""
    rotation: Rotation
    write: Any
    """Where keys and values go: the `plan` of `Ops.rotate_and_store`."""
    attention: dict[int | None, Any]
    """Plans of `Ops.plan_attention`, by sliding window."""
    sample_rows: Tensor
    """int64: tokens whose logits are wanted."""


class Model:
    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops[Any]) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops

    def forward(self, batch: Batch, slabs: Tensor, on_layer: OnLayer | None = None) -> Tensor:
        """Logits [len(sample_rows), vocab_size]; keys and values of all tokens are left in `slabs`."""
        ops, eps = self.ops, self.config.rms_norm_eps
        x = embedding(batch.token_ids, self.weights.embedding)
        for index, layer in enumerate(self.weights.layers):
            qkv = ops.linear(ops.rms_norm(x, layer.input_norm, eps), layer.qkv)
            query = ops.rotate_and_store(qkv, slabs, index, batch.rotation, layer.head_norms, eps, batch.write)
            if on_layer is not None:
                on_layer(index + 1)
            attended = ops.attention(query, slabs, index, batch.attention[self.config.sliding_windows[index]])
            x = ops.linear(attended, layer.output, residual=x)
            gate_up = ops.linear(ops.rms_norm(x, layer.mlp_norm, eps), layer.gate_up)
            x = ops.linear(ops.silu_and_mul(gate_up), layer.down, residual=x)
        x = x.index_select(0, batch.sample_rows)
        return ops.linear(ops.rms_norm(x, self.weights.norm, eps), self.weights.head)
