"""Writes the weights of a Llama folder as the GGUF file that llama.cpp reads, bit for bit in bfloat16.

Runs in llama.cpp's environment: `write_gguf.py MODEL_FOLDER FILE`. The norms become float32, as llama.cpp asks. Rows of
the query and key projections are reordered: llama.cpp rotates neighbouring pairs of a head, the folder's format pairs
row i of a head with row i + head_dim / 2.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

GLOBAL_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Tensor(NamedTuple):
    name: str
    bits: "np.ndarray[Any, np.dtype[np.uint16]]"
    """bfloat16, as its 16 bits."""


def read_tensors(file: Path) -> Iterator[Tensor]:
    """Of a safetensors file: 8 bytes length, that many of JSON, data. Without torch, which is not installed here."""
    data = np.memmap(file, np.uint8, "r")
    start = 8 + int(data[:8].view("<u8")[0])
    for name, about in json.loads(bytes(data[8:start])).items():
        if name == "__metadata__":
            continue
        if about["dtype"] != "BF16":
            raise SystemExit(f"{name} is {about['dtype']}; only bfloat16 is written here")
        begin, end = about["data_offsets"]
        yield Tensor(name, data[start + begin : start + end].view("<u2").reshape(about["shape"]))


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest]}.weight"


def pair_neighbours(bits: "np.ndarray[Any, Any]", num_heads: int) -> "np.ndarray[Any, Any]":
    """[heads * head_dim, columns], rows of a head from (0, 1, .. d/2, ..) to (0, d/2, 1, d/2 + 1, ..)."""
    rows, columns = bits.shape
    halves = bits.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def write(folder: Path, file: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType  # only in llama.cpp's environment

    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(file, "llama")
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    for name, bits in read_tensors(folder / "model.safetensors"):
        if bits.ndim == 1:
            writer.add_tensor(gguf_name(name), (bits.astype(np.uint32) << 16).view(np.float32))
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            bits = pair_neighbours(bits, heads if "q_proj" in name else kv_heads)
        raw = np.ascontiguousarray(bits).view(np.uint8)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    target = Path(sys.argv[2])
    scratch = target.with_suffix(".tmp")
    write(Path(sys.argv[1]), scratch)
    scratch.rename(target)  # a file of this name is a whole one
