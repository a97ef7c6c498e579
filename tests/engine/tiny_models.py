"""Tiny random models of every family, and what transformers makes of them: the oracle of the engine's tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

VOCAB_SIZE = 199
DYNAMIC_ORIGINAL_MAX = 64
WINDOW = 40

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 128}
_SOME_WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
_FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama2": (LlamaConfig, {"num_key_value_heads": 4}),
    "llama3": (LlamaConfig, {"rope_parameters": _LLAMA3, "head_dim": 32, "rms_norm_eps": 1e-5}),
    "llama-biased": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama-linear": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-dynamic": (
        LlamaConfig,
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 16.0},
            "max_position_embeddings": DYNAMIC_ORIGINAL_MAX,
        },
    ),
    "llama-yarn": (LlamaConfig, {"rope_parameters": _YARN}),
    "mistral": (MistralConfig, {"sliding_window": WINDOW, "head_dim": 16}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-window": (Qwen2Config, {**_SOME_WINDOWS, "num_hidden_layers": 3}),
    "qwen3": (Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
}
FAMILIES = tuple(_FAMILIES)


@dataclass(frozen=True)
class Reference:
    """Greedy continuation of one prompt by transformers."""

    tokens: list[int]
    logprobs: list[float]
    """Of each token, from the raw logits."""


def write_tiny_model(folder: Path, family: str, seed: int = 0, **config_overrides: Any) -> Path:
    """Writes config.json and model.safetensors (float32, or as `dtype` says) and returns the folder.

    Weights spread widely enough that greedy output does not settle on one token.
    """
    config_class, fields = _FAMILIES[family]
    config = config_class(**{**_SIZES, **fields, **config_overrides})
    dtype = config.dtype or torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.25 * noise)
    model.to(dtype).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets fields of config.json; the value ... removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def reference_generate(folder: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Reference]:
    """Each prompt by itself, greedily, with a cache. Results are kept for the life of the process."""
    return [_generate(folder, tuple(prompt), max_new_tokens) for prompt in prompts]


@cache
def _model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@cache
def _generate(folder: Path, prompt: tuple[int, ...], max_new_tokens: int) -> Reference:
    model = _model(folder)
    # Dynamic rotary embedding remembers the longest sequence it has seen; each prompt starts afresh.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[0, len(prompt) :].tolist()
    logprobs = [
        float(logits[0].float().log_softmax(-1)[token]) for logits, token in zip(output.logits, tokens, strict=True)
    ]
    return Reference(tokens, logprobs)
