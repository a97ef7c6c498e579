"""Deterministic mode: the logits of a request have the same bits whatever runs beside it and however it is cut."""

import argparse
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baton.config import EngineOptions, add_arguments, from_arguments, to_arguments
from baton.errors import ConfigurationError
from engine.engine import Engine
from engine.loading import LoadedModel, load_model
from engine.plan import PlannedSequence, SampleSpec, StepPlan
from engine.pool import BlockShape, KVPool
from engine.requests import EngineRequest, SamplingParams, TokenLogprobs
from engine.runner import ModelRunner
from tests.engine.tiny_models import write_tiny_model

PAGE, NUM_BLOCKS = 16, 640
VOCABULARY = 224
PROMPT_TOKENS, NEW_TOKENS = 90, 10
NATIVE_SIZES = {"vocab_size": VOCABULARY, "intermediate_size": 96, "head_dim": 32}
ODD_SIZES = {"vocab_size": 199, "intermediate_size": 112}
MODELS = {
    "llama3 float32": ("llama3", "float32", ODD_SIZES),
    "qwen2 with windows float32": ("qwen2-window", "float32", ODD_SIZES),
    "qwen3 bfloat16, torch": ("qwen3", "bfloat16", ODD_SIZES),
    "mistral with windows bfloat16, native": ("mistral", "bfloat16", NATIVE_SIZES),
    "qwen3 bfloat16, native": ("qwen3", "bfloat16", NATIVE_SIZES),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    family, dtype, sizes = MODELS[request.param]
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), family, **sizes)
    loaded = load_model(folder, dtype, deterministic=True)
    if "native" in request.param and "native" not in loaded.ops.name:
        pytest.skip("no native kernels on this machine")
    return loaded


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("model"), "llama3", **ODD_SIZES), "float32")


def text(length: int, seed: int = 0) -> list[int]:
    return random.Random(1000 * seed + length).choices(range(199), k=length)


TOKENS = text(PROMPT_TOKENS + NEW_TOKENS)


