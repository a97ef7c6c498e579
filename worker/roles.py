"""What a role is to the shell that carries it.

A role owns the attempts assigned to it: it turns assignments into engine requests and hand-overs, and it hears what
the engine says about them. The shell owns the wires, the attempt table and how an attempt ends.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Protocol

from baton.block_names import root_name, tenant_name
from baton.token_ids import unpack
from baton.v1 import worker_link_pb2 as wire
from engine.requests import (
    Computed,
    Ended,
    EngineRequest,
    Handover,
    Placement,
    Reserved,
    SamplingParams,
    Standing,
    TokenLogprobs,
    TokenOutput,
)
from kvtransfer.wire import PeerRef


class Link(Protocol):
    """Where messages to one coordinator go."""

    @property
    def coordinator(self) -> int:
        """Its incarnation; 0: nobody has answered yet."""

    def send(self, message: wire.WorkerMessage) -> None: ...


class KvLink(Link, Protocol):
    """One on which caches can be told of."""

    kv_sequence: int
    """Number of the last KvEvents on it, sent or left out."""

    @property
    def unsent_bytes(self) -> int:
        """That wait for the coordinator to read."""


@dataclass(slots=True)
class Attempt:
    """One assignment while this worker has it."""

    link: Link
    """Of the coordinator that assigned it."""
    id: wire.AttemptId
    key: str
    """`request_id/attempt`: the request id inside the engine and the id of the hand-over between the two workers."""
    handle: int
    """Its coordinator's number for it; another coordinator may use the same."""
    assignment: wire.Assignment
    role: "RoleHandler"
    num_tokens: int = 0
    """Output tokens in the stream so far, those of earlier attempts included."""
    deadline: asyncio.TimerHandle | None = None
    holder: PeerRef | None = None
    """The worker that the beginning of the prompt may come from."""
    coordinator: int = 0
    """Incarnation of the one that assigned or adopted it."""
    orphaned: bool = False
    """That coordinator is gone, and nobody is told what becomes of it: see `worker.orphans`."""
    cached_tokens: int | None = None
    """Of the prompt, in the prefix cache when a worker took it up; None before."""
    tokens: list[int] = field(default_factory=list)
    """The stream so far, with the tokens that came with the assignment."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the last of `tokens`, where they are asked for."""
    assigned_at: float = field(default_factory=time.monotonic)
    times: wire.AttemptTimes = field(default_factory=wire.AttemptTimes)
    """For the coordinator, at the end."""

    @property
    def facts(self) -> dict[str, str | int]:
        """For logs: whose it is."""
        request_id, _, choice = self.id.request_id.rpartition("-")
        trace = self.assignment.traceparent[3:35]
        return {"request_id": request_id, "choice": choice, "attempt": self.id.attempt, "trace_id": trace}

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.assigned_at


class RoleHandler(ABC):
    """Called on the asyncio thread; must not block."""

    role: "wire.Role.ValueType"

    @abstractmethod
    def assign(self, attempt: Attempt) -> None:
        """Take up an attempt that the shell has admitted."""

    @abstractmethod
    def abort(self, attempt: Attempt) -> None:
        """Stop whatever state it is in; the shell has reported the end already."""

    @abstractmethod
    def on_ended(self, attempt: Attempt, ended: Ended) -> None:
        """The engine is done with the attempt."""

    @abstractmethod
    def on_reserved(self, attempt: Attempt, reserved: Reserved) -> None:
        """The engine reserved blocks that are to be filled from outside: `worker.arrivals`."""

    def on_computed(self, attempt: Attempt, computed: Computed) -> None:
        """The engine finished blocks of a GIVE request."""
        raise AssertionError(f"{type(self).__name__} never gives blocks")

    def on_token(self, attempt: Attempt, token: TokenOutput) -> None:  # noqa: B027 - most roles only pass it on
        """The engine sampled a token; the shell has sent it to the coordinator."""

    def unfinished(self) -> int:
        """Hand-overs that still need this process; it drains until there are none."""
        return 0


def engine_request(
    assignment: wire.Assignment,
    key: str,
    model_fingerprint: str,
    handover: Handover,
    placement: Placement | None = None,
) -> EngineRequest:
    """The engine's view of an assignment."""
    sampling = assignment.sampling
    return EngineRequest(
        id=key,
        token_ids=tuple(unpack(assignment.token_ids)),
        num_prompt_tokens=assignment.num_prompt_tokens,
        sampling=SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=tuple(sampling.logit_bias.items()),
            min_tokens=sampling.min_tokens,
            max_tokens=sampling.max_tokens,
            stop_token_ids=tuple(sampling.stop_token_ids),
            logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        ),
        cache_root=root_name(model_fingerprint, assignment.adapter, assignment.cache_salt),
        handover=handover,
        placement=placement,
        tenant=tenant_name(assignment.tenant or assignment.cache_salt),
        standing=Standing(assignment.tenant, assignment.weight or 1.0, assignment.priority, assignment.kv_share),
    )


def step_logprob(logprobs: TokenLogprobs, entry: int = 0) -> wire.StepLogprob:
    """As the wire has it; `entry` is the token's place in its message."""
    return wire.StepLogprob(
        entry=entry,
        logprob=logprobs.chosen,
        alternative_ids=logprobs.alternative_ids,
        alternative_logprobs=logprobs.alternative_logprobs,
    )
