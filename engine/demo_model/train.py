"""Make the demo model: collect text, train a tokenizer, train, write this folder.

    python train.py                      # 37 minutes of training on two processor cores
    python train.py --minutes 2          # a quick try

Needs torch, transformers, tokenizers and numpy, and the Python documentation
sources (on Debian: the package python3.11-doc).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import repeat_kv

HERE = Path(__file__).resolve().parent
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
SEPARATOR, PAD, END = 0, 1, 5
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": SEPARATOR,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "use_cache": True,
}


@dataclass
class Stream:
    """Tokens of many documents in a row, and where each of them starts."""

    tokens: np.ndarray[Any, np.dtype[np.uint16]]
    starts: np.ndarray[Any, np.dtype[np.int64]]

    def rows(self, count: int, length: int, rng: np.random.Generator, aligned: bool) -> torch.Tensor:
        """Random rows. Chats start at a chat, so that the model knows its first token."""
        last = len(self.tokens) - length
        places = rng.choice(self.starts[self.starts < last], count) if aligned else rng.integers(0, last, count)
        return torch.from_numpy(np.stack([self.tokens[p : p + length] for p in places]).astype(np.int64))


@dataclass
class Data:
    """The two kinds of text, for training and held out."""

    docs: Stream
    chat: Stream
    docs_held: Stream
    chat_held: Stream


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: every text can be encoded, and decoding gives it back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def to_stream(texts: list[str], tokenizer: Tokenizer) -> Stream:
    """Encode texts and put a separator behind each."""
    parts = [[*e.ids, SEPARATOR] for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    lengths = np.array([len(p) for p in parts])
    tokens = np.concatenate([np.array(p, dtype=np.uint16) for p in parts])
    return Stream(tokens, np.cumsum(lengths) - lengths)


def collect(docs: Path, stdlib: Path, out: Path, passes: int, seed: int) -> tuple[Tokenizer, Data]:
    """Read all sources, hold a part out, and encode the rest.

    An existing tokenizer in the output folder is kept: weights depend on it.
    """
    rng = random.Random(seed)
    texts, entries = corpus.read_docs(docs)
    more_texts, more_entries = corpus.read_stdlib(stdlib)
    texts += more_texts
    entries += more_entries + corpus.read_smalltalk(HERE / "smalltalk.txt")
    rng.shuffle(texts)
    rng.shuffle(entries)
    held = [e for e in entries if e.weight == 1][:150]
    kept = [e for e in entries if e not in held]
    chats = [c for _ in range(passes) for c in corpus.conversations(kept, rng)]
    path = out / "tokenizer.json"
    if not path.exists():
        train_tokenizer(texts + chats[: len(chats) // passes]).save(str(path))
    tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    data = Data(
        to_stream(texts[20:], tokenizer),
        to_stream(chats, tokenizer),
        to_stream(texts[:20], tokenizer),
        to_stream(list(corpus.conversations(held, rng)), tokenizer),
    )
    sizes = {name: len(stream.tokens) for name, stream in vars(data).items()}
    print(f"{sum(map(len, texts)):,} characters of text, {len(entries):,} questions, tokens: {sizes}", flush=True)
    return tokenizer, data


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def export(model: LlamaForCausalLM, out: Path) -> None:
    """Write everything a serving system loads; the weights are replaced in one step."""
    weights = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    weights.pop("lm_head.weight", None)  # tied to the token embedding
    save_file(weights, out / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(out / "model.safetensors.part", out / "model.safetensors")
    os.chmod(out / "model.safetensors", 0o644)
    write_json(out / "config.json", MODEL | {"torch_dtype": "bfloat16"})
    write_json(
        out / "generation_config.json",
        # A model this small needs a low temperature to stay readable.
        {"bos_token_id": SEPARATOR, "eos_token_id": [END, SEPARATOR], "pad_token_id": PAD}
        | {"do_sample": True, "temperature": 0.2, "top_p": 0.9},
    )
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[SEPARATOR],
            "eos_token": SPECIAL[END],
            "pad_token": SPECIAL[PAD],
            "add_bos_token": False,
            "add_eos_token": False,
            "additional_special_tokens": SPECIAL[2:5],
            "clean_up_tokenization_spaces": False,
            "model_max_length": MODEL["max_position_embeddings"],
        },
    )


def blocked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention by blocks of queries; compiled, it is a third faster on a processor.

    Long rows would unroll into too many blocks, so they take the usual kernel.
    """
    size, length = 128, query.shape[2]
    groups: int = module.num_key_value_groups  # type: ignore[assignment]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if length > 4 * size:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None
    parts = []
    future = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
    for start in range(0, length, size):
        end = min(start + size, length)
        hidden = torch.nn.functional.pad(future[: end - start, : end - start], (start, 0))
        scores = (query[:, :, start:end] * scaling) @ key[:, :, :end].transpose(-1, -2)
        scores = scores.masked_fill(hidden, -1e4).float()
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        total = weights.sum(-1, keepdim=True)
        parts.append(((weights.to(value.dtype) @ value[:, :, :end]).float() / total).to(value.dtype))
    return torch.cat(parts, 2).transpose(1, 2), None


