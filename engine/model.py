"""The decoder that all supported families share: RMS norm, rotary attention, SwiGLU.

Tokens of all sequences of a step form one ragged batch [tokens, ...]; which token belongs to whom is known to the
attention plan alone.
"""

from dataclasses import dataclass

from torch import Tensor, split
from torch.nn.functional import embedding, linear

from engine.model_config import ModelConfig
from engine.rotary import CosSin
from engine.weights import LayerWeights, Weights
from kernels.elementwise import rms_norm, rotate, silu_and_mul
from kernels.paged_attention import AttentionPlan, WritePlan, paged_attention, write_kv


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's tokens and everything about them that is the same in all layers."""

    token_ids: Tensor
    """int64 [tokens]."""
    rotation: CosSin
    write: WritePlan
    attention: dict[int | None, AttentionPlan]
    """By sliding window."""
    sample_rows: Tensor
    """int64: tokens whose logits are wanted."""


class Model:
    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.weights = weights

    def forward(self, batch: Batch, slabs: Tensor) -> Tensor:
        """Logits [len(sample_rows), vocab_size]; keys and values of all tokens are left in `slabs`."""
        eps = self.config.rms_norm_eps
        x = embedding(batch.token_ids, self.weights.embedding)
        for index, layer in enumerate(self.weights.layers):
            x = x + self._attention(rms_norm(x, layer.input_norm, eps), layer, index, batch, slabs)
            gate_up = linear(rms_norm(x, layer.mlp_norm, eps), layer.gate_up, layer.gate_up_bias)
            x = x + linear(silu_and_mul(gate_up), layer.down, layer.down_bias)
        x = x.index_select(0, batch.sample_rows)
        return linear(rms_norm(x, self.weights.norm, eps), self.weights.head)

    def _attention(self, x: Tensor, layer: LayerWeights, index: int, batch: Batch, slabs: Tensor) -> Tensor:
        config = self.config
        heads = linear(x, layer.qkv, layer.qkv_bias).view(len(x), -1, config.head_dim)
        query, key, value = split(heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            query = rms_norm(query, layer.q_norm, config.rms_norm_eps)
            key = rms_norm(key, layer.k_norm, config.rms_norm_eps)
        query = rotate(query, batch.rotation.cos, batch.rotation.sin)
        key = rotate(key, batch.rotation.cos, batch.rotation.sin)
        write_kv(slabs, index, batch.write, key, value)
        result = paged_attention(query, slabs, index, batch.attention[config.sliding_windows[index]])
        return linear(result.flatten(1), layer.output, layer.output_bias)
