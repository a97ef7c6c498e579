"""What a model is, read from its config.json: dimensions, rotary scaling, attention windows.

Every default that a config.json may leave out is the one that transformers applies to that architecture, so that the
same folder means the same model in both.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.errors import ModelError

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
UNLIMITED = 2**62


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding; fields beyond `theta` matter only to the kinds named."""

    kind: str = "default"
    """One of ROPE_KINDS."""
    theta: float = 10000.0
    factor: float = 1.0
    """All but default: how far positions are stretched."""
    original_max_position: int = 0
    """dynamic, llama3, yarn: context length before stretching."""
    low_freq_factor: float = 1.0
    """llama3."""
    high_freq_factor: float = 4.0
    """llama3."""
    beta_fast: float = 32.0
    """yarn."""
    beta_slow: float = 1.0
    """yarn."""
    truncate: bool = True
    """yarn: round the correction range to whole dimensions."""
    attention_factor: float = 1.0
    """yarn: multiplies cosines and sines."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Raises ModelError from `load` when the file is missing, malformed, or asks for what is not supported."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    """Bias of the projection that closes attention."""
    mlp_bias: bool
    qk_norm: bool
    """RMS norm of each query and key head before the rotation (Qwen3)."""
    sliding_windows: tuple[int | None, ...]
    """Per layer: number of latest positions a token sees, itself included; None sees all."""
    rope: RopeConfig
    stored_dtype: str
    """dtype that config.json names, or float32."""

    @classmethod
    def load(cls, folder: Path) -> "ModelConfig":
        return parse_config(_read_json(folder / "config.json"))

    @property
    def context_tokens(self) -> int:
        """Longest prompt plus output. Linear and dynamic scaling state the length before stretching."""
        stretched = self.rope.factor if self.rope.kind in ("linear", "dynamic") else 1.0
        return int(self.max_position_embeddings * stretched)

    def shareable_tokens(self, num_prompt_tokens: int) -> int:
        """How many leading tokens of a request may take their KV from another request, or give it.

        Dynamic rotary scaling changes all frequencies once a prompt outgrows the original context: KV then depends
        on the prompt's length, and the same tokens in another prompt have other keys.
        """
        if self.rope.kind != "dynamic":
            return UNLIMITED
        return self.rope.original_max_position if num_prompt_tokens <= self.rope.original_max_position else 0


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture's name alone decides."""

    qkv_bias: bool | None = None
    """None: the field attention_bias says."""
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False
    windows: str = "none"
    """none; all (field sliding_window for every layer); some (use_sliding_window with layer_types)."""
    defaults: Mapping[str, int] = field(default_factory=dict)
    """Fields that config.json may leave out, where the default is a number of its own."""


