"""Speculation never changes a stream: the same tokens as without it, whoever guesses and whatever else happens."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.sampler
from baton.block_names import root_name
from cli.model import DEMO_FOLDER
from engine.engine import Engine
from engine.loading import load_model
from engine.plan import Drafter, PlannedSequence, SampleSpec, StepPlan
from engine.pool import BlockShape, KVPool
from engine.requests import EndReason, EngineRequest, SamplingParams, TokenOutput
from engine.runner import ModelRunner
from engine.speculation.draft_model import DraftModel
from engine.speculation.ngram import NgramGuesser
from engine.speculation.policy import Policy
from engine.speculation.speculator import Guesser, Speculator
from tests.engine.tiny_models import VOCAB_SIZE, write_tiny_model

PAGE = 8
GUESSERS = ("ngram", "same model", "similar model", "other model")


class Eager(Policy):
    """Guesses whatever can be guessed, so that a test does not depend on the clock."""

    def choose(self, num_sequences: int, reach: dict[str, int]) -> dict[str, int]:
        return reach


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, and models that guess what it says: always right, mostly, hardly ever."""
    base = tmp_path_factory.mktemp("models")
    target = write_tiny_model(base / "target", "llama3")
    return {
        "target": target,
        "same model": target,
        "similar model": disturbed(target, base / "similar", 0.03),
        "other model": write_tiny_model(base / "other", "qwen3", seed=9),
    }


def disturbed(source: Path, folder: Path, amount: float) -> Path:
    """The model with noise on its weights, as a fraction of their spread."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: tensor + amount * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def model_runner(folder: Path, num_blocks: int) -> ModelRunner:
    loaded = load_model(folder, "float32")
    return ModelRunner(loaded, KVPool(BlockShape.of(loaded.config, PAGE, loaded.dtype), num_blocks))


def guesser_of(kind: str, folders: dict[str, Path], num_blocks: int = 400) -> Guesser:
    if kind == "ngram":
        return NgramGuesser()
    runner = model_runner(folders[kind], num_blocks)
    return DraftModel(runner, num_blocks=num_blocks, page_size=PAGE, context_tokens=1024)


@dataclass
class Serving:
    """An engine, and everything it said."""

    folder: Path
    drafter: Drafter | None = None
    num_blocks: int = 400
    max_batch_tokens: int = 128
    tokens: dict[str, list[TokenOutput]] = field(default_factory=dict)
    reasons: dict[str, EndReason] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.engine = Engine(
            model_runner(self.folder, self.num_blocks), num_blocks=self.num_blocks, page_size=PAGE,
            max_batch_tokens=self.max_batch_tokens, max_running=32, max_model_tokens=600,
            shareable_tokens=lambda _: 1 << 40, drafter=self.drafter,
        )  # fmt: skip

    def run(self, requests: list[EngineRequest]) -> None:
        for request in requests:
            self.engine.add(request)
        while self.engine.has_work():
            self.step()

    def step(self) -> None:
        output = self.engine.step()
        for token in output.tokens:
            said = self.tokens.setdefault(token.request_id, [])
            assert not said or said[-1].index + 1 == token.index
            said.append(token)
        self.reasons |= {ended.request_id: ended.reason for ended in output.ended}
        self.engine.check_idle()

    def ids(self, request_id: str) -> list[int]:
        return [token.token_id for token in self.tokens[request_id]]


SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=40),
    "seeded": SamplingParams(max_tokens=40, temperature=0.8, seed=7),
    "cool": SamplingParams(max_tokens=40, temperature=0.3, seed=11, top_p=0.9),
    "penalties": SamplingParams(
        max_tokens=40, temperature=0.6, seed=3, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.2
    ),
    "greedy penalties": SamplingParams(max_tokens=40, repetition_penalty=1.1, frequency_penalty=0.3),
    "min_p and top_k": SamplingParams(max_tokens=40, temperature=1.0, seed=5, min_p=0.05, top_k=20),
    "logprobs": SamplingParams(max_tokens=30, logprobs=3),
    "sampled logprobs": SamplingParams(max_tokens=30, temperature=0.7, seed=2, logprobs=2),
    "bias": SamplingParams(max_tokens=30, logit_bias=((5, 4.0), (6, -9.0))),
    "few words": SamplingParams(max_tokens=60, temperature=0.8, seed=6, logit_bias=((5, 30.0), (9, 30.0), (17, 30.0))),
    "stop": SamplingParams(max_tokens=40, temperature=0.5, seed=4, stop_token_ids=tuple(range(0, 60, 4)), min_tokens=6),
    "greedy stop": SamplingParams(max_tokens=40, stop_token_ids=tuple(range(1, 199, 5)), min_tokens=3),
}


def prompts() -> list[list[int]]:
    """One for each sampling: half of them quote themselves."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for number in range(len(SAMPLINGS)):
        own: list[int] = torch.randint(3, VOCAB_SIZE, (11 + 5 * number,), generator=generator).tolist()
        result.append(own * 3 if number % 2 else own)
    return result


