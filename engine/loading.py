"""From a model folder to weights in the order that the chosen kernels want."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.model_config import ModelConfig
from engine.weights import Weights, expected_tensors, load_weights, model_fingerprint, resolve_dtype
from kernels.cpu.build import Unavailable
from kernels.cpu.native import NativeOps
from kernels.ops import Ops, TorchOps

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    config: ModelConfig
    weights: Weights
    ops: Ops[Any]
    """The kernels that its weights are laid out for."""
    dtype: torch.dtype
    fingerprint: str
    """Equal for models that compute equal KV."""


def load_model(
    folder: Path, dtype: str = "auto", on_progress: Callable[[float], None] | None = None, page_size: int = 16
) -> LoadedModel:
    """Raises ModelError when the folder is unusable. `on_progress` gets the fraction done."""
    config = ModelConfig.load(folder)
    resolved = resolve_dtype(dtype, config)
    fingerprint = model_fingerprint(folder, config, resolved)
    ops = choose_ops(config, resolved, page_size)
    return LoadedModel(config, load_weights(folder, config, resolved, ops, on_progress), ops, resolved, fingerprint)


def choose_ops(config: ModelConfig, dtype: torch.dtype, page_size: int) -> Ops[Any]:
    """The fastest kernels that this processor has for this model."""
    if dtype != torch.bfloat16:
        return TorchOps()
    shapes = [shape for shape in expected_tensors(config).values() if len(shape) == 2]
    reason = NativeOps.unsupported(
        [rows for rows, _ in shapes], [columns for _, columns in shapes], config.head_dim,
        config.num_heads // config.num_kv_heads, page_size,
    )  # fmt: skip
    try:
        if reason is None:
            return NativeOps()
    except Unavailable as unavailable:
        reason = str(unavailable)
    log.warning("native CPU kernels cannot be used, torch is slower: %s", reason)
    return TorchOps()