class Bench:
    """A runner whose steps the test plans, over a pool full of NaN."""

    def __init__(self, loaded: LoadedModel, seed: int = 0) -> None:
        pool = KVPool(BlockShape.of(loaded.config, PAGE, loaded.dtype), NUM_BLOCKS)
        pool.slabs.fill_(float("nan"))
        self._runner = ModelRunner(loaded, pool)
        self._forward = self._runner._model.forward
        self._runner._model.forward = self._watched  # type: ignore[method-assign]
        self._logits = torch.empty(0)
        self._free = random.Random(seed).sample(range(NUM_BLOCKS), NUM_BLOCKS)

    def _watched(self, *arguments):  # type: ignore[no-untyped-def]
        self._logits = self._forward(*arguments)
        return self._logits

    def blocks(self, length: int) -> list[int]:
        return [self._free.pop() for _ in range(-(-length // PAGE))]

    def step(self, *parts: tuple[Sequence[int], list[int], int, int]) -> list[torch.Tensor]:
        """Compute (tokens, blocks, start, end) each; returns the logits after the last token of each."""
        spec = SampleSpec(SamplingParams(), [], [])
        planned = [
            PlannedSequence(str(index), list(tokens[start:end]), start, blocks, PROMPT_TOKENS, spec)
            for index, (tokens, blocks, start, end) in enumerate(parts)
        ]
        self._runner.run(StepPlan(planned, []))
        return list(self._logits)

    def step_with_drafts(self, tokens: Sequence[int], blocks: list[int], start: int, end: int) -> torch.Tensor:
        """All tokens but the first are guesses; returns the logits after each token."""
        spec = SampleSpec(SamplingParams(), [], [])
        planned = PlannedSequence("a", list(tokens[start:end]), start, blocks, PROMPT_TOKENS, spec, end - start - 1)
        self._runner.run(StepPlan([planned], []))
        return self._logits


def alone(loaded: LoadedModel, chunk: int = PROMPT_TOKENS) -> torch.Tensor:
    """Logits after the prompt and after each new token, nobody beside it."""
    bench = Bench(loaded)
    blocks = bench.blocks(len(TOKENS))
    for start in range(0, PROMPT_TOKENS, chunk):
        (logits,) = bench.step((TOKENS, blocks, start, min(start + chunk, PROMPT_TOKENS)))
    return torch.stack([logits, *(bench.step((TOKENS, blocks, at, at + 1))[0] for at in range(PROMPT_TOKENS, 100))])


def among(loaded: LoadedModel, num_neighbours: int, chunk: int) -> torch.Tensor:
    """The same, while neighbours of random lengths join, prefill, decode and leave."""
    bench, chooser = Bench(loaded, seed=num_neighbours), random.Random(num_neighbours)
    blocks = bench.blocks(len(TOKENS))
    fresh = itertools.count()

    def neighbour() -> tuple[list[int], list[int], int]:
        length = chooser.choice([2, 9, 33, 64, 100, 150])
        return text(length, 1 + next(fresh)), bench.blocks(length), 0

    others = [neighbour() for _ in range(num_neighbours)]
    cuts = [*range(0, PROMPT_TOKENS, chunk), *range(PROMPT_TOKENS, len(TOKENS) + 1)]
    found = []
    for start, end in itertools.pairwise(cuts):
        parts = [(TOKENS, blocks, start, end)]
        for index, (tokens, own, at) in enumerate(others):
            stop = min(len(tokens), at + chooser.choice([1, 1, 1, 20]))
            parts.append((tokens, own, at, stop))
            others[index] = (tokens, own, stop)
            if stop == len(tokens):
                bench._free[:0] = own
                others[index] = neighbour()
        place = chooser.randrange(len(parts))
        parts[0], parts[place] = parts[place], parts[0]
        logits = bench.step(*parts)[place]
        if end >= PROMPT_TOKENS:
            found.append(logits)
    return torch.stack(found)


@pytest.mark.parametrize("num_neighbours", [1, 7, 32])
@pytest.mark.parametrize("chunk", [512, 37])
def test_neighbours_do_not_change_a_bit(model: LoadedModel, num_neighbours: int, chunk: int) -> None:
    assert torch.equal(among(model, num_neighbours, chunk), alone(model))


@pytest.mark.parametrize("chunk", [1, 16, 37, 512])
def test_how_the_prompt_is_cut_does_not_change_a_bit(model: LoadedModel, chunk: int) -> None:
    assert torch.equal(alone(model, chunk), alone(model))


def test_computing_a_stream_again_gives_the_bits_of_decoding_it(model: LoadedModel) -> None:
    """As the next attempt does after a failure: at every position."""
    bench = Bench(model)
    blocks = bench.blocks(len(TOKENS))
    for position in range(1, len(TOKENS) + 1):
        (decoded,) = bench.step((TOKENS, blocks, position - 1, position))
        again = Bench(model, seed=position)
        (prefilled,) = again.step((TOKENS, again.blocks(position), 0, position))
        assert torch.equal(decoded, prefilled), f"after {position} tokens"


def test_a_cached_prefix_gives_the_bits_of_computing_it(model: LoadedModel) -> None:
    """Its blocks were computed in other company, and by another request."""
    bench, expected = Bench(model), alone(model)
    shared, other = bench.blocks(64), bench.blocks(150)
    bench.step((TOKENS, shared, 0, 64), (text(150, 5), other, 0, 150))
    for cached in (16, 48, 64):
        blocks = shared[: cached // PAGE] + bench.blocks(len(TOKENS) - cached)
        (logits,) = bench.step((TOKENS, blocks, cached, PROMPT_TOKENS))
        assert torch.equal(logits, expected[0])


def test_verifying_guesses_gives_the_bits_of_going_one_by_one(model: LoadedModel) -> None:
    expected = alone(model)
    for num_drafts in (1, 4, 9):
        bench = Bench(model)
        blocks = bench.blocks(len(TOKENS))
        bench.step((TOKENS, blocks, 0, PROMPT_TOKENS))
        verified = bench.step_with_drafts(TOKENS, blocks, PROMPT_TOKENS, PROMPT_TOKENS + num_drafts + 1)
        assert torch.equal(verified, expected[1 : num_drafts + 2])


def test_ordinary_float32_depends_on_neighbours_chunks_and_attempts(ordinary: LoadedModel) -> None:
    """The tests above can fail: without the mode these bits differ."""
    expected = alone(ordinary)
    assert not torch.equal(among(ordinary, 7, 512), expected)
    assert not torch.equal(alone(ordinary, 1), expected)
    torch.testing.assert_close(alone(ordinary, 1), expected, atol=1e-3, rtol=1e-3)


# -- The engine as a whole ---------------------------------------------------------------------------------------------


def generate(
    loaded: LoadedModel,
    requests: list[EngineRequest],
    num_blocks: int = 200,
    max_batch_tokens: int = 512,
    preempts: bool = False,
    watched: int = 0,
) -> list[tuple[int, TokenLogprobs | None]]:
    """What the watched request gets, with the others beside it as the scheduler sees fit."""
    runner = ModelRunner(loaded, KVPool(BlockShape.of(loaded.config, PAGE, loaded.dtype), num_blocks))
    engine = Engine(
        runner, num_blocks=num_blocks, page_size=PAGE, max_batch_tokens=max_batch_tokens, max_running=16,
        max_model_tokens=512, shareable_tokens=loaded.config.shareable_tokens,
    )  # fmt: skip
    for request in requests:
        engine.add(request)
    found = []
    while engine.has_work():
        mine = [token for token in engine.step().tokens if token.request_id == requests[watched].id]
        found += [(token.token_id, token.logprobs) for token in mine]
    engine.check_idle()
    assert bool(engine.counters["preemptions"]) == preempts, "or the test would show less than it says"
    return found


def test_streams_have_the_same_bits_in_any_engine(model: LoadedModel) -> None:
    """Whatever the batch, the chunks, preemption for want of blocks, and the attempt."""
    sampling = SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=40, logprobs=5)
    first, *others = (
        EngineRequest(f"r{index}", tuple(text(60 - index, index)), 60 - index, sampling, b"root") for index in range(13)
    )
    expected = generate(model, [first])
    assert len(expected) == 40
    assert generate(model, [first, *others]) == expected
    assert generate(model, [first, *others], max_batch_tokens=19) == expected
    # The last to come is the first to lose its blocks; it is computed again.
    assert generate(model, [*others, first], 60, preempts=True, watched=12) == expected
    for delivered in (1, 17, 39):
        tokens = (*first.token_ids, *(token for token, _ in expected[:delivered]))
        assert generate(model, [replace(first, token_ids=tokens), *others]) == expected[delivered:]


# -- The switch --------------------------------------------------------------------------------------------------------


def test_workers_whose_bits_could_differ_do_not_look_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal fingerprints exchange KV; the coordinator refuses a worker with another one."""
    folder = write_tiny_model(tmp_path, "llama3")
    fingerprint = load_model(folder, deterministic=True).fingerprint
    assert fingerprint == load_model(folder, deterministic=True).fingerprint
    assert fingerprint != load_model(folder).fingerprint
    assert not load_model(folder, deterministic=True).weights_fingerprint, "KV of another dtype never will do"
    assert fingerprint != load_model(folder, page_size=32, deterministic=True).fingerprint
    monkeypatch.setattr("platform.libc_ver", lambda: ("another libc", "1"))
    assert fingerprint != load_model(folder, deterministic=True).fingerprint


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="dynamic rotary scaling"):
        load_model(write_tiny_model(tmp_path, "llama-dynamic"), deterministic=True)


def test_the_mode_is_a_switch_that_workers_are_started_with() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, EngineOptions)
    assert not from_arguments(EngineOptions, parser.parse_args([])).deterministic
    options = from_arguments(EngineOptions, parser.parse_args(["--deterministic"]))
    assert options.deterministic
    assert to_arguments(options) == ["--deterministic"]
