"""The registry of workers: who is there, what each can do, how loaded it is, and which attempts depend on it."""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import baton
from baton.config import check_version_label
from baton.errors import ConfigurationError, PeerError
from baton.model_folder import VERSION_DIGITS
from baton.v1 import worker_link_pb2 as wire
from coordinator.delivery import Choice
from coordinator.estimates import stream_s
from coordinator.fast_path import FastPaths
from coordinator.worker_table import Candidates, Fixed, Group, Load, WorkerTable

if TYPE_CHECKING:
    from coordinator.timelines import Part

AFTERMATH_S = 1.0
"""So long after an abort a worker may still be busy with what was aborted, and die of it."""
PROTOCOLS = (wire.LINK_PROTOCOL_VERSION,)
"""That a worker may speak: this software's, and from the first change of meaning on also the one before."""

events = logging.getLogger("baton.events")


class Leg:
    """One worker's part in an attempt: computing the prompt for another, or decoding."""

    __slots__ = (
        "admitted",
        "attempt",
        "choice",
        "decode",
        "expected_tokens",
        "first_index",
        "handle",
        "paired",
        "part",
        "remembered",
        "waiting_tokens",
        "worker",
    )  # fmt: skip

    def __init__(
        self,
        choice: "Choice",
        attempt: int,
        worker: "Worker",
        decode: bool,
        handle: int,
    ) -> None:
        self.choice = choice
        self.attempt = attempt
        self.worker = worker
        self.decode = decode
        self.handle = handle
        self.admitted = False
        self.first_index = 0
        """In the stream, of the attempt's first token."""
        self.paired = False
        """Another worker has the other part of the attempt; false once it is gone."""
        self.remembered = False
        """Whether its prompt has been computed, and was said to be."""
        self.expected_tokens: int | None = None
        """That this worker should find in its caches; None if another one computes the prompt."""
        self.part: Part | None = None
        """Of the request's timeline."""
        self.waiting_tokens = 0
        """Prompt tokens this worker still has to compute, as far as it told."""

    @property
    def id(self) -> wire.AttemptId:
        return wire.AttemptId(request_id=self.choice.stream_id, attempt=self.attempt)


class Link(Protocol):
    """To one worker."""

    def send(self, message: wire.CoordinatorMessage) -> bool:
        """Never blocks, never raises. False, and not said: too much waits to be read already."""

    def abort(self) -> None:
        """Hang up at once. Idempotent."""


