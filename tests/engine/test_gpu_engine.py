"""The engine for a GPU, on the CPU: Triton's interpreter runs the kernels, and a recording calls its function again."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baton.config import EngineOptions
from baton.errors import ConfigurationError
from engine.gpu.decode_graphs import graph_sizes
from engine.gpu.device import HostCopy, choose_device
from engine.gpu.mirror import HostMirror
from engine.gpu.runner import DeviceRunner
from engine.loading import LoadedModel, gpu_ops
from engine.memory import kv_bytes
from engine.model_config import ModelConfig
from engine.plan import PENDING, PlannedSequence, SampleSpec, StepPlan, StepResult
from engine.pool import BlockShape, KVPool
from engine.requests import SamplingParams
from engine.runner import ModelRunner
from engine.weights import load_weights
from kernels.ops import TorchOps
from kvtransfer import outgoing
from tests.engine.tiny_models import VOCAB_SIZE, reference_generate, write_tiny_model
from tests.relay.pair import relay

CPU = torch.device("cpu")
PAGE = 16
PROMPT = [3 + (7 * place) % 190 for place in range(21)]


def load(folder, ops=None):
    config = ModelConfig.load(folder)
    ops = ops or gpu_ops(config, PAGE, CPU)
    weights = load_weights(folder, config, torch.float32, ops)
    return LoadedModel(config, weights, ops, torch.float32, "tiny")


def runner_of(loaded, graphs=(), num_blocks=12):
    pool = KVPool(BlockShape.of(loaded.config, PAGE, torch.float32), num_blocks)
    if isinstance(loaded.ops, TorchOps):
        return ModelRunner(loaded, pool)
    runner = DeviceRunner(loaded, pool, max_rows=64)
    if graphs:
        runner.record_graphs(graphs, num_blocks * PAGE, lambda function: function)
    return runner


def sequence(name, tokens, start, blocks, sample=None, index=0, num_drafts=0):
    return PlannedSequence(name, tokens, start, blocks, len(PROMPT), sample, num_drafts, index)


def greedy(prompt=PROMPT, **params):
    return SampleSpec(SamplingParams(**params), prompt, [])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama3", head_dim=64)


@pytest.fixture(scope="module")
def tiny(folder):
    return load(folder)


@pytest.mark.parametrize(
    ("family", "sizes", "graphs"),
    [
        ("llama3", {"head_dim": 64}, ()),
        ("llama-biased", {"head_dim": 64}, (2,)),
        ("llama-dynamic", {"head_dim": 64, "max_position_embeddings": 32}, ()),
        ("mistral", {"head_dim": 64}, (1, 2)),
        ("qwen2-window", {"hidden_size": 256}, (4,)),
        ("qwen3", {"head_dim": 64}, (1, 2)),
    ],
)
def test_gpu_kernels_give_the_tokens_of_transformers(tmp_path, family, sizes, graphs):
    """Two prompts side by side, in chunks, then single tokens, with and without padding."""
    folder = write_tiny_model(tmp_path, family, **sizes)
    prompts = [[3 + (5 * place + row) % 190 for place in range(41 + row)] for row in range(2)]
    blocks = [[1, 7, 3], [0, 4, 11]]
    runner = runner_of(load(folder), graphs)

    def step(parts, index):
        plan = StepPlan([
            PlannedSequence(
                str(row), tokens, start, blocks[row], len(prompts[row]), None if index is None else greedy(), 0,
                index or 0,
            )
            for row, (start, tokens) in enumerate(parts)
        ], [])  # fmt: skip
        sampled = runner.run(plan).sampled
        return [sampled[str(row)][0].token_id for row in range(2)] if sampled else []

    step([(0, prompt[:19]) for prompt in prompts], None)
    outputs = [step([(19, prompt[19:]) for prompt in prompts], 0)]
    outputs += [step([(len(prompt) + index - 1, [PENDING]) for prompt in prompts], index) for index in (1, 2)]
    expected = [each.tokens for each in reference_generate(folder, prompts, 3)]
    assert [list(tokens) for tokens in zip(*outputs, strict=True)] == expected
    assert runner.counters["decode_steps_without_graph"] == (0 if graphs else 2)


def test_a_token_can_be_used_before_the_host_has_seen_it(folder, tiny):
    expected = reference_generate(folder, [PROMPT], 4)[0].tokens
    runner = runner_of(tiny, (1, 2))
    launched = [runner.launch(StepPlan([sequence("a", PROMPT, 0, [4, 1], greedy())], []))]
    for step in range(3):
        plan = StepPlan([sequence("a", [PENDING], len(PROMPT) + step, [4, 1], greedy(), step + 1)], [])
        launched.append(runner.launch(plan))
    assert [each.result().sampled["a"][0].token_id for each in launched] == expected


def test_pending_tokens_find_their_own_row_when_the_batch_changes(folder, tiny):
    prompts, blocks = {"a": PROMPT, "b": PROMPT[::-1]}, {"a": [4, 1], "b": [2, 3]}
    expected = reference_generate(folder, list(prompts.values()), 3)
    runner = runner_of(tiny, (1, 2))
    runner.run(StepPlan([sequence(name, prompts[name], 0, blocks[name], greedy()) for name in "ab"], []))
    for index, order in ((1, "ba"), (2, "ab")):
        singles = [sequence(name, [PENDING], 20 + index, blocks[name], greedy(), index) for name in order]
        sampled = runner.run(StepPlan(singles, [])).sampled
        assert [sampled[name][0].token_id for name in "ab"] == [each.tokens[index] for each in expected]


def test_padding_of_a_graph_touches_no_block(tiny):
    runner = runner_of(tiny, (4,))
    assert not runner.pool.slabs.any()
    singles = [sequence(name, [5], 3, [block], greedy(), 1) for name, block in (("a", 2), ("b", 9), ("c", 6))]
    runner.run(StepPlan(singles, []))
    written = runner.pool.slabs.flatten(1).any(1).nonzero().flatten().tolist()
    assert written == [2, 6, 9]


def test_steps_that_no_graph_fits_are_counted_and_right(tiny):
    singles = [sequence(str(row), [5 + row], 0, [row], greedy(), 1) for row in range(3)]
    too_small, fitting = runner_of(tiny, (1, 2)), runner_of(tiny, (4,))
    assert too_small.run(StepPlan(singles, [])) == fitting.run(StepPlan(singles, []))
    assert [each.counters["decode_steps_without_graph"] for each in (too_small, fitting)] == [1, 0]


def test_graph_sizes_reach_the_largest_batch():
    assert graph_sizes(1) == (1, 2, 4)
    assert graph_sizes(5) == (1, 2, 4, 8)
    assert graph_sizes(64)[-3:] == (48, 56, 64)
    assert graph_sizes(1000)[-1] == 256


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.9, seed=5),
    SamplingParams(temperature=1.5, top_k=7, seed=2**63 + 11),
    SamplingParams(temperature=1.2, top_p=0.8, seed=3),
    SamplingParams(temperature=1.2, min_p=0.05, seed=4),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, seed=8, logprobs=3),
    SamplingParams(logprobs=0),
    SamplingParams(repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.3),
    SamplingParams(temperature=1.0, logit_bias=((17, 4.0), (20, -3.0)), seed=1, logprobs=2),
    SamplingParams(min_tokens=9, stop_token_ids=(16, 196)),
]


def test_every_way_to_sample_gives_what_the_host_sampler_gives(folder, tiny):
    """Side by side in one step, as prompts and as single tokens."""
    host = runner_of(load(folder, TorchOps()), num_blocks=40)
    device = runner_of(tiny, (16,), num_blocks=40)
    outputs = [17, 18, 17, 20]
    for tokens, start, index in ((PROMPT, 0, 3), ([17], 21, 4)):
        specs = [SampleSpec(params, PROMPT, outputs[:index]) for params in PARAMS]
        plan = StepPlan([
            sequence(str(row), tokens, start, [2 * row, 2 * row + 1], spec, index) for row, spec in enumerate(specs)
        ], [])  # fmt: skip
        ours, theirs = device.run(plan), host.run(plan)
        for name, (expected,) in theirs.sampled.items():
            (got,) = ours.sampled[name]
            assert got.token_id == expected.token_id, PARAMS[int(name)]
            assert (got.logprobs is None) == (expected.logprobs is None)
            if got.logprobs is not None:
                assert got.logprobs.alternative_ids == expected.logprobs.alternative_ids
                assert got.logprobs.chosen == pytest.approx(expected.logprobs.chosen, abs=1e-4)
                assert got.logprobs.alternative_logprobs == pytest.approx(
                    expected.logprobs.alternative_logprobs, abs=1e-4
                )  # fmt: skip


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, seed=3), PARAMS[7]])
def test_right_guesses_are_taken_and_the_stream_stays_the_same(tiny, params):
    spec = SampleSpec(params, PROMPT, [])
    runner = runner_of(tiny)
    plain = [runner.run(StepPlan([sequence("a", PROMPT, 0, [0, 1], spec)], [])).sampled["a"][0].token_id]
    for step in range(3):
        spec = SampleSpec(params, PROMPT, list(plain))
        plan = StepPlan([sequence("a", [plain[-1]], len(PROMPT) + step, [0, 1], spec, step + 1)], [])
        plain.append(runner.run(plan).sampled["a"][0].token_id)
    drafts = [plain[1], plain[2], (plain[3] + 1) % VOCAB_SIZE]
    spec = SampleSpec(params, PROMPT, plain[:1])
    guessing = sequence("a", [plain[0], *drafts], len(PROMPT), [0, 1], spec, 1, len(drafts))
    other = sequence("b", [8], 0, [5], greedy(), 1)
    sampled = runner.run(StepPlan([guessing, other], [])).sampled
    assert [each.token_id for each in sampled["a"]] == plain[1:4]
    assert len(sampled["b"]) == 1


def test_a_plan_of_copies_alone_runs_on_a_device(tiny):
    runner = runner_of(tiny)
    runner.pool.slabs[1] = 2.0
    assert runner.launch(StepPlan([], [(1, 2)])).result() == StepResult({})
    assert bool((runner.pool.slabs[2] == 2.0).all())


@pytest.mark.parametrize("num_blocks", [1, 2, 5])
def test_warming_up_a_device_fits_any_pool(tiny, num_blocks):
    runner_of(tiny, (1, 2), num_blocks).warm_up(20)


def test_a_mirror_copies_the_blocks_that_it_is_told_and_no_other():
    shape = BlockShape(num_layers=2, kv_heads=1, page_size=4, head_dim=8, dtype=torch.bfloat16)
    pool = KVPool(shape, 6)
    pool.slabs[:] = torch.arange(6).view(6, 1, 1, 1, 1, 1) + 1
    host = torch.zeros(6, shape.block_bytes, dtype=torch.uint8)
    mirror = HostMirror(pool, host)
    mirror.publish([4], range(1))
    assert host.view(torch.bfloat16).view(6, 2, -1).amax(2).tolist() == [[0, 0]] * 4 + [[5, 0], [0, 0]]
    assert mirror.counters["kv_blocks_to_host"] == 0
    mirror.publish([4], range(1, 2))
    mirror.publish([1, 2, 0])
    on_host = host.view(torch.bfloat16)
    assert on_host.amax(1).tolist() == [1, 2, 3, 0, 5, 0]
    host.view(torch.bfloat16)[:] = 9
    mirror.fetch([5, 3])
    assert pool.slabs.flatten(1).amax(1).tolist() == [1, 2, 3, 9, 5, 9]
    assert mirror.counters == {"kv_blocks_to_host": 4, "kv_blocks_to_device": 2}


OPTIONS = EngineOptions(dtype="float32", kv_memory="4MiB", max_batch_tokens=24, max_running=4)
PROMPTS = [[3 + (11 * place) % 190 for place in range(37)]]
PROMPTS.append([*PROMPTS[0][:32], 9, 8, 7])  # two blocks are those of the first
NEW_TOKENS = 3


async def handed_over(tiny, prompts, spoil=lambda pair: None):
    async with relay(tiny, prefill=OPTIONS, decode=OPTIONS) as pair:
        spoil(pair)
        outputs = [(await pair.generate(prompt, NEW_TOKENS, remote=True)).output for prompt in prompts]
        counters = {worker.name: worker.counters() for worker in (pair.prefill, pair.decode)}
        await pair.whole()
    return outputs, counters


@pytest.mark.parametrize("smallest_group", [outgoing.MIN_GROUP_BYTES, 1], ids=["whole blocks", "layer by layer"])
def test_a_handover_between_devices_gives_the_tokens_of_transformers(folder, tiny, smallest_group, monkeypatch):
    monkeypatch.setattr(outgoing, "MIN_GROUP_BYTES", smallest_group)
    outputs, counters = asyncio.run(handed_over(tiny, PROMPTS))
    assert outputs == [each.tokens for each in reference_generate(folder, PROMPTS, NEW_TOKENS)]
    assert counters["prefill"]["kv_blocks_to_host"] == 3 + 3
    assert counters["decode"]["kv_blocks_to_device"] == 3 + 1, "cached blocks are right on the device and nowhere else"
    assert counters["decode"]["local_prefill_fallbacks"] == 0


@pytest.mark.parametrize(("worker", "copy"), [("prefill", "publish"), ("decode", "fetch")])
def test_that_test_notices_a_copy_that_is_skipped(folder, tiny, monkeypatch, worker, copy):
    def spoil(pair):
        mirror = getattr(pair, worker).parts.engine._mirror
        whole = getattr(mirror, copy)
        monkeypatch.setattr(mirror, copy, lambda blocks, *layers: whole(blocks[1:], *layers))

    outputs, _ = asyncio.run(handed_over(tiny, PROMPTS[:1], spoil))
    assert outputs != [each.tokens for each in reference_generate(folder, PROMPTS[:1], NEW_TOKENS)]


def test_a_step_that_samples_nothing_is_waited_for_too(tiny, monkeypatch):
    """Or its blocks would be announced to peers before they are computed."""
    waits = []
    monkeypatch.setattr(HostCopy, "wait", lambda copy: waits.append(copy) or copy._host)
    launched = runner_of(tiny).launch(StepPlan([sequence("a", [1, 2], 0, [3])], []))
    assert not waits
    assert launched.result() == StepResult({})
    assert len(waits) == 1


def test_a_device_that_is_not_there_is_named():
    assert choose_device("cpu").type == "cpu"
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ConfigurationError, match="--device cpu"):
        choose_device("cuda")


def test_kv_memory_on_a_gpu_leaves_room_for_weights_and_its_mirror(monkeypatch):
    gib = 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 16 * gib)
    monkeypatch.setattr("engine.memory.host_bytes", lambda: 100 * gib)
    gpu = torch.device("cuda", 0)
    assert kv_bytes(gpu, 0.5) == (40 - 16 - 2) * gib
    assert kv_bytes(gpu, 1.0) == 40 * gib, "the host's share"
    assert kv_bytes(gpu, 0.1) == 0
    assert kv_bytes(CPU, 0.5) == gib // 2


def test_an_h100_compiles_each_kernel_once_whatever_the_step():
    """A form that the warm-up did not see would be compiled while requests wait: a second or more."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.hopper_steps"], cwd=Path(__file__).parents[2], capture_output=True,
        text=True, timeout=250, env={**os.environ, "TRITON_INTERPRET": "0"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    forms = {name: int(count) for name, count in (line.split() for line in done.stdout.splitlines())}
    assert forms.pop("_join_splits") <= 4, "one a power of two of splits; a mixed step may meet one no recording did"
    assert {"_attend_split", "_attend_tile_of_queries", "_rotate_and_store", "_rms_norm", "_pick"} <= forms.keys()
    assert set(forms.values()) == {1}
