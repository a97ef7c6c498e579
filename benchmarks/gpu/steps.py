"""Steps of a Llama-3-8B with random weights, launched as the engine launches them, beside the GPU's limits."""

import time

import torch
from torch import Tensor

from benchmarks.gpu.measuring import ROUNDS, Budget
from benchmarks.report import Report
from engine.gpu.decode_graphs import cuda_capture, graph_sizes
from engine.gpu.runner import DeviceRunner
from engine.loading import LoadedModel, gpu_ops
from engine.model_config import parse_config
from engine.plan import PENDING, PlannedSequence, SampleSpec, StepPlan
from engine.pool import BlockShape, KVPool
from engine.requests import SamplingParams
from engine.weights import LayerWeights, Weights
from kernels.ops import Matrix

PAGE, MAX_TOKENS, MAX_BATCH = 16, 8192 + 256, 64
POOL_TOKENS = MAX_BATCH * 1280
STEPS = 20
DECODE_GOAL, PREFILL_GOAL = "<= 1.15", ">= 0.65"
PREFILL_TOKENS = 8192
RESERVE_S = 20.0
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": MAX_TOKENS, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def measure(report: Report, bandwidth: float, matmul_rate: float, budget: Budget, batches: tuple[int, ...]) -> None:
    if budget.left < 2 * RESERVE_S:
        report.note("decode steps and prefill of the 8B shape: no time left")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    loaded, read_bytes, multiplied = random_8b(device)
    shape = BlockShape.of(loaded.config, PAGE, loaded.dtype)
    runner = DeviceRunner(loaded, KVPool(shape, POOL_TOKENS // PAGE, device=device), max_rows=MAX_BATCH)
    runner.record_graphs(graph_sizes(MAX_BATCH), MAX_TOKENS, cuda_capture(device))
    runner.warm_up(PREFILL_TOKENS)
    for batch in batches:
        for context in (1024, 8192):
            if batch * (context + STEPS * (ROUNDS + 1)) > POOL_TOKENS:
                continue
            took = _decode_step_s(runner, batch, context)
            limit = (read_bytes + batch * context * shape.block_bytes / PAGE) / bandwidth
            report.row(
                f"decode step, 8B shape, {batch} x {context}", took * 1e3, "ms", "time to read weights and KV",
                took / limit, DECODE_GOAL,
            )  # fmt: skip
    report.row("decode steps without a graph", runner.counters["decode_steps_without_graph"], "steps")
    took = _prefill_s(runner)
    heads, head_dim = loaded.config.num_heads, loaded.config.head_dim
    attention = loaded.config.num_layers * 4 * heads * head_dim * PREFILL_TOKENS * (PREFILL_TOKENS + 1) / 2
    rate = (2 * multiplied * PREFILL_TOKENS + attention) / took
    report.row(
        f"prefill, 8B shape, {PREFILL_TOKENS} tokens", rate / 1e12, "TFLOP/s", "bf16 matrix product",
        rate / matmul_rate, PREFILL_GOAL,
    )  # fmt: skip
    report.row("  the same", PREFILL_TOKENS / took, "tokens/s")


def random_8b(device: torch.device) -> tuple[LoadedModel, int, int]:
    """The model; bytes that a decode step reads of it; weights that each token of a prompt is multiplied with."""
    config = parse_config(dict(CONFIG))
    hidden, ffn, head_dim = config.hidden_size, config.intermediate_size, config.head_dim

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=torch.bfloat16, device=device).mul_(columns**-0.5)

    def matrix(rows: int, columns: int) -> Matrix:
        return Matrix(random(rows, columns), None, rows, columns)

    ones = torch.ones(hidden, dtype=torch.bfloat16, device=device)
    layers = tuple(
        LayerWeights(
            ones, matrix((config.num_heads + 2 * config.num_kv_heads) * head_dim, hidden), None,
            matrix(hidden, config.num_heads * head_dim), ones, matrix(2 * ffn, hidden), matrix(hidden, ffn),
        )
        for _ in range(config.num_layers)
    )  # fmt: skip
    head = matrix(config.vocab_size, hidden)
    weights = Weights(random(config.vocab_size, hidden), layers, ones, head)
    multiplied = sum(
        each.data.numel() for layer in layers for each in (layer.qkv, layer.output, layer.gate_up, layer.down)
    )  # fmt: skip
    loaded = LoadedModel(config, weights, gpu_ops(config, PAGE, device), torch.bfloat16, "random 8B shape")
    return loaded, 2 * (multiplied + head.data.numel()), multiplied


def _decode_step_s(runner: DeviceRunner, batch: int, context: int) -> float:
    """Of steps in a row, each launched before the one before is waited for: the best of a few rounds."""
    per_sequence = -(-(context + STEPS * (ROUNDS + 1)) // PAGE)
    blocks = [list(range(row * per_sequence, (row + 1) * per_sequence)) for row in range(batch)]
    spec = SampleSpec(SamplingParams(), [], [])

    def plan(start: int, token: int) -> StepPlan:
        return StepPlan([
            PlannedSequence(str(row), [token], start, blocks[row], context, spec, 0, 1) for row in range(batch)
        ], [])  # fmt: skip

    start, best = context, float("inf")
    runner.run(plan(start, 5))
    for _ in range(ROUNDS):
        flight = runner.launch(plan(start + 1, PENDING))
        began = time.perf_counter()
        for step in range(STEPS):
            following = runner.launch(plan(start + 2 + step, PENDING))
            flight.result()
            flight = following
        flight.result()
        # The first of these was launched before the clock began and ended after it.
        best = min(best, (time.perf_counter() - began) / (STEPS + 1))
        start += STEPS
    return best


def _prefill_s(runner: DeviceRunner) -> float:
    blocks, spec = list(range(PREFILL_TOKENS // PAGE)), SampleSpec(SamplingParams(), [], [])
    tokens = [3 + (7 * place) % 100000 for place in range(PREFILL_TOKENS)]
    plan = StepPlan([PlannedSequence("p", tokens, 0, blocks, PREFILL_TOKENS, spec)], [])
    best = float("inf")
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        runner.run(plan)
        best = min(best, time.perf_counter() - began)
    return best