def requests_of(suffix: str = "") -> list[EngineRequest]:
    return [
        EngineRequest(name + suffix, tuple(prompt), len(prompt), sampling, root_name("model"))
        for (name, sampling), prompt in zip(SAMPLINGS.items(), prompts(), strict=True)
    ]


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path]) -> Serving:
    serving = Serving(folders["target"])
    serving.run(requests_of())
    return serving


def assert_same(serving: Serving, plain: Serving, suffix: str = "") -> None:
    for name in SAMPLINGS:
        ours, theirs = serving.tokens[name + suffix], plain.tokens[name]
        assert [token.token_id for token in ours] == [token.token_id for token in theirs], name
        assert serving.reasons[name + suffix] == plain.reasons[name]
        for our, their in zip(ours, theirs, strict=True):
            assert (our.logprobs is None) == (their.logprobs is None)
            if our.logprobs and their.logprobs:
                assert our.logprobs.alternative_ids == their.logprobs.alternative_ids
                assert our.logprobs.chosen == pytest.approx(their.logprobs.chosen, abs=1e-4)


def assert_some_were_right(serving: Serving, kind: str) -> None:
    made, right = (serving.engine.counters[name] for name in ("draft_tokens", "draft_tokens_accepted"))
    assert made > 0
    assert right <= made
    if kind == "same model":
        assert right > 0.9 * made, "common random numbers make equal models agree, also with a temperature"
    elif kind == "similar model":
        assert 0.2 * made < right < 0.98 * made
    elif kind == "other model":
        assert right < 0.5 * made


@pytest.mark.parametrize("kind", GUESSERS)
def test_streams_are_those_without_speculation(kind: str, folders: dict[str, Path], plain: Serving) -> None:
    serving = Serving(folders["target"], Speculator(guesser_of(kind, folders), Eager(32), 5))
    serving.run(requests_of())
    assert_same(serving, plain)
    assert_some_were_right(serving, kind)


@pytest.mark.parametrize("kind", GUESSERS)
def test_also_when_requests_are_preempted(kind: str, folders: dict[str, Path], plain: Serving) -> None:
    serving = Serving(folders["target"], Speculator(guesser_of(kind, folders), Eager(32), 5), num_blocks=60)
    serving.run(requests_of())
    assert serving.engine.counters["preemptions"] > 0
    assert_same(serving, plain)
    assert_some_were_right(serving, kind)


@pytest.mark.parametrize("kind", GUESSERS)
def test_also_when_prompts_come_from_the_prefix_cache(kind: str, folders: dict[str, Path], plain: Serving) -> None:
    serving = Serving(folders["target"], Speculator(guesser_of(kind, folders), Eager(32), 5))
    for suffix in ("", " again"):
        serving.run(requests_of(suffix))
        assert_same(serving, plain, suffix)
    assert serving.engine.counters["prompt_tokens_cached"] > 100


@pytest.mark.parametrize("kind", GUESSERS)
@pytest.mark.parametrize("num_delivered", [1, 7])
def test_also_when_an_attempt_goes_on_after_delivered_tokens(
    kind: str, num_delivered: int, folders: dict[str, Path], plain: Serving
) -> None:
    serving = Serving(folders["target"], Speculator(guesser_of(kind, folders), Eager(32), 5))
    going_on = [request for request in requests_of() if len(plain.tokens[request.id]) > num_delivered]
    assert len(going_on) > 6
    serving.run(
        [
            replace(request, token_ids=(*request.token_ids, *plain.ids(request.id)[:num_delivered]))
            for request in going_on
        ]
    )
    for request in going_on:
        assert serving.ids(request.id) == plain.ids(request.id)[num_delivered:]
    assert_some_were_right(serving, kind)


def test_the_measuring_policy_changes_no_stream_either(folders: dict[str, Path], plain: Serving) -> None:
    for kind in GUESSERS:
        serving = Serving(folders["target"], Speculator(guesser_of(kind, folders), Policy(32), 8))
        serving.run(requests_of())
        assert_same(serving, plain)


@pytest.mark.parametrize("kind", ["ngram", "demo as its own draft"])
def test_the_demo_model_says_the_same(kind: str) -> None:
    folders = {"target": DEMO_FOLDER, "demo as its own draft": DEMO_FOLDER}
    prompt = tuple(range(40, 60)) * 2
    requests = [
        EngineRequest(name, prompt, len(prompt), replace(params, max_tokens=32), root_name("model"))
        for name, params in SAMPLINGS.items()
    ]
    plain = Serving(DEMO_FOLDER)
    plain.run(requests)
    serving = Serving(DEMO_FOLDER, Speculator(guesser_of(kind, folders), Eager(32), 5))
    serving.run(requests)
    assert_same(serving, plain)
    assert serving.engine.counters["draft_tokens_accepted"] > 0


