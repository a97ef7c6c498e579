"""A worker without an engine: it speaks the worker link, and its tokens are a function of (prompt, index).

Knobs make it misbehave: pause, refuse, fail, repeat itself, lie, fall silent, die.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from baton.block_names import block_name, root_name
from baton.framed import dial
from baton.token_ids import TOKEN_BYTES, count, unpack
from baton.v1 import worker_link_pb2 as wire

FIRST_TOKEN, NUM_TOKENS = 300, 3000
_incarnations = itertools.count(1000)

COUNTERS = {"generated_tokens": 7, "kv_host_loaded": 3, "kv_host_bytes": 4096}


def token_at(prompt: Sequence[int], index: int) -> int:
    """The token that every honest fake worker has at `index` of the answer to `prompt`."""
    digest = blake2b(repr((list(prompt), index)).encode(), digest_size=8).digest()
    return FIRST_TOKEN + int.from_bytes(digest, "little") % NUM_TOKENS


@dataclass
class Reservation:
    """Of one worker, to which each coordinator has a link: a FakeWorker of its own."""

    links: "list[FakeWorker]"
    holder: "FakeWorker | None" = None
    token: int = 0
    wanted: bool = False

    @property
    def cleared(self) -> bool:
        return self.holder is not None and not sum(each.num_running for each in self.links if each is not self.holder)

    async def reserve(self, link: "FakeWorker", token: int) -> None:
        if self.holder is None:
            self.holder, self.token = link, token
        await self.beat()

    async def unreserve(self, link: "FakeWorker", token: int) -> None:
        if token == self.token and link is self.holder:
            self.holder, self.token, self.wanted = None, 0, False
        self.wanted |= token == self.token != 0
        await self.beat()

    async def beat(self) -> None:
        for link in self.links:
            await link.beat()


class Refused(Exception):
    """By the coordinator, and why."""


class FakeWorker:
    def __init__(
        self,
        link_port: int,
        worker_id: str = "decode-0",
        roles: Sequence[int] = (wire.ROLE_DECODE,),
        token_at: Callable[[Sequence[int], int], int] = token_at,
        **registration: object,
    ) -> None:
        self.id = worker_id
        self.token_at = token_at
        self.registration = wire.Registration(
            **{
                "protocol_version": wire.LINK_PROTOCOL_VERSION,
                "worker_id": worker_id, "incarnation": next(_incarnations), "roles": roles,
                "pid": 4242, "host": "127.0.0.1", "handover_address": f"tcp://127.0.0.1:1/{worker_id}", "model": "demo",
                "model_fingerprint": "f", "model_version": "v", "page_size_tokens": 16, "total_blocks": 4096,
                "max_model_tokens": 2048, "block_bytes": 1024, "lanes": ["shm", "tcp"],
            }
            | registration
        )  # fmt: skip
        self.heartbeat = wire.WorkerHeartbeat(
            blocks=wire.BlockCounts(total=4096, free=4096), counters=COUNTERS, lanes_in_use={"p": "shm"}
        )
        # Knobs.
        self.refuse = ""
        self.refuses_as_draining = False
        self.pause_at: int | None = None  # generates up to this index, then waits for `go`
        self.go = asyncio.Event()
        self.takes_up = asyncio.Event()  # what it was assigned, once it is set
        self.takes_up.set()
        self.fail_at: int | None = None  # ends with an error instead of this index
        self.lie_at: int | None = None  # reports another token at this index
        self.skip_at: int | None = None  # forgets this index
        self.repeat = 1  # sends each token so many times
        self.resend_all = False  # sends everything again from index 0 of the attempt with each token
        self.send_heartbeats = True
        self.end_early_at: int | None = None  # claims LENGTH at this index
        self.complains = False  # says that its prefill worker handed nothing over
        self.keeps_lease = False  # does not say that a hand-over is over
        self.dies_of: Callable[[wire.Assignment, int], bool] = lambda assignment, index: False  # at this index
        self.pace_s = 0.0  # between two tokens of a stream
        self.heals = False  # misbehaves only in a request's first attempt
        self.on_claim: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0)
        self.orphans: dict[tuple[str, int], wire.Assignment] = {}  # what it has of coordinators that are gone
        self.on_death: Callable[[], Coroutine[None, None, None]] = self.stop
        # What it saw.
        self.adopted: list[wire.AttemptId] = []
        self.claims: list[str] = []
        self.cached_tokens: list[int] = []  # as it was told by the coordinator
        self.assignments: list[wire.Assignment] = []
        self.aborts: list[wire.AttemptId] = []
        self.pins: dict[str, wire.Pin] = {}
        self.snapshots_wanted = 0
        self.reservation = Reservation([self])
        self.welcome: wire.Welcome | None = None
        self.heard = asyncio.Condition()
        self.closed = asyncio.Event()
        self._link_port = link_port
        self._runs: dict[tuple[str, int], asyncio.Task[None]] = {}

    async def start(self) -> "FakeWorker":
        """Returns when welcomed; raises Refused."""
        self._link = await dial(f"127.0.0.1:{self._link_port}", wire.CoordinatorMessage, None)
        self._link.send(wire.WorkerMessage(registration=self.registration))
        message = await self._link.read()
        assert message is not None
        if message.HasField("refusal"):
            raise Refused(message.refusal.reason)
        self.welcome = message.welcome
        await self.beat()
        self._tasks = [asyncio.create_task(work) for work in (self._read(), self._beat())]
        return self

    async def stop(self) -> None:
        """Dies: the link breaks at once. Idempotent."""
        for task in [*self._tasks, *self._runs.values()]:
            task.cancel()
        self._link.abort()
        self.closed.set()

    async def wait_for(self, condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
        """Until `condition` holds; it is looked at whenever a message comes in."""
        async with asyncio.timeout(timeout_s), self.heard:
            await self.heard.wait_for(condition)

    async def report(self, assignment: wire.Assignment, num_tokens: int = 0, **orphan: object) -> None:
        """Say that a coordinator is gone that gave it this assignment, and go on with it once it is adopted."""
        self.orphans[assignment.id.request_id, assignment.id.attempt] = assignment
        told = {"num_tokens": num_tokens, "cached_tokens": 3, "remaining_s": 15.0, "kept_s": 5.0} | orphan
        await self.send(orphan=wire.Orphan(assignment=assignment, **told))

    async def send(self, **message: object) -> None:
        self._link.send(wire.WorkerMessage(**message))

    async def hold(
        self, tokens: Sequence[int], cache_salt: str = "", *, snapshot: bool | None = None, is_lost: bool = False
    ) -> None:
        """Say that the prefix cache holds these tokens; the first time in a snapshot. `is_lost`: nobody hears it."""
        name, size = root_name(self.registration.model_fingerprint, cache_salt=cache_salt), 16
        names = []
        for end in range(size, len(tokens) + 1, size):
            name = block_name(name, tokens[end - size : end])
            names.append(name[:8])
        self.heartbeat.kv_sequence += 1
        sequence = self.heartbeat.kv_sequence
        change = wire.KvChange(tier=wire.KV_TIER_POOL, stored=b"".join(names))
        said = wire.KvEvents(
            sequence=sequence, snapshot=sequence == 1 if snapshot is None else snapshot, changes=[change]
        )
        if not is_lost:
            await self.send(kv_events=said)
        await self.beat()

    async def beat(self) -> None:
        reservation = self.reservation
        self.heartbeat.reservation, self.heartbeat.reservation_wanted = reservation.token, reservation.wanted
        self.heartbeat.reservation_cleared = reservation.cleared
        await self.send(heartbeat=self.heartbeat)

    @property
    def num_running(self) -> int:
        return sum(not run.done() for run in self._runs.values())

    async def _beat(self) -> None:
        assert self.welcome is not None
        while True:
            await asyncio.sleep(self.welcome.heartbeat_interval_s)
            if self.send_heartbeats:
                await self.beat()

    async def _read(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._hear()
        self.closed.set()

    async def _hear(self) -> None:
        while (message := await self._link.read()) is not None:
            kind = message.WhichOneof("message")
            if kind == "assignment":
                assignment = message.assignment
                self.assignments.append(assignment)
                key = (assignment.id.request_id, assignment.id.attempt)
                self._runs[key] = asyncio.create_task(self._serve(assignment))
            elif kind == "adopt":
                self.adopted.append(message.adopt.id)
                key = (message.adopt.id.request_id, message.adopt.id.attempt)
                if (orphan := self.orphans.pop(key, None)) is None:
                    await self.send(admission=wire.Admission(id=message.adopt.id, accepted=False, reason="not here"))
                else:
                    orphan.handle = message.adopt.handle
                    # Everything is sent again.
                    orphan.token_ids = orphan.token_ids[: TOKEN_BYTES * orphan.num_prompt_tokens]
                    self._runs[key] = asyncio.create_task(self._serve(orphan))
            elif kind == "claim":
                self.claims.append(message.claim.request_id)
                await self.on_claim()
            elif kind == "cached_tokens":
                self.cached_tokens.append(message.cached_tokens.num_tokens)
            elif kind == "reserve":
                await self.reservation.reserve(self, message.reserve.token)
            elif kind == "unreserve":
                await self.reservation.unreserve(self, message.unreserve.token)
            elif kind == "pin":
                self.pins[message.pin.id] = message.pin
            elif kind == "unpin":
                del self.pins[message.unpin.id]
            elif kind == "send_kv_snapshot":
                self.snapshots_wanted += 1
            elif kind == "drain":
                self.heartbeat.draining = True
                await self.beat()
            elif kind == "abort":
                self.aborts.append(message.abort.id)
                run = self._runs.pop((message.abort.id.request_id, message.abort.id.attempt), None)
                if run is not None:
                    run.cancel()
            async with self.heard:
                self.heard.notify_all()

    async def _serve(self, assignment: wire.Assignment) -> None:
        id = assignment.id
        well = self.heals and id.attempt > 1
        if self.refuse and not well:
            draining = self.refuses_as_draining
            await self.send(admission=wire.Admission(id=id, accepted=False, reason=self.refuse, draining=draining))
            return
        if self.reservation.holder not in (None, self):
            await self.send(admission=wire.Admission(id=id, accepted=False, reason="reserved", reserved=True))
            return
        await self.takes_up.wait()
        for cached_tokens in (3, 900):  # the second, as after a preemption, is not the client's business
            await self.send(admission=wire.Admission(id=id, accepted=True, cached_tokens=cached_tokens))
        if self.complains and assignment.HasField("prefill"):
            await self.send(progress=wire.Progress(id=id, prefill_failed=True))
        prompt = unpack(assignment.token_ids)[: assignment.num_prompt_tokens]
        sampling, first = assignment.sampling, count(assignment.token_ids) - len(prompt)
        sent, reason = first, wire.END_REASON_LENGTH
        for index in range(first, sampling.max_tokens):
            if index == self.pause_at and not well:
                await self.go.wait()
            if self.dies_of(assignment, index):
                self._death = asyncio.create_task(self.on_death())
                return
            await asyncio.sleep(self.pace_s)  # if only so that each token comes by itself
            if index == self.fail_at and not well:
                await self.send(
                    ending=wire.Ending(id=id, reason=wire.END_REASON_ERROR, num_tokens=index, detail="oops")
                )
                return
            if index == self.end_early_at and not well:
                break
            token_id = self.token_at(prompt, index)
            if index != self.skip_at or well:
                for at in range(first if self.resend_all else index, index + 1):
                    lie = 1 if at == self.lie_at and not well else 0
                    for _ in range(self.repeat):
                        await self._token(assignment, at, self.token_at(prompt, at) + lie)
            sent = index + 1
            if token_id in sampling.stop_token_ids and index >= sampling.min_tokens:
                reason = wire.END_REASON_STOP
                break
            if assignment.role == wire.ROLE_PREFILL:
                reason = wire.END_REASON_HANDED_OVER
                break
        if not self.keeps_lease:
            await self.send(ending=wire.Ending(id=id, reason=reason, num_tokens=sent))

    async def _token(self, assignment: wire.Assignment, index: int, token_id: int) -> None:
        step = wire.StepTokens(handles=[assignment.handle], indices=[index], token_ids=[token_id])
        if assignment.sampling.HasField("logprobs"):
            count = assignment.sampling.logprobs
            step.logprobs.add(
                entry=0,
                logprob=-0.5 - index / 100,
                alternative_ids=[token_id + at for at in range(count)],
                alternative_logprobs=[-0.5 - index / 100 - at for at in range(count)],
            )
        await self.send(tokens=step)
