"""What surrounds the arithmetic: pool memory, loading, warm-up, bfloat16."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.loading import load_model
from engine.model_config import ModelConfig
from engine.plan import PlannedSequence, SampleSpec, StepPlan, StepResult
from engine.pool import BlockShape, KVPool
from engine.requests import SamplingParams
from engine.runner import ModelRunner
from tests.engine.tiny_models import FAMILIES, VOCAB_SIZE, edit_config, write_tiny_model

SHAPE = BlockShape(num_layers=2, kv_heads=3, page_size=4, head_dim=8, dtype=torch.bfloat16)


def runner_of(folder, dtype="auto", num_blocks=16):
    loaded = load_model(folder, dtype)
    return ModelRunner(loaded, KVPool(BlockShape.of(loaded.config, 16, loaded.dtype), num_blocks))


def logprobs_of(runner, prompt):
    """Of all tokens, by id, after the prompt."""
    spec = SampleSpec(SamplingParams(logprobs=VOCAB_SIZE), prompt, [])
    plan = StepPlan([PlannedSequence("a", prompt, 0, [3, 1, 2], len(prompt), spec)], [])
    found = runner.run(plan).sampled["a"][0].logprobs
    result = torch.empty(VOCAB_SIZE)
    result[list(found.alternative_ids)] = torch.tensor(found.alternative_logprobs)
    return result


def test_a_block_is_one_run_of_bytes_in_the_documented_order():
    assert SHAPE.block_bytes == 2 * 3 * 2 * 4 * 8 * 2
    memory = bytearray(5 * SHAPE.block_bytes + 7)
    pool = KVPool(SHAPE, 5, memory)
    pool.slabs[2, 1, 0, 1, 3, 7] = 1.0  # block 2, layer 1, head 0, value, slot 3, dimension 7
    numbers = torch.frombuffer(memory[: 5 * SHAPE.block_bytes], dtype=torch.bfloat16)
    assert numbers.nonzero().tolist() == [[2 * 384 + 1 * 192 + 0 * 64 + 1 * 32 + 3 * 8 + 7]]


def test_a_pool_refuses_memory_that_is_too_small():
    with pytest.raises(ValueError, match=f"take {5 * SHAPE.block_bytes} bytes"):
        KVPool(SHAPE, 5, bytearray(5 * SHAPE.block_bytes - 1))


def test_copies_happen_in_the_order_given():
    pool = KVPool(SHAPE, 4)
    pool.slabs[0] = 1.0
    pool.copy_blocks([(0, 1), (1, 2)])
    assert [float(block.mean()) for block in pool.slabs] == [1, 1, 1, 0]


@pytest.mark.parametrize("num_blocks", [1, 2, 16])
def test_warming_up_fits_any_pool(tmp_path, num_blocks):
    runner_of(write_tiny_model(tmp_path, "llama2"), num_blocks=num_blocks).warm_up(64)


def test_a_plan_of_copies_alone_runs(tmp_path):
    runner = runner_of(write_tiny_model(tmp_path, "llama2"))
    runner.pool.slabs[1] = 2.0
    assert runner.run(StepPlan([], [(1, 2)])) == StepResult({})
    assert bool((runner.pool.slabs[2] == 2.0).all())


def test_a_step_without_sampling_returns_nothing_and_leaves_kv(tmp_path):
    runner = runner_of(write_tiny_model(tmp_path, "llama2"))
    assert runner.run(StepPlan([PlannedSequence("a", [1, 2, 3], 0, [5], 9, None)], [])).sampled == {}
    assert bool(runner.pool.slabs[5, :, :, :, :3].all())
    assert not bool(runner.pool.slabs[5, :, :, :, 3:].any())


def test_bfloat16_models_load_as_bfloat16(tmp_path):
    folder = write_tiny_model(tmp_path, "qwen3", dtype=torch.bfloat16)
    loaded = load_model(folder)
    assert loaded.dtype == torch.bfloat16
    assert loaded.weights.layers[0].qkv.data.dtype == torch.bfloat16
    assert loaded.fingerprint != load_model(folder, "float32").fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(tmp_path, family):
    folder = write_tiny_model(tmp_path, family)
    prompt = list(range(3, 43))
    with torch.inference_mode():
        exact, theirs = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(torch.tensor([prompt]))
            .logits[0, -1]
            .float()
            .log_softmax(-1)
            for dtype in (torch.float32, torch.bfloat16)
        )
    ours = logprobs_of(runner_of(folder, "bfloat16"), prompt)
    assert float((ours - exact).abs().mean()) < 1.5 * float((theirs - exact).abs().mean())


def test_null_means_absent_in_config(tmp_path):
    folder = write_tiny_model(tmp_path, "llama2")
    before = ModelConfig.load(folder)
    edit_config(folder, rope_scaling=None, mlp_bias=None, head_dim=None, rms_norm_eps=None, sliding_window=None)
    assert ModelConfig.load(folder) == before


NATIVE_SIZES = {"vocab_size": 224, "intermediate_size": 96, "head_dim": 32}


@pytest.mark.parametrize(
    "family", ["llama3", "llama-biased", "llama-tied", "mistral", "qwen2", "qwen2-window", "qwen3"]
)
def test_native_kernels_are_as_close_to_float32_as_transformers_is(tmp_path, family):
    sizes = NATIVE_SIZES if family != "qwen2" else NATIVE_SIZES | {"hidden_size": 128}
    folder = write_tiny_model(tmp_path, family, **sizes)
    loaded = load_model(folder, "bfloat16")
    if loaded.ops.name == "torch":
        pytest.skip("no native kernels on this machine")
    prompts = [[3 + (7 * row + column) % 200 for column in range(43 + row)] for row in range(3)]
    ours, theirs = [], []
    exact_model, their_model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    for prompt in prompts:
        with torch.inference_mode():
            exact = exact_model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            theirs.append((their_model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1) - exact).abs())
        ours.append((decoded_logprobs(loaded, prompt) - exact).abs())
    assert float(torch.stack(ours).mean()) < 1.5 * float(torch.stack(theirs).mean())


def decoded_logprobs(loaded, prompt):
    """After a prefill of all but the last three tokens, and decode steps for those."""
    runner = ModelRunner(loaded, KVPool(BlockShape.of(loaded.config, 16, loaded.dtype), 16))
    size = loaded.config.vocab_size
    spec = SampleSpec(SamplingParams(logprobs=size), prompt, [])
    for start, end in ((0, len(prompt) - 3), *((at, at + 1) for at in range(len(prompt) - 3, len(prompt)))):
        plan = StepPlan([PlannedSequence("a", prompt[start:end], start, [3, 1, 2, 7], len(prompt), spec)], [])
        found = runner.run(plan).sampled["a"][0].logprobs
    result = torch.empty(size)
    result[list(found.alternative_ids)] = torch.tensor(found.alternative_logprobs)
    return result
