"""Writes a Llama with random weights: the shape that every CPU figure of this project is about.

246 M parameters: hidden 1024, 16 layers, 16 query and 4 key/value heads, FFN 2816, vocabulary 32000, untied, bfloat16.
The tokenizer maps each id to a word of its own, so that a prompt of n tokens is easily written as text, too.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY = 1024, 16, 16, 4, 64, 2816, 32000


def config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "intermediate_size": FFN, "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    result = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": ones.clone(),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        result |= {
            at + "input_layernorm.weight": ones.clone(),
            at + "post_attention_layernorm.weight": ones.clone(),
            at + "self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            at + "mlp.gate_proj.weight": matrix(FFN, HIDDEN),
            at + "mlp.up_proj.weight": matrix(FFN, HIDDEN),
            at + "mlp.down_proj.weight": matrix(HIDDEN, FFN),
        }
    return result


def write(folder: Path) -> Path:
    """Write the model into `folder`; return the folder. Weights that are there stay, as they never change."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(), indent=2))
    if (folder / "model.safetensors").exists():
        return folder
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    words = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    # Last, and under another name first: a folder with this file is a whole one.
    save_file(tensors(), folder / "model.tmp", metadata={"format": "pt"})
    (folder / "model.tmp").rename(folder / "model.safetensors")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the random 246 M Llama of the benchmarks.")
    parser.add_argument("folder", type=Path)
    print(write(parser.parse_args().folder))
