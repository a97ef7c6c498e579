"""From a model folder to weights in the order that the chosen kernels want."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from baton.compiled import Unavailable
from baton.errors import ConfigurationError
from engine.model_config import ModelConfig
from engine.weights import (
    Weights,
    expected_tensors,
    load_weights,
    model_fingerprint,
    resolve_dtype,
    weights_fingerprint,
)
from kernels.cpu.native import NativeOps
from kernels.deterministic import DeterministicNativeOps, DeterministicOps, bits_depend_on
from kernels.ops import HeadNorms, Ops, TorchOps

log = logging.getLogger(__name__)
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    config: ModelConfig
    weights: Weights
    ops: Ops[Any]
    """The kernels that its weights are laid out for."""
    dtype: torch.dtype
    fingerprint: str
    """Equal for models that compute equal KV."""
    weights_fingerprint: str = ""
    """Equal for those that would in the same dtype; empty where KV of another dtype is never good enough."""
    version: str = ""
    """Equal for equal weights, whatever they are computed in, also where `weights_fingerprint` is empty."""

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device


def load_model(
    folder: Path, dtype: str = "auto", on_progress: Callable[[float], None] | None = None, page_size: int = 16,
    device: torch.device = CPU, deterministic: bool = False,
) -> LoadedModel:  # fmt: skip
    """Weights lie on `device`. `on_progress` gets the fraction done. `deterministic`: see `kernels.deterministic`.

    Raises ModelError when the folder is unusable, ConfigurationError when the device's kernels cannot serve it.
    """
    config = ModelConfig.load(folder)
    resolved = resolve_dtype(dtype, config)
    weights_name = weights_fingerprint(folder, config)
    fingerprint, version = model_fingerprint(weights_name, resolved), weights_name
    ops = choose_ops(config, resolved, page_size, device, deterministic)
    if deterministic:
        # The page size too: kernels may cut the long sums of attention where pages end.
        fingerprint = xxhash.xxh3_128_hexdigest("\n".join((fingerprint, str(page_size), *bits_depend_on(ops))))
        weights_name = ""
    weights = load_weights(folder, config, resolved, ops, on_progress)
    if device.type != "cpu":
        weights = _moved(weights, device, config.tie_word_embeddings)
    return LoadedModel(config, weights, ops, resolved, fingerprint, weights_name, version)


def gpu_ops(config: ModelConfig, page_size: int, device: torch.device, deterministic: bool = False) -> Ops[Any]:
    """Raises ConfigurationError when there are none for this model."""
    try:
        from kernels.gpu.ops import DeterministicGpuOps, GpuOps
    except ImportError as error:
        raise ConfigurationError("GPUs need Triton: pip install 'baton-serve[gpu]', or use --device cpu") from error
    if reason := GpuOps.unsupported(config.head_dim, page_size):
        raise ConfigurationError(f"the GPU kernels cannot serve this model: {reason}; use --device cpu")
    kernels = DeterministicGpuOps if deterministic else GpuOps
    return kernels(device, config.num_heads, config.context_tokens)


def _moved(weights: Weights, device: torch.device, tied: bool) -> Weights:
    """`Ops.matrix` has moved the matrices; this moves the rest, an embedding that is also the head not twice."""
    layers = [
        replace(
            layer,
            input_norm=layer.input_norm.to(device),
            mlp_norm=layer.mlp_norm.to(device),
            head_norms=layer.head_norms
            and HeadNorms(layer.head_norms.query.to(device), layer.head_norms.key.to(device)),
        )
        for layer in weights.layers
    ]
    embedding = weights.head.data if tied else weights.embedding.to(device)
    return Weights(embedding, tuple(layers), weights.norm.to(device), weights.head)


def choose_ops(
    config: ModelConfig, dtype: torch.dtype, page_size: int, device: torch.device = CPU, deterministic: bool = False
) -> Ops[Any]:
    """The fastest kernels that `device` has for this model. Raises ConfigurationError when it has none."""
    if deterministic:
        return deterministic_ops(config, dtype, page_size, device)
    if device.type != "cpu":
        return gpu_ops(config, page_size, device)
    return native_ops(NativeOps, config, dtype, page_size) or TorchOps()


def deterministic_ops(config: ModelConfig, dtype: torch.dtype, page_size: int, device: torch.device) -> Ops[Any]:
    """Those among them whose bits depend on a request alone. Raises ConfigurationError when there are none."""
    if config.rope.kind == "dynamic":
        raise ConfigurationError("--deterministic does not serve models with dynamic rotary scaling")
    if device.type != "cpu":
        return gpu_ops(config, page_size, device, deterministic=True)
    return native_ops(DeterministicNativeOps, config, dtype, page_size) or DeterministicOps(config.num_heads)


def native_ops(kernels: type[NativeOps], config: ModelConfig, dtype: torch.dtype, page_size: int) -> NativeOps | None:
    """None where this processor or this model is not for them."""
    if dtype != torch.bfloat16:
        return None
    shapes = [shape for shape in expected_tensors(config).values() if len(shape) == 2]
    reason = NativeOps.unsupported(
        [rows for rows, _ in shapes], [columns for _, columns in shapes], config.head_dim,
        config.num_heads // config.num_kv_heads, page_size,
    )  # fmt: skip
    try:
        if reason is None:
            return kernels()
    except Unavailable as unavailable:
        reason = str(unavailable)
    log.warning("native CPU kernels cannot be used, torch is slower: %s", reason)
    return None
