"""Every kernel beside torch, and the engine beside transformers. Nothing is timed before these pass."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from engine.gpu.decode_graphs import Capture, cuda_capture
from engine.gpu.runner import DeviceRunner
from engine.loading import LoadedModel, gpu_ops, load_model
from engine.model_config import ModelConfig
from engine.plan import PENDING, Launched, PlannedSequence, SampleSpec, StepPlan
from engine.pool import BlockShape, KVPool
from engine.requests import SamplingParams
from engine.sampler import choices_of
from engine.weights import load_weights
from kernels.gpu import cases, cases_elementwise
from kernels.gpu.ops import GpuOps
from kernels.ops import TorchOps

PAGE = 16
NEW_TOKENS = 8
TINY: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 199, "max_position_embeddings": 1024,
}  # fmt: skip
SHAPE_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000, "max_position_embeddings": 8192,
}  # fmt: skip
SAMPLING = ((0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.8, 20, 1.0, 0.0), (1.2, 0, 0.9, 0.0), (1.0, 50, 0.9, 0.02))
"""temperature, top_k, top_p, min_p."""
ROWS_EACH, MOST_ON_THE_EDGE = 8, 0.03
CLOSENESS = 1.5
"""How much farther from float32 our bfloat16 logits may be than those of transformers."""


def kernel_failures(device: torch.device, longest: int, full: bool) -> Iterator[tuple[str, str | None]]:
    """(name, what is wrong or None) of every case."""
    attention = [*cases.decode_cases(longest, full=full), *cases.prefill_cases(longest, full=full)]
    if full:
        attention += cases.far_cases()
    for case in attention:
        error = cases.worst_error(case, device)
        kind = "decode" if case.is_decode else "prefill"
        yield f"{kind} {case}", None if error <= case.tolerance else f"error {error:.2g} > {case.tolerance:.2g}"
    for other in cases_elementwise.cases():
        if device.type == "cpu" and other.name.startswith("bits of"):
            continue  # numpy, which interprets, adds up a product's rows in different orders
        try:
            for pair in other.run(device):
                pair.check()
        except AssertionError as wrong:
            yield other.name, str(wrong).strip().splitlines()[0]
        else:
            yield other.name, None


def sampling_failure(device: torch.device, vocab_size: int) -> str | None:
    """What the kernels draw is what the host's sampler draws, but for a few on the edge. None, or what differs."""
    generator = torch.Generator().manual_seed(0)
    params = [
        SamplingParams(temperature, top_k, top_p, min_p, seed)
        for temperature, top_k, top_p, min_p in SAMPLING
        for seed in range(ROWS_EACH)
    ]
    logits = 3 * torch.randn(len(params), vocab_size, generator=generator)
    choices = torch.tensor(choices_of([SampleSpec(each, [], []) for each in params], [0] * len(params)))
    choices = choices.double().t().contiguous()
    got = GpuOps(device, 1, 1).sample(logits.to(device), choices.to(device)).cpu()
    wrong = int((got != TorchOps().sample(logits, choices)).sum())
    return f"{wrong} of {len(params)} tokens differ" if wrong > MOST_ON_THE_EDGE * len(params) else None


def engine_tokens_are_equal(device: torch.device, new_tokens: int = NEW_TOKENS) -> str | None:
    """In float32 a tiny model gives the greedy tokens of transformers, prompts in chunks. None, or what differs."""
    with tempfile.TemporaryDirectory() as name:
        theirs = _write(Path(name), TINY, torch.float32).to(device)
        runner = _runner(Path(name), device, torch.float32)
        prompts = [[3 + (7 * place + row) % 190 for place in range(37 + row)] for row in range(2)]
        for prompt in prompts:
            with torch.inference_mode():
                expected = theirs.generate(
                    torch.tensor([prompt], device=device), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
                    eos_token_id=None,
                )[0, len(prompt) :].tolist()  # fmt: skip
            got = _generate(runner, prompt, new_tokens)
            if got != expected:
                return f"greedy tokens {got}, transformers {expected}"
    return None


def engine_is_as_close_as_transformers(device: torch.device) -> tuple[float, float]:
    """Mean distance of log-probabilities from float32: ours and that of transformers, both bfloat16, of an 8B shape."""
    prompt = [3 + (101 * place) % 31000 for place in range(300)]
    with tempfile.TemporaryDirectory() as name:
        exact_model = _write(Path(name), SHAPE_8B, torch.bfloat16).to(device)
        tokens = torch.tensor([prompt], device=device)

        def logprobs(model: Any) -> Tensor:
            with torch.inference_mode():
                result: Tensor = model(tokens).logits[0, -1].float().log_softmax(-1)
                return result

        theirs = logprobs(exact_model)
        exact = logprobs(exact_model.float())
        del exact_model
        ours = _last_logprobs(_runner(Path(name), device, torch.bfloat16), prompt).to(device)
    return float((ours - exact).abs().mean()), float((theirs - exact).abs().mean())


def _write(folder: Path, sizes: dict[str, Any], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.float32)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=1.5 * weight.shape[1] ** -0.5)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    return model


def _runner(folder: Path, device: torch.device, dtype: torch.dtype) -> DeviceRunner:
    loaded = _load(folder, device, dtype)
    runner = DeviceRunner(loaded, KVPool(BlockShape.of(loaded.config, PAGE, dtype), 64, device=device), max_rows=64)
    capture: Capture = cuda_capture(device) if device.type == "cuda" else lambda function: function
    runner.record_graphs((1, 2), 64 * PAGE, capture)
    return runner


def _load(folder: Path, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    if device.type == "cuda":
        return load_model(folder, str(dtype).removeprefix("torch."), device=device)
    config = ModelConfig.load(folder)
    ops = gpu_ops(config, PAGE, device)  # on the CPU: interpreted
    return LoadedModel(config, load_weights(folder, config, dtype, ops), ops, dtype, "interpreted")


def _generate(runner: DeviceRunner, prompt: list[int], count: int) -> list[int]:
    """The prompt in two chunks, then steps that are launched before the host knows the token of the one before."""
    blocks, spec = list(range(5, 5 + 8)), SampleSpec(SamplingParams(), prompt, [])

    def launch(tokens: list[int], start: int, index: int) -> Launched:
        sample = spec if start + len(tokens) >= len(prompt) else None
        planned = PlannedSequence("a", tokens, start, blocks, len(prompt), sample, 0, index)
        return runner.launch(StepPlan([planned], []))

    launch(prompt[:21], 0, 0).result()
    steps = [launch(prompt[21:], 21, 0)]
    steps += [launch([PENDING], len(prompt) + index - 1, index) for index in range(1, count)]
    return [step.result().sampled["a"][0].token_id for step in steps]


def _last_logprobs(runner: DeviceRunner, prompt: list[int]) -> Tensor:
    """Of all tokens after the prompt, whose last token comes in a step of its own, replayed."""
    vocab_size = SHAPE_8B["vocab_size"]
    blocks = list(range(1, 40))
    spec = SampleSpec(SamplingParams(logprobs=vocab_size), prompt, [])
    cut = len(prompt) - 1
    runner.run(StepPlan([PlannedSequence("a", prompt[:cut], 0, blocks, len(prompt), None)], []))
    found = runner.run(StepPlan([PlannedSequence("a", prompt[cut:], cut, blocks, len(prompt), spec)], []))
    logprobs = found.sampled["a"][0].logprobs
    assert logprobs is not None
    result = torch.empty(vocab_size)
    result[list(logprobs.alternative_ids)] = torch.tensor(logprobs.alternative_logprobs)
    return result