FAMILIES: dict[str, _Family] = {
    "LlamaForCausalLM": _Family(),
    "MistralForCausalLM": _Family(
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        windows="all",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": _Family(
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
        windows="some",
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "Qwen3ForCausalLM": _Family(
        mlp_bias=False,
        qk_norm=True,
        windows="some",
        defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    ),
}


def parse_config(values: dict[str, Any]) -> ModelConfig:
    """ModelConfig of the parsed config.json. Raises ModelError naming the field."""
    fields = _Fields(values)
    architecture, family = _family(values)
    fields.defaults = family.defaults
    hidden_act = values.get("hidden_act", "silu")
    if hidden_act != "silu":
        raise _bad("hidden_act", hidden_act, "supported is silu")
    hidden_size, num_heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    num_kv_heads = fields.positive("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise _bad("num_key_value_heads", num_kv_heads, f"it must divide num_attention_heads ({num_heads})")
    head_dim = fields.positive("head_dim", default=max(hidden_size // num_heads, 1))
    if head_dim % 2:
        raise _bad("head_dim", head_dim, "rotary embedding needs an even number")
    num_layers = fields.positive("num_hidden_layers")
    attention_bias = fields.flag("attention_bias")
    max_position = fields.positive("max_position_embeddings")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.positive("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.positive("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        max_position_embeddings=max_position,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=fields.flag("mlp_bias") if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        sliding_windows=_windows(fields, family, num_layers),
        rope=_rope(values, max_position),
        stored_dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch."),
    )


class _Fields:
    """Typed access to config.json, or to one object inside it; null counts as absent."""

    def __init__(self, values: dict[str, Any], prefix: str = "") -> None:
        self.values = values
        self.prefix = prefix
        self.defaults: Mapping[str, int] = {}

    def positive(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _bad(self.prefix + name, value, "it must be a whole number of at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise _bad(self.prefix + name, value, "it must be a number above 0")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise _bad(self.prefix + name, value, "it must be true or false")
        return value

    def _get(self, name: str, default: Any) -> Any:
        if name not in self.values and name in self.defaults:
            return self.defaults[name]
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            raise ModelError(f"config.json: field '{self.prefix}{name}' is missing")
        return default


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); a Hugging Face folder is needed") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: must hold one JSON object")
    return values


def _bad(name: str, value: object, demand: str) -> ModelError:
    return ModelError(f"config.json: field '{name}' is {value!r}; {demand}")


def _family(values: dict[str, Any]) -> tuple[str, _Family]:
    names = values.get("architectures")
    if not isinstance(names, list) or not names:
        raise ModelError("config.json: field 'architectures' is missing; it must name the model's class")
    if (family := FAMILIES.get(str(names[0]))) is None:
        raise _bad("architectures", names[0], f"supported are {', '.join(FAMILIES)}")
    return str(names[0]), family


def _windows(fields: _Fields, family: _Family, num_layers: int) -> tuple[int | None, ...]:
    nothing: tuple[int | None, ...] = (None,) * num_layers
    explicit_null = "sliding_window" in fields.values and fields.values["sliding_window"] is None
    if family.windows == "none" or explicit_null:
        return nothing
    if family.windows == "all":
        return (fields.positive("sliding_window"),) * num_layers
    if not fields.flag("use_sliding_window"):
        return nothing
    window = fields.positive("sliding_window")
    kinds = fields.values.get("layer_types")
    if kinds is None:
        first = fields.values.get("max_window_layers", family.defaults["max_window_layers"])
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise _bad("max_window_layers", first, "it must be a whole number")
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ModelError(f"config.json: field 'layer_types' must list one word for each of {num_layers} layers")
    for layer, kind in enumerate(kinds):
        if kind not in ("full_attention", "sliding_attention"):
            raise _bad(f"layer_types[{layer}]", kind, "supported are full_attention, sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(values: dict[str, Any], max_position: int) -> RopeConfig:
    """Old keys (rope_theta, rope_scaling) and the rope_parameters of transformers 5; rope_scaling wins, as there."""
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    section = values.get(name) or {}
    if not isinstance(section, dict):
        raise _bad(name, section, "it must be an object")
    fields = _Fields(section, prefix=f"{name}.")
    top = _Fields(values)
    type_key = "rope_type" if "rope_type" in section else "type"
    kind = section.get(type_key, "default")
    if kind not in ROPE_KINDS or any(isinstance(value, dict) for value in section.values()):
        raise _bad(f"{name}.{type_key}", kind, f"supported are {', '.join(ROPE_KINDS)}, one for all layers")
    for holder in (fields, top):
        if (partial := holder.number("partial_rotary_factor", default=1.0)) != 1.0:
            raise _bad(f"{holder.prefix}partial_rotary_factor", partial, "only 1.0 is supported")
    theta = fields.number("rope_theta", default=top.number("rope_theta", default=10000.0))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(kind, theta, fields.number("factor"))
    if kind == "dynamic":
        return RopeConfig(kind, theta, fields.number("factor"), max_position)
    original = fields.positive("original_max_position_embeddings", default=max_position)
    original = top.positive("original_max_position_embeddings", default=original)
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        if high <= low:
            raise _bad(f"{name}.high_freq_factor", high, f"it must exceed low_freq_factor ({low})")
        return RopeConfig(kind, theta, fields.number("factor"), original, low_freq_factor=low, high_freq_factor=high)
    return _yarn(fields, theta, original, max_position)


def _yarn(fields: _Fields, theta: float, original: int, max_position: int) -> RopeConfig:
    factor = fields.number("factor", default=max_position / original)

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if fields.values.get("attention_factor") is not None:
        attention_factor = fields.number("attention_factor")
    elif fields.values.get("mscale") and fields.values.get("mscale_all_dim"):
        attention_factor = magnitude(fields.number("mscale")) / magnitude(fields.number("mscale_all_dim"))
    else:
        attention_factor = magnitude(1.0)
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max_position=original,
        beta_fast=fields.number("beta_fast", default=32.0),
        beta_slow=fields.number("beta_slow", default=1.0),
        truncate=fields.flag("truncate", default=True),
        attention_factor=attention_factor,
    )
