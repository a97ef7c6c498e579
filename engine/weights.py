"""Reads and checks the *.safetensors files of a Hugging Face folder.

`check_weights` looks at headers alone, so that an unusable model is refused before anything is loaded or any port
opened; `load_weights` then reads through a memory map, converts, and fuses what is multiplied with the same input.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baton.errors import ModelError
from engine.model_config import ModelConfig
from kernels.ops import HeadNorms, Matrix, Ops

FLOAT_DTYPES = ("F32", "BF16", "F16")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAMPLED_ROWS = 16
"""Rows of a tensor that go into the fingerprint."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. None: the model has no such tensors."""

    input_norm: Tensor
    qkv: Matrix
    """Rows of the queries' heads, then the keys', then the values'."""
    head_norms: HeadNorms | None
    output: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    """Rows of the gate, then of the up projection."""
    down: Matrix


@dataclass(frozen=True, slots=True)
class Weights:
    embedding: Tensor
    """[vocab_size, hidden_size]."""
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Matrix
    """hidden_size -> vocab_size; of the embedding itself where the two are tied."""


def resolve_dtype(name: str, config: ModelConfig) -> torch.dtype:
    """'float32', 'bfloat16', or 'auto': as stored, except that float16 becomes float32.

    bfloat16 would lose three of float16's mantissa bits, float32 loses nothing.
    """
    if name == "auto":
        name = "bfloat16" if config.stored_dtype == "bfloat16" else "float32"
    if name not in ("float32", "bfloat16"):
        raise ModelError(f"dtype '{name}' is not supported; use auto, float32 or bfloat16")
    return torch.float32 if name == "float32" else torch.bfloat16


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the model needs."""
    hidden, ffn, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * head_dim, config.num_kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    linears = [
        ("self_attn.q_proj", queries, hidden, config.qkv_bias),
        ("self_attn.k_proj", keys, hidden, config.qkv_bias),
        ("self_attn.v_proj", keys, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, queries, config.output_bias),
        ("mlp.gate_proj", ffn, hidden, config.mlp_bias),
        ("mlp.up_proj", ffn, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, ffn, config.mlp_bias),
    ]
    norms = [("input_layernorm", hidden), ("post_attention_layernorm", hidden)]
    if config.qk_norm:
        norms += [("self_attn.q_norm", head_dim), ("self_attn.k_norm", head_dim)]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for name, rows, columns, bias in linears:
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        for name, size in norms:
            shapes[f"{prefix}{name}.weight"] = (size,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_model(folder: Path) -> ModelConfig:
    """Everything that can be judged without reading the weights themselves. Raises ModelError."""
    config = ModelConfig.load(folder)
    check_weights(folder, config)
    return config


def check_weights(folder: Path, config: ModelConfig) -> dict[str, Path]:
    """The file of each tensor that the model needs, after checking names, shapes, dtypes and file sizes."""
    expected = expected_tensors(config)
    found: dict[str, Path] = {}
    for path in _weight_files(folder):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name in found:
                    raise ModelError(f"{path.name}: tensor '{name}' is also in {found[name].name}")
                found[name] = path
                if name in expected:
                    _check_tensor(path, name, file.get_slice(name), expected[name])
                elif not _harmless(name, config):
                    raise ModelError(f"{path.name}: tensor '{name}' is not part of {config.architecture}")
    for name in expected:
        if name not in found:
            raise ModelError(f"{folder}: tensor '{name}' is missing from the safetensors files")
    return {name: found[name] for name in expected}


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    ops: Ops[Any],
    on_progress: Callable[[float], None] | None = None,
) -> Weights:
    """Checks as `check_weights`, then reads, each matrix in the order that `ops` wants it.

    `on_progress` gets the fraction done after each layer, ending with 1.
    """
    with _Reader(check_weights(folder, config), dtype) as reader:
        embedding = reader.get("model.embed_tokens.weight")
        head = ops.matrix(embedding if config.tie_word_embeddings else reader.get("lm_head.weight"), None)
        layers = []
        for layer in range(config.num_layers):
            layers.append(_load_layer(reader, ops, f"model.layers.{layer}."))
            if on_progress is not None:
                on_progress((layer + 1) / config.num_layers)
        return Weights(embedding, tuple(layers), reader.get("model.norm.weight"), head)


def weights_fingerprint(folder: Path, config: ModelConfig) -> str:
    """Models with equal fingerprints are the same function, whatever dtype it is computed in: 32 hex digits.

    Hashed are the parsed config, and of every tensor its name and up to SAMPLED_ROWS rows, evenly spread and with the
    first and the last. So a model of any size takes milliseconds a tensor; in return two models that differ only in
    single rows of a matrix may look the same. Training, merging and quantising all change every row.
    """
    digest = xxhash.xxh3_128()
    digest.update(json.dumps(asdict(config), sort_keys=True).encode())
    with _Reader(check_weights(folder, config), torch.float32) as reader:  # samples are bytes as they are
        for name in sorted(reader.files):
            digest.update(name.encode())
            digest.update(reader.sample(name))
    return digest.hexdigest()


def model_fingerprint(weights: str, dtype: torch.dtype) -> str:
    """Models with equal fingerprints compute equal KV. `weights`: their `weights_fingerprint`."""
    return xxhash.xxh3_128_hexdigest(f"{weights}\n{dtype}")


class _Reader:
    """Open safetensors files, each mapped once."""

    def __init__(self, files: dict[str, Path], dtype: torch.dtype) -> None:
        self.files = files
        self._dtype = dtype
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def has(self, name: str) -> bool:
        return name in self.files

    def get(self, *names: str) -> Tensor:
        """The tensors stacked along their first dimension, in memory of their own.

        A view of the map would change, or kill the process, when somebody overwrites the file.
        """
        parts: list[Tensor] = [self._file(name).get_tensor(name) for name in names]
        if len(parts) == 1:
            return parts[0].to(self._dtype, copy=True)
        return torch.cat([part.to(self._dtype) for part in parts])

    def maybe(self, *names: str) -> Tensor | None:
        return self.get(*names) if self.has(names[0]) else None

    def sample(self, name: str) -> bytes:
        rows = self._file(name).get_slice(name)
        count = rows.get_shape()[0]
        picked = np.unique(np.linspace(0, count - 1, SAMPLED_ROWS).astype(np.int64))
        return b"".join(rows[row : row + 1].view(torch.uint8).numpy().tobytes() for row in picked.tolist())

    def _file(self, name: str) -> Any:
        path = self.files[name]
        if path not in self._open:
            self._open[path] = self._stack.enter_context(_open(path))
        return self._open[path]


def _load_layer(reader: _Reader, ops: Ops[Any], prefix: str) -> LayerWeights:
    def matrix(*names: str) -> Matrix:
        """Linear layers that multiply the same input, stacked."""
        return ops.matrix(
            reader.get(*(f"{prefix}{name}.weight" for name in names)),
            reader.maybe(*(f"{prefix}{name}.bias" for name in names)),
        )

    q_norm, k_norm = (reader.maybe(f"{prefix}self_attn.{name}_norm.weight") for name in ("q", "k"))
    return LayerWeights(
        input_norm=reader.get(f"{prefix}input_layernorm.weight"),
        qkv=matrix("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        head_norms=None if q_norm is None or k_norm is None else HeadNorms(q_norm, k_norm),
        output=matrix("self_attn.o_proj"),
        mlp_norm=reader.get(f"{prefix}post_attention_layernorm.weight"),
        gate_up=matrix("mlp.gate_proj", "mlp.up_proj"),
        down=matrix("mlp.down_proj"),
    )


def _open(path: Path) -> Any:
    """A safe_open handle; opening checks that the header is sound and that the file has the length it promises."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise ModelError(f"{path}: file is missing") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: is truncated or not a safetensors file ({error})") from error


def _weight_files(folder: Path) -> Iterator[Path]:
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise ModelError(f"{folder}: neither {SINGLE} nor {INDEX} is there; only safetensors weights are read")
        yield folder / SINGLE
        return
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: field 'weight_map' is missing or malformed ({error!r})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index}: field 'weight_map' names {name!r}, which is not a file of this folder")
        if not (folder / name).exists():
            raise ModelError(f"{index}: field 'weight_map' names {name}, which is missing")
        yield folder / name


def _check_tensor(path: Path, name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    if (found := tuple(tensor.get_shape())) != shape:
        raise ModelError(f"{path.name}: tensor '{name}' has shape {list(found)}; config.json says {list(shape)}")
    if tensor.get_dtype() not in FLOAT_DTYPES:
        raise ModelError(
            f"{path.name}: tensor '{name}' has dtype {tensor.get_dtype()}; supported are {', '.join(FLOAT_DTYPES)}"
        )


def _harmless(name: str, config: ModelConfig) -> bool:
    """Tensors that older exports store although nothing needs them."""
    return name.endswith(".rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")