class Worker:
    """A registered worker behind its link."""

    def __init__(
        self,
        registration: wire.Registration,
        link: Link,
        on_lost: Callable[["Worker"], None],
        on_load: Callable[["Worker"], None] = lambda worker: None,
    ) -> None:
        self.id = registration.worker_id
        self.registration = registration
        self.peer = wire.HandoverPeer(
            worker_id=self.id, incarnation=registration.incarnation, handover_address=registration.handover_address
        )
        """As assignments of others name it."""
        self.link = link
        self.version = version_of(registration)
        self.draining_since_s: float | None = None
        self.prefills = wire.ROLE_PREFILL in registration.roles
        self.decodes = wire.ROLE_DECODE in registration.roles
        self.stands_in = wire.ROLE_DECODE in registration.standby_roles
        """Decodes while no decode worker accepts work."""
        self.heartbeat = wire.WorkerHeartbeat()
        self.heartbeat.blocks.total = self.heartbeat.blocks.free = registration.total_blocks
        self._told = _told(registration, self.heartbeat)
        self.row = -1
        """In the registry's table."""
        self.joined_s = self.last_seen_s = time.monotonic()
        self.legs: dict[int, Leg] = {}
        """By handle."""
        self.fast_paths = FastPaths()
        self.lost = asyncio.Event()
        self.died = False
        """Lost, and not because it was told to go or only dialled again."""
        self.lost_because = ""
        self._legs_by_attempt: dict[tuple[str, int], Leg] = {}
        self._aborted: deque[tuple[float, Leg]] = deque(maxlen=64)
        self._blocks_assigned = 0
        self._idle_beats = 0
        self._others_requests = 0
        self._others_tokens = 0
        self._own_tokens = 0
        self._on_lost = on_lost
        self._on_load = on_load

    @property
    def context_tokens(self) -> int:
        """Longest prompt plus output that this worker can hold."""
        registration = self.registration
        return min(registration.max_model_tokens, registration.total_blocks * registration.page_size_tokens)

    @property
    def role_names(self) -> tuple[str, ...]:
        return tuple(name for name, has in (("prefill", self.prefills), ("decode", self.decodes)) if has)

    @property
    def accepts(self) -> bool:
        return not self.lost.is_set() and not self.heartbeat.draining

    @property
    def empty(self) -> bool:
        """It has nothing to do, whoever asked for it. The heartbeat before the last may be older than what was sent."""
        return not self.legs and self._idle_beats >= 2

    def send(self, message: wire.CoordinatorMessage) -> None:
        """Say something; a worker that does not keep up is lost. Never blocks, never raises."""
        if not self.lost.is_set() and not self.link.send(message):
            self.lose("it does not read its messages")

    def lose(self, reason: str, died: bool = True) -> None:
        """The worker is gone: nothing of it is accepted any more. Idempotent. `died`: something made it go.

        Its attempts fail over in a later turn of the loop, so that whoever found out may finish what it is doing.
        """
        if self.lost.is_set():
            return
        self.lost.set()
        self.link.abort()
        self._on_load(self)
        self.died = died and not self.heartbeat.draining
        self.lost_because = reason
        expected = self.heartbeat.draining and not self.legs
        level = logging.INFO if expected else logging.WARNING
        events.log(level, "worker %s lost: %s (%d attempts)", self.id, reason, len(self.legs))
        asyncio.get_running_loop().call_soon(self._on_lost, self)

    def open(self, leg: Leg, num_tokens: int, waiting_tokens: int) -> None:
        """`num_tokens` need blocks here; `waiting_tokens` of them are to be computed."""
        self._idle_beats = 0
        self.legs[leg.handle] = leg
        self._legs_by_attempt[leg.choice.stream_id, leg.attempt] = leg
        self._blocks_assigned += num_tokens // self.registration.page_size_tokens + 1
        self.waits(leg, waiting_tokens)

    def waits(self, leg: Leg, tokens: int) -> None:
        """So many tokens of the leg's prompt are still to be computed here. The next token takes the slow path."""
        if (path := self.fast_paths.entered.get(leg.handle)) is not None:
            path.leave()
        self._own_tokens += tokens - leg.waiting_tokens
        leg.waiting_tokens = tokens
        self._on_load(self)

    def close(self, leg: Leg) -> None:
        """Nothing more is expected of this leg. Idempotent."""
        if self.legs.pop(leg.handle, None) is not None:
            self.waits(leg, 0)
        self._legs_by_attempt.pop((leg.choice.stream_id, leg.attempt), None)

    def abort(self, leg: Leg) -> None:
        """Close a leg and tell the worker."""
        self.close(leg)
        self._aborted.append((time.monotonic(), leg))
        self.send(wire.CoordinatorMessage(abort=wire.AbortAttempt(id=leg.id)))

    def aftermath(self) -> list[Leg]:
        """Legs that were aborted just now."""
        since_s = time.monotonic() - AFTERMATH_S
        return [leg for at_s, leg in self._aborted if at_s >= since_s]

    def leg(self, id: wire.AttemptId) -> Leg | None:
        return self._legs_by_attempt.get((id.request_id, id.attempt))

    def beat(self, heartbeat: wire.WorkerHeartbeat) -> None:
        if heartbeat.draining and self.draining_since_s is None:
            self.draining_since_s = time.monotonic()
            events.info("worker %s is draining", self.id)
        self.heartbeat = heartbeat
        self._told = _told(self.registration, heartbeat)
        self._blocks_assigned = 0
        idle = not self.legs and not heartbeat.running_requests + heartbeat.waiting_requests
        self._idle_beats = self._idle_beats + 1 if idle else 0
        if self.empty:
            self._aborted.clear()
        # What is not from here, other coordinators gave it.
        requests = heartbeat.running_requests + heartbeat.waiting_requests
        self._others_requests = max(0, requests - len(self.legs))
        self._others_tokens = max(0, heartbeat.waiting_prefill_tokens - self._own_tokens)
        self._on_load(self)

    def load(self) -> Load:
        """What others gave it by the last heartbeat and this coordinator by now; prompts at least as that one said."""
        told = self._told
        free_tokens = told.free_tokens - self._blocks_assigned * self.registration.page_size_tokens
        requests = len(self.legs) + self._others_requests
        waiting_tokens = max(self._own_tokens + self._others_tokens, told.waiting_prefill_tokens)
        return Load(self.accepts, free_tokens, requests, waiting_tokens, told.stream_s, told.prefill_s, told.handover_s)

    def drains(self) -> None:
        """It said so before its next heartbeat does."""
        self.heartbeat.draining = True
        self._on_load(self)


