"""State of one request inside the scheduler."""

from collections.abc import Sequence as Many
from enum import Enum

from engine.blocks import Owner, OwnerKind
from engine.in_flight import StepBlocks
from engine.plan import PENDING, DraftRequest, PlannedSequence, SampleSpec
from engine.prefix_cache import NameChain
from engine.requests import EndReason, EngineRequest, Handover


class Phase(Enum):
    WAITING = "waiting"
    RECEIVING = "receiving"
    """Its blocks are reserved, and somebody outside writes into them."""
    RUNNING = "running"
    ENDED = "ended"


class Sequence:
    """Tokens, blocks and progress of one request.

    position   0 ....... num_computed ....... num_launched ....... len(token_ids) + num_pending
               | KV is in the blocks | a step in flight | to be computed |
                                       computes it

    The step of the last token samples the next one, which is pending while that step is in flight. Between plan and
    apply of a step that verifies guesses, `num_launched` counts these too.
    """

    __slots__ = (
        "_stop_token_ids",
        "arrival",
        "awaits_kv",
        "block_ids",
        "id",
        "is_exposed",
        "last_step",
        "max_positions",
        "names",
        "num_announced_blocks",
        "num_computed",
        "num_final_blocks",
        "num_launched",
        "num_pending",
        "output_token_ids",
        "owner",
        "phase",
        "request",
        "sample_spec",
        "started",
        "token_ids",
        "token_limit",
    )  # fmt: skip

    def __init__(self, request: EngineRequest, arrival: int, names: NameChain, max_model_tokens: int) -> None:
        prompt = list(request.token_ids[: request.num_prompt_tokens])
        self.id = request.id
        self.request = request
        self.arrival = arrival
        self.owner = Owner(OwnerKind.REQUEST, request.id)
        self.phase = Phase.WAITING
        self.awaits_kv = request.handover is Handover.TAKE
        """Until `receive`, of a TAKE request or of one whose blocks are stored; a preempted TAKE is like any other."""
        self.started = False
        self.token_ids = list(request.token_ids)
        self.output_token_ids = list(request.token_ids[request.num_prompt_tokens :])
        self.sample_spec = SampleSpec(request.sampling, prompt, self.output_token_ids)
        self.token_limit = length_limit(request, max_model_tokens)
        self.max_positions = most_positions(request, max_model_tokens)
        self.names = names
        self.block_ids: list[int] = []
        self.num_computed = 0
        self.num_launched = 0
        self.num_pending = 0
        self.last_step: StepBlocks | None = None
        """The latest step that computes something of it."""
        self.num_final_blocks = 0
        """Leading blocks that came from the prefix cache or were offered to it: others may read them."""
        self.num_announced_blocks = 0
        self.is_exposed = False
        """Whether others may read any of its blocks, as they were announced in full or in part."""
        self._stop_token_ids = frozenset(request.sampling.stop_token_ids)

    @property
    def num_uncomputed(self) -> int:
        """Positions that a plan made now could compute."""
        return min(len(self.token_ids) + self.num_pending, self.max_positions) - self.num_launched

    @property
    def in_flight(self) -> bool:
        return self.num_launched > self.num_computed

    @property
    def max_drafts(self) -> int:
        """Guesses that may follow its last token."""
        return self.max_positions - len(self.token_ids) - self.num_pending

    @property
    def gives(self) -> bool:
        return self.request.handover is Handover.GIVE

    @property
    def num_positions_at_start(self) -> int:
        """KV positions that it needs blocks for before it may leave the waiting line."""
        if self.awaits_kv and self.request.handover is Handover.TAKE:
            return min(len(self.token_ids) + 1, self.token_limit - 1)
        return len(self.token_ids)

    def draft_request(self) -> DraftRequest:
        prompt = self.request.num_prompt_tokens
        return DraftRequest(self.id, self.token_ids, prompt, self.sample_spec, self.max_drafts)

    def settle(self, num_positions: int) -> None:
        """So many positions are in the blocks, and no step in flight computes more."""
        self.num_computed = self.num_launched = num_positions

    def launch(self, num_tokens: int, drafts: Many[int], step: StepBlocks) -> PlannedSequence:
        """The next `num_tokens` tokens and then guesses, as a part of `step`."""
        start = self.num_launched
        end = start + num_tokens
        token_ids = self.token_ids[start:end]
        if len(token_ids) < num_tokens:
            token_ids.append(PENDING)
        token_ids += drafts
        sample = self.sample_spec if end == len(self.token_ids) + self.num_pending else None
        index = len(self.output_token_ids) + self.num_pending
        self.num_launched = end + len(drafts)
        self.num_pending += sample is not None
        self.last_step = step
        prompt = self.request.num_prompt_tokens
        return PlannedSequence(self.id, token_ids, start, self.block_ids, prompt, sample, len(drafts), index)

    def land(self, planned: PlannedSequence, num_accepted: int) -> None:
        """The step of `planned` has run; of its guesses the first `num_accepted` hold."""
        self.num_computed = planned.start + len(planned.token_ids) - planned.num_drafts + num_accepted
        self.num_pending -= planned.sample is not None
        if planned.num_drafts:
            self.num_launched = self.num_computed

    def append(self, token_id: int) -> EndReason | None:
        """One more output token, and why the stream ends with it, if it does."""
        self.token_ids.append(token_id)
        self.output_token_ids.append(token_id)
        if token_id in self._stop_token_ids and len(self.output_token_ids) >= self.request.sampling.min_tokens:
            return EndReason.STOP
        return EndReason.LENGTH if len(self.token_ids) >= self.token_limit else None


def length_limit(request: EngineRequest, max_model_tokens: int) -> int:
    """Tokens, prompt included, after which the stream ends."""
    return min(request.num_prompt_tokens + request.sampling.max_tokens, max_model_tokens)


def most_positions(request: EngineRequest, max_model_tokens: int) -> int:
    """KV positions that the request may come to need. The last token of a stream is never computed."""
    if request.handover is Handover.GIVE:
        return len(request.token_ids)
    return length_limit(request, max_model_tokens) - 1
