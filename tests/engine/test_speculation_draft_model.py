"""What the draft model keeps of requests: right KV behind every guess, a whole pool, and clear refusals."""

import json
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.config import EngineOptions, validate
from baton.errors import ConfigurationError
from cli.assembly import assemble
from engine.loading import load_model
from engine.plan import DraftRequest, OnLayer, Sampled, SampleSpec, StepPlan, StepResult
from engine.requests import SamplingParams
from engine.speculation.draft_model import MIN_CHUNK, DraftModel, check_same_vocabulary
from tests.engine.tiny_models import write_tiny_model

PAGE, VOCABULARY, CONTEXT = 4, 7, 90


@dataclass
class Request:
    prompt: list[int]
    outputs: list[int]

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.outputs

    def draft_request(self, request_id: str) -> DraftRequest:
        spec = SampleSpec(SamplingParams(seed=3), self.prompt, self.outputs)
        return DraftRequest(request_id, self.tokens, len(self.prompt), spec, max_drafts=6)


@dataclass
class NumberRunner:
    """The KV of a position is a number chained over all tokens up to it. Refuses plans that read another's."""

    requests: dict[str, Request] = field(default_factory=dict)
    kv: dict[tuple[int, int], int] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)

    def run(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult:
        self.plans.append(plan)
        blocks = [block for sequence in plan.sequences for block in sequence.block_ids]
        assert len(set(blocks)) == len(blocks), "a block has one owner"
        sampled = {}
        for sequence in plan.sequences:
            request, spec = self.requests[sequence.request_id], sequence.sample
            context = request.tokens if spec is None else spec.prompt_token_ids + spec.output_token_ids
            end = sequence.start + len(sequence.token_ids)
            assert context[sequence.start : end] == sequence.token_ids
            assert spec is None or (end == len(context) and sequence.sample_index == len(spec.output_token_ids))
            for position, value in enumerate(kv_of(context[:end])):
                place = (sequence.block_ids[position // PAGE], position % PAGE)
                if position >= sequence.start:
                    self.kv[place] = value
                assert self.kv[place] == value, "wrong KV is read"
            if spec is not None:
                sampled[sequence.request_id] = [Sampled(next_token(context))]
        return StepResult(sampled)


def kv_of(tokens: list[int]) -> list[int]:
    return list(accumulate(tokens, lambda parent, token: hash((parent, token)), initial=0))[1:]


def next_token(tokens: list[int]) -> int:
    return kv_of(tokens)[-1] % VOCABULARY


def draft_model(num_blocks: int) -> tuple[DraftModel, NumberRunner]:
    runner = NumberRunner()
    return DraftModel(runner, num_blocks=num_blocks, page_size=PAGE, context_tokens=CONTEXT), runner


@given(st.data(), st.sampled_from([6, 15, 40, 200]))
@settings(max_examples=150, deadline=None)
def test_whatever_becomes_of_guesses_the_next_ones_rest_on_the_right_kv_and_no_block_is_lost(
    data: st.DataObject, num_blocks: int
) -> None:
    model, runner = draft_model(num_blocks)
    live, num_added = runner.requests, 0
    for _ in range(data.draw(st.integers(5, 40), "steps")):
        if len(live) < 3 or data.draw(st.booleans(), "add"):
            length = data.draw(st.sampled_from([1, 5, PAGE, 2 * MIN_CHUNK + 3, 70]), "prompt")
            live[f"r{num_added}"] = Request([(num_added + place) % VOCABULARY for place in range(length)], [])
            num_added += 1
        requests = [request.draft_request(request_id) for request_id, request in live.items()]
        reach = model.reach(requests)
        lengths = {
            request_id: length
            for request_id, most in reach.items()
            if (length := data.draw(st.integers(0, most), "length"))
        }
        guesses = model.guess(requests, lengths, spare_s=data.draw(st.sampled_from([0.0, 1.0]), "spare")).tokens
        for request_id, request in list(live.items()):
            guessed = guesses.get(request_id, [])
            assert len(guessed) in (0, lengths.get(request_id))
            for place, token in enumerate(guessed):
                assert token == next_token(request.tokens + guessed[:place])
            num_right = data.draw(st.integers(0, len(guessed)), "right")
            if data.draw(st.integers(0, 9), "preempted") > 0:
                request.outputs += [*guessed[:num_right], data.draw(st.integers(0, VOCABULARY - 1), "token")]
            if data.draw(st.integers(0, 9), "ends") == 0 or len(request.tokens) > CONTEXT + 10:
                model.forget(request_id)
                del live[request_id]
        model.allocator.check()
    for request_id in list(live):
        model.forget(request_id)
    assert model.allocator.counts().free == num_blocks


def test_a_long_prompt_is_read_in_chunks_that_leave_others_their_guesses() -> None:
    model, runner = draft_model(200)
    runner.requests |= {"short": Request([1, 2, 3], []), "long": Request([place % 5 for place in range(80)], [])}
    requests = [request.draft_request(request_id) for request_id, request in runner.requests.items()]
    guessed = [
        model.guess(requests, dict.fromkeys(model.reach(requests), 2), spare_s=0.0).tokens.keys() for _ in range(6)
    ]
    assert guessed[0] == {"short"}
    assert guessed[-1] == {"short", "long"}
    read = [plan.num_tokens for plan in runner.plans if plan.sequences[0].sample is None]
    assert max(read) == MIN_CHUNK
    assert sum(read) >= 80 - 1 - MIN_CHUNK


def test_without_room_a_request_gets_no_guesses_and_keeps_no_block() -> None:
    model, runner = draft_model(5)
    runner.requests |= {name: Request([1] * 11, []) for name in "ab"}
    requests = [request.draft_request(request_id) for request_id, request in runner.requests.items()]
    assert model.guess(requests, {"a": 2, "b": 2}, 0.0).tokens.keys() == {"a"}
    assert model.allocator.counts().held == 3
    model.forget("a")
    assert model.guess(requests[1:], {"b": 2}, 0.0).tokens.keys() == {"b"}


def test_beyond_the_draft_models_context_nothing_is_guessed_and_nothing_kept() -> None:
    model, runner = draft_model(100)
    request = runner.requests["a"] = Request([1] * (CONTEXT - 2), [])
    assert model.reach([request.draft_request("a")]) == {"a": 2}
    model.guess([request.draft_request("a")], {"a": 2}, 1.0)
    request.outputs += [1, 1, 1]
    assert model.reach([request.draft_request("a")]) == {}
    assert model.allocator.counts().held == 0


def test_logprobs_are_not_computed_for_guesses() -> None:
    model, runner = draft_model(10)
    runner.requests["a"] = Request([1, 2], [])
    request = DraftRequest("a", [1, 2], 2, SampleSpec(SamplingParams(logprobs=5), [1, 2], []), 4)
    model.guess([request], {"a": 1}, 0.0)
    spec = runner.plans[0].sequences[0].sample
    assert spec is not None
    assert spec.params == SamplingParams(logprobs=None)


def test_a_draft_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    target = write_tiny_model(tmp_path / "target", "llama2")
    check_same_vocabulary(target, write_tiny_model(tmp_path / "same", "qwen3"))
    with pytest.raises(ConfigurationError, match="--draft-model has a vocabulary of 198 tokens, the model has 199"):
        check_same_vocabulary(target, write_tiny_model(tmp_path / "other", "llama2", vocab_size=198))
    with pytest.raises(ConfigurationError, match=r"config\.json cannot be read"):
        check_same_vocabulary(target, tmp_path / "missing")


@pytest.mark.parametrize(
    ("change", "same"), [({}, True), ({"padding": 3}, True), ({"model": {"vocab": {"b": 0}}}, False), (None, False)]
)
def test_a_draft_model_with_another_tokenizer_is_refused(
    tmp_path: Path, change: dict[str, object] | None, same: bool
) -> None:
    folders = [write_tiny_model(tmp_path / name, "llama2") for name in ("target", "draft")]
    tokenizer = {"model": {"vocab": {"a": 0}}, "added_tokens": []}
    (folders[0] / "tokenizer.json").write_text(json.dumps(tokenizer))
    if change is not None:
        (folders[1] / "tokenizer.json").write_text(json.dumps(tokenizer | change))
    if same:
        check_same_vocabulary(folders[0], folders[1])
    else:
        with pytest.raises(ConfigurationError, match=r"another tokenizer\.json"):
            check_same_vocabulary(folders[0], folders[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EngineOptions(speculate="model"), "belong together"),
        (EngineOptions(draft_model="x"), "belong together"),
        (EngineOptions(speculate="sometimes"), "--speculate is 'sometimes'; choose one of off, ngram, model"),
        (EngineOptions(speculate_tokens=0), "--speculate-tokens is 0; it must be greater than 0"),
        (EngineOptions(speculate_running=0), "--speculate-running is 0; it must be greater than 0"),
        (EngineOptions(draft_kv_memory="much"), "'much' is not a size"),
    ],
)
def test_options_that_cannot_work_say_what_to_change(options: EngineOptions, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        validate(options)


def test_a_draft_pool_that_is_too_small_is_refused(tmp_path: Path) -> None:
    model = load_model(write_tiny_model(tmp_path, "llama2"), "float32")
    options = EngineOptions(
        dtype="float32", kv_memory="1MiB", speculate="model", draft_model="x", draft_kv_memory="1KiB"
    )
    with pytest.raises(ConfigurationError, match="--draft-kv-memory 1KiB holds 0 blocks"):
        assemble(model, options, draft=model)
    with pytest.raises(ConfigurationError, match="needs --draft-model"):
        assemble(model, options)