def _told(registration: wire.Registration, beat: wire.WorkerHeartbeat) -> Load:
    """What the heartbeat alone says."""
    bytes_per_token = registration.block_bytes / registration.page_size_tokens
    return Load(
        accepts=True,
        free_tokens=(beat.blocks.free + beat.blocks.cached) * registration.page_size_tokens,
        requests=beat.running_requests + beat.waiting_requests,
        waiting_prefill_tokens=beat.waiting_prefill_tokens,
        stream_s=stream_s(_seconds(beat.step_s), beat.running_requests),
        prefill_s=_seconds(1 / (beat.prefill_tokens_per_s or math.inf)),
        handover_s=_seconds(bytes_per_token / (beat.handover_bytes_per_s or math.inf)),
    )


def _seconds(measured: float) -> float:
    """0 where nothing was measured, or nothing that can be."""
    return min(measured, 3600.0) if measured > 0 else 0.0


def _fixed(worker: Worker) -> Fixed:
    registration = worker.registration
    return Fixed(
        prefills=worker.prefills,
        decodes=worker.decodes,
        stands_in=worker.stands_in,
        context_tokens=worker.context_tokens,
        kv_bytes_per_token=registration.block_bytes / registration.page_size_tokens,
        max_running=registration.max_running_requests or math.inf,
    )


def _group(worker: Worker) -> Group:
    registration = worker.registration
    return Group(worker.version, registration.model_fingerprint, registration.page_size_tokens)


def version_of(registration: wire.Registration) -> str:
    """The label of its model version; one of our making for software that sends none."""
    fingerprint = registration.weights_fingerprint or registration.model_fingerprint
    return registration.model_version or fingerprint[:VERSION_DIGITS] or "unnamed"


def work_together(one: wire.Registration, other: wire.Registration) -> bool:
    """Of one model version: both compute the same KV, or whichever of them decodes takes KV of another dtype over."""
    if one.model_fingerprint == other.model_fingerprint:
        return True
    same_weights = one.weights_fingerprint != "" and one.weights_fingerprint == other.weights_fingerprint
    return same_weights and all(each.converts_kv_dtype for each in (one, other) if wire.ROLE_DECODE in each.roles)