def make_model() -> LlamaForCausalLM:
    AttentionInterface.register("blocked", blocked_attention)
    config = LlamaConfig(**MODEL)
    config._attn_implementation = "blocked"
    return LlamaForCausalLM(config)


def make_optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, which learns from fewer tokens here, and AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def validate(loss_fn: Callable[[torch.Tensor], torch.Tensor], stream: Stream, aligned: bool) -> float:
    """Mean loss over the same 64 held-out rows each time."""
    rng = np.random.default_rng(1)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [loss_fn(stream.rows(8, 513, rng, aligned)).item() for _ in range(8)]
    return sum(losses) / len(losses)


def schedule(done: float, step: int) -> float:
    """Learning rate factor: short warm-up, constant, then down over the second half."""
    return min(1.0, (step + 1) / 100) * min(1.0, max(0.02, (1.0 - done) / 0.5))


@dataclass
class Trainer:
    """The training loop, bounded by wall-clock time."""

    args: argparse.Namespace
    data: Data
    model: LlamaForCausalLM
    step: int = 0
    tokens: int = 0
    spent: float = 0.0

    def __post_init__(self) -> None:
        self.optimizers = make_optimizers(self.model, self.args.rate)
        self.rng = np.random.default_rng(self.args.seed)
        self.checkpoint = self.args.work / "checkpoint.pt"

        def loss_fn(rows: torch.Tensor) -> torch.Tensor:
            return loss_of(self.model, rows)

        self.loss_fn = torch.compile(loss_fn, dynamic=False) if self.args.compile else loss_fn

    def save(self) -> None:
        """Keep the full state in the work folder, so that --resume loses little."""
        states = [o.state_dict() for o in self.optimizers]
        counters = {"step": self.step, "tokens": self.tokens, "spent": self.spent}
        part = self.checkpoint.with_suffix(".part")
        torch.save({"model": self.model.state_dict(), "optimizers": states, "counters": counters}, part)
        os.replace(part, self.checkpoint)

    def resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self.rng = np.random.default_rng(self.args.seed + self.step)

    def batch(self, done: float) -> torch.Tensor:
        """Short rows first; the last part of the time is for prompts of a longer kind."""
        count, length = (8, 512) if done < 0.92 else (2, 2048)
        chats = round(count * self.args.chat_share)
        rows = self.data.docs.rows(count - chats, length + 1, self.rng, aligned=False)
        return torch.cat([rows, self.data.chat.rows(chats, length + 1, self.rng, aligned=True)])

    def update(self, done: float) -> float:
        """One step of the optimizers; returns the loss before it."""
        rows = self.batch(done)
        factor = schedule(done, self.step)
        long = rows.shape[1] > 513  # too few such steps to be worth compiling for
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(self.model, rows) if long else self.loss_fn(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.args.rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += rows.shape[0] * (rows.shape[1] - 1)
        return loss.item()

    def report(self, loss: float) -> None:
        docs = validate(self.loss_fn, self.data.docs_held, aligned=False)
        chat = validate(self.loss_fn, self.data.chat_held, aligned=True)
        print(
            f"{self.spent / 60:5.1f} min  step {self.step:5d}  {self.tokens / 1e6:6.2f} M tokens  "
            f"train {loss:.3f}  held-out text {docs:.3f}  held-out chat {chat:.3f}",
            flush=True,
        )

    def run(self) -> None:
        budget = self.args.minutes * 60
        begin = time.monotonic() - self.spent
        saved, average, exported = self.spent, math.nan, self.spent > 0
        stops: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: stops.append(number))
        while self.spent < budget and not stops:
            loss = self.update(self.spent / budget)
            average = loss if math.isnan(average) else 0.98 * average + 0.02 * loss
            self.spent = time.monotonic() - begin
            if self.step % 20 == 0:
                print(f"  {self.spent:.0f} s  step {self.step}  loss {average:.3f}", flush=True)
            if self.spent - saved > self.args.save_every * 60:
                saved = self.spent
                self.save()
                if not exported:  # others can work with an early version
                    export(self.model, self.args.out)
                    exported = True
                self.report(average)
        self.save()
        if not stops:  # a stopped run leaves a checkpoint for --resume
            export(self.model, self.args.out)
            self.report(average)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("/usr/share/doc/python3.11/html/_sources"))
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "baton-demo-model")
    parser.add_argument("--minutes", type=float, default=37.0, help="training time, wall clock")
    parser.add_argument("--save-every", type=float, default=4.0, help="minutes between checkpoints")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--chat-share", type=float, default=0.6, help="share of rows that are chats")
    parser.add_argument("--passes", type=int, default=8, help="phrasings made of each question")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    _, data = collect(args.docs, args.stdlib, args.out, args.passes, args.seed)
    model = make_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    trainer = Trainer(args, data, model)
    if args.resume:
        trainer.resume()
    trainer.run()


if __name__ == "__main__":
    main()
