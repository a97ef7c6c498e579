"""State of one request inside the scheduler."""

from enum import Enum

from engine.blocks import Owner, OwnerKind
from engine.plan import PlannedSequence, SampleSpec
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

    position   0 ....... num_computed ....... len(token_ids)
               | KV is in the blocks | to be computed |     the last token's step samples the next one
    """

    __slots__ = (
        "_stop_token_ids",
        "arrival",
        "awaits_kv",
        "block_ids",
        "id",
        "names",
        "num_announced_blocks",
        "num_computed",
        "num_final_blocks",
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
        """Until `receive`; a preempted request computes everything here."""
        self.started = False
        self.token_ids = list(request.token_ids)
        self.output_token_ids = list(request.token_ids[request.num_prompt_tokens :])
        self.sample_spec = SampleSpec(request.sampling, prompt, self.output_token_ids)
        self.token_limit = length_limit(request, max_model_tokens)
        self.names = names
        self.block_ids: list[int] = []
        self.num_computed = 0
        self.num_final_blocks = 0
        """Leading blocks that came from the prefix cache or were offered to it: others may read them."""
        self.num_announced_blocks = 0
        self._stop_token_ids = frozenset(request.sampling.stop_token_ids)

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def gives(self) -> bool:
        return self.request.handover is Handover.GIVE

    @property
    def num_positions_at_start(self) -> int:
        """KV positions that it needs blocks for before it may leave the waiting line."""
        if self.awaits_kv:
            return min(len(self.token_ids) + 1, self.token_limit - 1)
        return len(self.token_ids)

    def planned(self, num_tokens: int) -> PlannedSequence:
        start = self.num_computed
        end = start + num_tokens
        sample = self.sample_spec if end == len(self.token_ids) else None
        return PlannedSequence(
            self.id, self.token_ids[start:end], start, self.block_ids, self.request.num_prompt_tokens, sample
        )

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
