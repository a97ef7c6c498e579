"""A small model of the same vocabulary guesses (Leviathan et al., 2023; Chen et al., 2023).

It has a KV pool and a runner of its own. What it knows of a request:

    position   0 ............ num_known ........... num_known + len(guessed)
               | the request's tokens | its own guesses of last time | unused

1. The next call compares the guesses with what became of the request: those that were right are known now, the KV of
   the others is written over. The same follows for whatever else happened, a preemption say.
2. A request that is far ahead, as after its prompt, is read in chunks that stretch a step by a bounded time.
3. Guesses are made for all requests side by side, one step of the small model for each place.

A guess is sampled as the target will sample: same parameters, same random number for the index of the token. With a
temperature both models then draw from their distributions with common random numbers, and agree far more often than by
two draws. Exactness does not depend on it, as the target verifies by its own choice; how often guesses are right does.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from baton.errors import ConfigurationError
from engine.blocks import BlockAllocator, Owner, OwnerKind
from engine.plan import DraftRequest, PlannedSequence, Runner, SampleSpec, StepPlan
from engine.speculation.speculator import Guesses

MIN_CHUNK = 16
"""Tokens of prompts that are read in a step, however slow the machine is; that many are read beside a guess."""
MAX_CHUNK = 512
WEIGHT_TOKEN_S = 0.3


@dataclass(slots=True)
class _Known:
    """What the pool holds of one request."""

    owner: Owner
    block_ids: list[int] = field(default_factory=list)
    num_known: int = 0
    guessed: list[int] = field(default_factory=list)

    def settle(self, token_ids: Sequence[int]) -> None:
        """Right guesses become known. The last token is always computed (again): its logits are needed."""
        for guess, token_id in zip(self.guessed, token_ids[self.num_known :], strict=False):
            if guess != token_id:
                break
            self.num_known += 1
        self.num_known = min(self.num_known, len(token_ids) - 1)
        self.guessed.clear()


@dataclass(slots=True)
class _Round:
    """Guesses of one request in the making."""

    request: DraftRequest
    known: _Known
    length: int
    spec: SampleSpec
    tokens: list[int]
    """To be computed next."""

    def planned(self) -> PlannedSequence:
        return PlannedSequence(
            self.request.request_id, self.tokens, self.known.num_known + len(self.known.guessed), self.known.block_ids,
            self.request.num_prompt_tokens, self.spec, sample_index=len(self.spec.output_token_ids),
        )  # fmt: skip


class DraftModel:
    """Implements engine.speculation.speculator.Guesser.

    `runner` computes in a pool of `num_blocks` blocks. Without room there, a request gets no guesses.
    """

    def __init__(self, runner: Runner, *, num_blocks: int, page_size: int, context_tokens: int) -> None:
        self.allocator = BlockAllocator(num_blocks)
        self._runner = runner
        self._page_size = page_size
        self._context_tokens = context_tokens
        self._known: dict[str, _Known] = {}
        self._token_s = 0.0
        """Reading a token of a prompt."""

    def reach(self, requests: Sequence[DraftRequest]) -> dict[str, int]:
        within = {each.request_id: self._context_tokens - len(each.token_ids) for each in requests}
        for request_id, room in within.items():
            if room < 1:
                self.forget(request_id)
        return {
            each.request_id: min(each.max_drafts, within[each.request_id])
            for each in requests
            if within[each.request_id] > 0
        }

    def guess(self, requests: Sequence[DraftRequest], lengths: dict[str, int], spare_s: float) -> Guesses:
        behind: list[DraftRequest] = []
        rounds: list[_Round] = []
        for request in requests:
            length = lengths.get(request.request_id, 0)
            if not length or (known := self._prepare(request, length)) is None:
                continue
            missing = request.token_ids[known.num_known :]
            if len(missing) > MIN_CHUNK:
                behind.append(request)
            else:
                params = replace(request.sample.params, logprobs=None)
                spec = SampleSpec(params, request.sample.prompt_token_ids, list(request.sample.output_token_ids))
                rounds.append(_Round(request, known, length, spec, missing))
        if behind:
            self._read(behind, spare_s)
        return self._guess(rounds)

    def forget(self, request_id: str) -> None:
        if (known := self._known.pop(request_id, None)) is not None:
            self.allocator.release_all(known.owner)

    def _prepare(self, request: DraftRequest, length: int) -> _Known | None:
        """Blocks for all that will be computed. None when there is no room: then the request keeps nothing, either."""
        request_id = request.request_id
        known = self._known.get(request_id)
        if known is None:
            known = self._known[request_id] = _Known(Owner(OwnerKind.REQUEST, request_id))
        known.settle(request.token_ids)
        num_positions = len(request.token_ids) + length - 1  # the last guess is never computed
        num_blocks = -(-num_positions // self._page_size)
        fresh = self.allocator.allocate(known.owner, max(0, num_blocks - len(known.block_ids)))
        if fresh is None:
            self.forget(request_id)
            return None
        known.block_ids += fresh
        return known

    def _read(self, requests: list[DraftRequest], spare_s: float) -> None:
        """One step over the next tokens of requests that are behind."""
        budget = MIN_CHUNK
        if self._token_s:
            budget = max(MIN_CHUNK, min(MAX_CHUNK, int(spare_s / self._token_s)))
        planned: list[PlannedSequence] = []
        for request in requests:
            known = self._known[request.request_id]
            start = known.num_known
            tokens = request.token_ids[start : min(start + budget, len(request.token_ids) - 1)]
            planned.append(
                PlannedSequence(
                    request.request_id, tokens, start, known.block_ids, request.num_prompt_tokens, sample=None
                )
            )
            known.num_known += len(tokens)
            budget -= len(tokens)
            if not budget:
                break
        plan = StepPlan(planned, [])
        started = time.perf_counter()
        self._runner.run(plan)
        token_s = (time.perf_counter() - started) / plan.num_tokens
        self._token_s += (token_s - self._token_s) * (WEIGHT_TOKEN_S if self._token_s else 1.0)

    def _guess(self, rounds: list[_Round]) -> Guesses:
        """One step for each place; a request leaves when it has its guesses."""
        guesses: dict[str, list[int]] = {each.request.request_id: [] for each in rounds}
        depth = max((each.length for each in rounds), default=0)
        started = time.perf_counter()
        for place in range(1, depth + 1):
            rounds = [each for each in rounds if each.length >= place]
            result = self._runner.run(StepPlan([each.planned() for each in rounds], []))
            for each in rounds:
                (sampled,) = result.sampled[each.request.request_id]
                guesses[each.request.request_id].append(sampled.token_id)
                if place == 1:
                    each.known.num_known += len(each.tokens)
                else:
                    each.known.guessed += each.tokens
                each.tokens = [sampled.token_id]
                each.spec.output_token_ids.append(sampled.token_id)
        return Guesses(guesses, (time.perf_counter() - started) / max(depth, 1))


def check_same_vocabulary(target: Path, draft: Path) -> None:
    """Raises ConfigurationError unless a token id means the same to the models in both folders."""
    sizes = [_read(folder / "config.json").get("vocab_size") for folder in (target, draft)]
    if sizes[0] != sizes[1]:
        raise ConfigurationError(
            f"--draft-model has a vocabulary of {sizes[1]} tokens, the model has {sizes[0]}; "
            "give a smaller model of the same family"
        )
    words = [_vocabulary(folder / "tokenizer.json") for folder in (target, draft)]
    if words[0] != words[1]:
        raise ConfigurationError(
            "--draft-model has another tokenizer.json than the model: its token ids mean other words; "
            "give a smaller model of the same family"
        )


def _vocabulary(path: Path) -> dict[str, Any]:
    """What decides which words an id stands for; nothing where there is no such file."""
    values = _read(path) if path.exists() else {}
    return {name: values.get(name) for name in ("model", "added_tokens")}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path} must hold one JSON object")
    return values
