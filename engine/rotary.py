"""Cosines and sines of rotary position embedding (Su et al., 2021), and its four ways beyond the trained context.

Half of a head's dimensions rotate with the other half by angle position * inverse_frequency[dimension]. The variants
only change the frequencies:

    linear   all divided by a factor (Chen et al., 2023)
    dynamic  the base grows with the length of the sequence once that exceeds the original context (NTK-aware)
    llama3   long wavelengths divided by a factor, short ones kept, a ramp between
    yarn     the same with the ramp over dimensions, and attention sharpened (Peng et al., 2023)
"""

import math

import torch
from torch import Tensor

from engine.model_config import RopeConfig
from kernels.ops import Rotation


class Rotary:
    """Frequencies of one model."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device | None = None) -> None:
        """Computed on the CPU, whose results are those of the reference, then kept on `device`."""
        self._rope = rope
        self._head_dim = head_dim
        self._exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        self._inverse_frequencies = self._fixed_frequencies().to(device=device)
        self._exponents = self._exponents.to(device=device)

    def cos_sin(self, positions: Tensor, prompt_lengths: Tensor) -> Rotation:
        """For int64 [tokens] positions, and the length of the prompt that each token's request came with."""
        frequencies: Tensor = self._inverse_frequencies
        if self._rope.kind == "dynamic":
            frequencies = self._dynamic_frequencies(torch.maximum(prompt_lengths, positions + 1))
        angles = positions.float()[:, None] * frequencies
        scale = self._rope.attention_factor
        return Rotation((angles.cos() * scale)[:, None], (angles.sin() * scale)[:, None])

    def _fixed_frequencies(self) -> Tensor:
        """float32 [head_dim / 2]."""
        rope = self._rope
        frequencies: Tensor = 1.0 / rope.theta**self._exponents
        if rope.kind == "linear":
            return frequencies / rope.factor
        if rope.kind == "llama3":
            return self._llama3_frequencies(frequencies)
        if rope.kind == "yarn":
            return self._yarn_frequencies()
        return frequencies

    def _dynamic_frequencies(self, lengths: Tensor) -> Tensor:
        """float32 [tokens, head_dim / 2] for the sequence length that each token is rotated at.

        A token of the prompt is rotated for the whole prompt's length, one generated later for the length that the
        sequence had then. That is what generation with a cache does, and it is the same for every way to split the
        work into steps.
        """
        rope = self._rope
        lengths = lengths.clamp(min=rope.original_max_position)
        growth = rope.factor * lengths / rope.original_max_position - (rope.factor - 1)
        base = rope.theta * growth ** (self._head_dim / (self._head_dim - 2))
        frequencies: Tensor = 1.0 / base[:, None] ** self._exponents
        return frequencies

    def _llama3_frequencies(self, frequencies: Tensor) -> Tensor:
        rope = self._rope
        turns = rope.original_max_position * frequencies / (2 * math.pi)
        """Full rotations within the original context; few means a long wavelength."""
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = kept.clamp(0, 1)
        return (1 - kept) * frequencies / rope.factor + kept * frequencies

    def _yarn_frequencies(self) -> Tensor:
        rope = self._rope
        wavelengths = rope.theta**self._exponents
        low, high = self._dimension_of(rope.beta_fast), self._dimension_of(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self._head_dim - 1)
        if low == high:
            high += 0.001  # a step, without dividing by zero
        stretched = ((torch.arange(self._head_dim // 2).float() - low) / (high - low)).clamp(0, 1)
        return 1 / (rope.factor * wavelengths) * stretched + 1 / wavelengths * (1 - stretched)

    def _dimension_of(self, rotations: float) -> float:
        """The dimension that turns this many times within the original context."""
        rope = self._rope
        ratio = math.log(rope.original_max_position / (rotations * 2 * math.pi))
        return self._head_dim * ratio / (2 * math.log(rope.theta))