class WorkerRegistry:
    """Workers by id. All of one model version work together; those with another page size or dtype convert what they
    take in. Versions stand side by side, as long as they share the coordinator's tokenizer."""

    def __init__(self, served_model: str, tokenizer_fingerprint: str = "") -> None:
        self._served_model = served_model
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self.workers: dict[str, Worker] = {}
        self.table = WorkerTable()
        """Of these workers, for routing."""
        self._context_tokens: dict[str, int] = {}
        """By version, until a worker comes or goes."""
        self.version_starts: dict[str, float] = {}
        """When the first worker of each version was started that was ever here; Unix seconds."""
        self.on_lost: Callable[[Worker], None] = lambda worker: None
        """Set by the dispatcher: fail the worker's attempts over."""
        self.on_joined: Callable[[Worker], None] = lambda worker: None
        """Called once the worker has been welcomed; set by the pins, which it is to be told."""
        self.empty_since_s: float | None = time.monotonic()
        """None while there is a worker."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when readiness may have changed."""

    def register(self, registration: wire.Registration, link: Link) -> Worker:
        """Raises PeerError with the reason for a worker that does not fit; the new one replaces one of its name."""
        self._check(registration)
        old = self.workers.get(registration.worker_id)
        if old is not None:
            same = old.registration.incarnation == registration.incarnation
            old.lose("it dialled again" if same else "it was started anew", died=not same)
        worker = self.workers[registration.worker_id] = Worker(registration, link, self._lost, self._changed)
        self._context_tokens.clear()
        worker.row = self.table.add(worker.id, _group(worker), _fixed(worker))
        self._changed(worker)
        self.empty_since_s = None
        started = registration.started_unix_s
        self.version_starts[worker.version] = min(self.version_starts.get(worker.version, started), started)
        events.info(
            "worker %s joined: %s, pid %d, %d blocks of %d tokens, incarnation %016x",
            worker.id, "+".join(worker.role_names), registration.pid, registration.total_blocks,
            registration.page_size_tokens, registration.incarnation,
        )  # fmt: skip
        self.on_change()
        return worker

    def _check(self, new: wire.Registration) -> None:
        if new.protocol_version not in PROTOCOLS:
            older = new.protocol_version < PROTOCOLS[0]
            raise PeerError(
                f"protocol_version is {new.protocol_version} (baton {new.software_version or 'of unknown version'}), "
                f"this coordinator (baton {baton.__version__}) speaks {' and '.join(map(str, PROTOCOLS))}; "
                f"upgrade {'this worker' if older else 'coordinators first, then workers'}"
            )
        if not new.worker_id or not new.incarnation:
            raise PeerError("worker_id and incarnation must be set")
        if not new.roles or not set(new.roles) <= {wire.ROLE_PREFILL, wire.ROLE_DECODE}:
            raise PeerError("roles must be prefill, decode or both")
        if not (new.page_size_tokens and new.total_blocks and new.max_model_tokens):
            raise PeerError("page_size_tokens, total_blocks and max_model_tokens must be positive")
        if wire.ROLE_PREFILL in new.roles and not new.handover_address:
            raise PeerError("handover_address must be set for the prefill role")
        if new.model != self._served_model:
            raise PeerError(f"model is '{new.model}', this coordinator serves '{self._served_model}'")
        if new.model_version:
            try:
                check_version_label(new.model_version, "model_version")
            except ConfigurationError as error:
                raise PeerError(str(error)) from None
        own = self._tokenizer_fingerprint
        if own and new.tokenizer_fingerprint and new.tokenizer_fingerprint != own:
            raise PeerError(
                "its tokenizer differs from this coordinator's, which turns prompts into tokens; serve this model with "
                "coordinators of its own, or give the worker the same tokenizer.json"
            )
        others = (worker for worker in self.workers.values() if worker.id != new.worker_id)
        for other in others:
            if other.version == version_of(new) and not work_together(new, other.registration):
                raise PeerError(
                    f"version {other.version}: model_fingerprint is {new.model_fingerprint}, that of worker {other.id} "
                    f"is {other.registration.model_fingerprint}; start all workers with the same model and dtype, with "
                    "--deterministic also with the same --page-size. Where only --dtype differs, decode workers with "
                    "--convert-kv-dtype convert; other weights need another --model-version"
                )

    def _lost(self, worker: Worker) -> None:
        if self.workers.get(worker.id) is worker:
            del self.workers[worker.id]
            self._context_tokens.clear()
            if not self.workers:
                self.empty_since_s = time.monotonic()
        self.on_lost(worker)
        self.table.remove(worker.row)
        self.on_change()

    def _changed(self, worker: Worker) -> None:
        self.table.changed(worker.row, worker.load)

    def candidates(self, version: str) -> Candidates:
        """The workers of one model version that accept new work."""
        return self.table.candidates(version)

    def ready_versions(self) -> list[str]:
        """Those of which a worker that decodes, or stands in for those that do, accepts work."""
        return self.table.ready_versions()

    @property
    def context_tokens(self) -> int:
        """Longest prompt plus output that every version can hold; 0 without any worker."""
        versions = {worker.version for worker in self.workers.values()}
        return min(filter(None, map(self.context_tokens_of, versions)), default=0)

    def context_tokens_of(self, version: str) -> int:
        """Of one version: what every decode worker, or else every stand-in, can hold; 0 without any."""
        if (known := self._context_tokens.get(version)) is None:
            workers = [worker for worker in self.workers.values() if worker.version == version]
            decoding = [worker for worker in workers if worker.decodes]
            standing_in = [worker for worker in workers if worker.stands_in]
            known = min((worker.context_tokens for worker in decoding or standing_in), default=0)
            self._context_tokens[version] = known
        return known