@pytest.mark.parametrize("kind", ["ngram", "similar model"])
def test_nothing_is_left_of_a_request_that_ended_or_was_aborted(kind: str, folders: dict[str, Path]) -> None:
    guesser, policy = guesser_of(kind, folders), Eager(32)
    serving = Serving(folders["target"], Speculator(guesser, policy, 5))
    requests = requests_of()
    for number, request in enumerate(requests):
        serving.engine.add(request)
        for _ in range(number):
            serving.step()
        if number % 3 == 0:
            serving.engine.abort(request.id)
    while serving.engine.has_work():
        serving.step()
    assert len(serving.reasons) == len(requests)
    counts = serving.engine.load().blocks
    assert counts.free + counts.cached == counts.total
    assert not policy._records
    if isinstance(guesser, NgramGuesser):
        assert not guesser._indexes
    if isinstance(guesser, DraftModel):
        guesser.allocator.check()
        assert guesser.allocator.counts().free == guesser.allocator.num_blocks


# -- The distribution of samples ---------------------------------------------------------------------------------

SMALL_VOCABULARY, NUM_SEEDS = 6, 1500


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("small")
    return {
        name: write_tiny_model(base / name, "llama2", seed, vocab_size=SMALL_VOCABULARY, hidden_size=32)
        for seed, name in enumerate(("target", "other model"))
    }


def true_distribution(folder: Path, prompt: list[int], length: int) -> dict[tuple[int, ...], float]:
    """Of the first `length` sampled tokens together, at temperature 1, from the model's own probabilities."""
    runner = model_runner(folder, 8)

    def probabilities(outputs: tuple[int, ...]) -> dict[int, float]:
        tokens = [*prompt, *outputs]
        spec = SampleSpec(SamplingParams(logprobs=SMALL_VOCABULARY), prompt, list(outputs))
        plan = StepPlan([PlannedSequence("p", tokens, 0, [0, 1, 2], len(prompt), spec)], [])
        found = runner.run(plan).sampled["p"][0].logprobs
        assert found is not None
        return dict(zip(found.alternative_ids, torch.tensor(found.alternative_logprobs).exp().tolist(), strict=True))

    result = {(): 1.0}
    for _ in range(length):
        result = {
            (*outputs, token): whole * part
            for outputs, whole in result.items()
            for token, part in probabilities(outputs).items()
        }
    return result


def chi_square_excess(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """How many standard deviations the statistic lies above its mean (Wilson and Hilferty's cube root, 1931).

    Outcomes that are expected fewer than 5 times are one cell.
    """
    total = sum(counts.values())
    cells: list[tuple[float, float]] = []
    rest = [0.0, 0.0]
    for outcome, probability in expected.items():
        if probability * total >= 5:
            cells.append((counts[outcome], probability * total))
        else:
            rest = [rest[0] + counts[outcome], rest[1] + probability * total]
    if rest[1] >= 5:
        cells.append((rest[0], rest[1]))
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    freedom = len(cells) - 1
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


def request_of(prompt: list[int], seed: int) -> EngineRequest:
    sampling = SamplingParams(max_tokens=4, temperature=1.0, seed=seed)
    return EngineRequest(f"s{seed}", tuple(prompt), len(prompt), sampling, root_name("model"))


def sample_many(small: dict[str, Path], prompt: list[int]) -> tuple[Counter[tuple[int, ...]], Serving]:
    """The first three tokens of streams that differ in their seed alone."""
    serving = Serving(small["target"], Speculator(guesser_of("other model", small), Eager(32), 3), max_batch_tokens=256)
    for first in range(0, NUM_SEEDS, 500):
        serving.run([request_of(prompt, seed) for seed in range(first, first + 500)])
    return Counter(tuple(serving.ids(f"s{seed}")[:3]) for seed in range(NUM_SEEDS)), serving


def accept_everything(tokens: list[int], drafts: list[int]) -> int:
    """The bug that the test must see."""
    return len(drafts)


@pytest.mark.parametrize("planted", [None, accept_everything])
def test_samples_have_the_distribution_of_the_model(
    planted: Callable[..., int] | None, small: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if planted:
        monkeypatch.setattr(engine.sampler, "num_right", planted)
    prompt = [1, 2, 3, 4]
    expected = true_distribution(small["target"], prompt, 3)
    assert sum(expected.values()) == pytest.approx(1)
    assert len(expected) == len(list(product(range(SMALL_VOCABULARY), repeat=3)))
    counts, serving = sample_many(small, prompt)
    right, made = (serving.engine.counters[name] for name in ("draft_tokens_accepted", "draft_tokens"))
    excess = chi_square_excess(counts, expected)
    if planted:
        assert right == made
        assert excess > 20, "the test sees what it is there for"
    else:
        assert 0.1 * made < right < 0.9 * made, "some guesses are accepted and some are not"
        assert abs(excess) < 4
