"""A short relay to look at: a decode worker and, for each lane, a prefill worker that serves that lane alone.

All are in this process, and this module plays their coordinator. What happens:

1. A few streams begin on the decode worker, which prefills their short prompts itself.
2. While they run, a long prompt is handed over by each prefill worker, in chunks.
3. The first of the long prompts comes once more with another end: both pools find its beginning in their prefix cache.
"""

import asyncio
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

from baton.config import EngineOptions, HandoverOptions
from baton.errors import BatonError
from baton.token_ids import pack
from baton.v1 import worker_link_pb2 as wire
from cli.assembly import Parts, Wired, assemble, wire_up
from cli.profiling.watching import Notes, TransferSpan, now, watched, watched_transfers
from engine.loading import LoadedModel
from engine.pool import BlockShape
from kvtransfer.wire import PeerIdentity

TIMEOUT_S = 120.0
NUM_STREAMS, STREAM_TOKENS, LONG_TOKENS = 4, 24, 8
SHORT_PROMPT = 48


@dataclass
class Stream:
    """One request as its coordinator sees it; times in nanoseconds."""

    name: str
    prompt: list[int]
    max_tokens: int
    sent_ns: int = 0
    first_token_ns: int = 0
    end_ns: int = 0
    num_tokens: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    failure: str = ""


@dataclass(frozen=True)
class Recorded:
    """What happened, to be drawn."""

    workers: list[Notes]
    transfers: list[TransferSpan]
    streams: dict[str, Stream]
    """By the attempt's key, which is the engine's request id."""
    page_size: int
    block_bytes: int


class _Worker:
    """One worker, and its messages to the coordinator."""

    coordinator = 0

    def __init__(self, parts: Parts, notes: Notes, number: int, coordinator: "_Coordinator") -> None:
        self.parts = parts
        self.notes = notes
        self.identity = PeerIdentity(notes.worker, number)
        self.wired: Wired | None = None
        self._coordinator = coordinator

    async def start(self, stack: AsyncExitStack, role: "wire.Role.ValueType", options: HandoverOptions) -> None:
        self.wired = await stack.enter_async_context(
            wire_up(self.parts, self.identity, [role], options, "127.0.0.1",
                    self.send, self._coordinator.on_crash)
        )  # fmt: skip

    def assign(self, assignment: wire.Assignment) -> None:
        assert self.wired is not None, "started before anything is assigned"
        self.wired.shell.on_assignment(self, assignment)

    def send(self, message: wire.WorkerMessage) -> None:
        self._coordinator.on_message(message)

    @property
    def peer(self) -> wire.HandoverPeer:
        assert self.wired is not None, "started before anything is assigned"
        return wire.HandoverPeer(
            worker_id=self.identity.worker_id, incarnation=self.identity.incarnation,
            handover_address=self.wired.handover_address,
        )  # fmt: skip


class _Coordinator:
    """Assigns streams and hears how they go."""

    def __init__(self) -> None:
        self.streams: dict[str, Stream] = {}
        self._by_handle: dict[int, Stream] = {}

    def send(self, stream: Stream, decode: _Worker, prefill: _Worker | None) -> None:
        """Both assignments of a stream at the same time, or that of the decode worker alone."""
        handle = len(self._by_handle) + 1
        id = wire.AttemptId(request_id=stream.name, attempt=1)
        self.streams[f"{id.request_id}/{id.attempt}"] = self._by_handle[handle] = stream
        assignment = wire.Assignment(
            id=id, handle=handle, role=wire.ROLE_DECODE, token_ids=pack(stream.prompt), deadline_s=TIMEOUT_S,
            num_prompt_tokens=len(stream.prompt),
            sampling=wire.EngineSampling(top_p=1.0, repetition_penalty=1.0, max_tokens=stream.max_tokens),
        )  # fmt: skip
        stream.sent_ns = now()
        if prefill is not None:
            given = wire.Assignment()
            given.CopyFrom(assignment)
            given.role = wire.ROLE_PREFILL
            given.decode.CopyFrom(decode.peer)
            assignment.prefill.CopyFrom(prefill.peer)
            prefill.assign(given)
        decode.assign(assignment)

    def on_message(self, message: wire.WorkerMessage) -> None:
        match message.WhichOneof("message"):
            case "tokens":
                for handle, index in zip(message.tokens.handles, message.tokens.indices, strict=True):
                    stream = self._by_handle[handle]
                    stream.first_token_ns = stream.first_token_ns or now()
                    stream.num_tokens = max(stream.num_tokens, index + 1)
            case "ending" if message.ending.reason != wire.END_REASON_HANDED_OVER:
                stream = self.streams[f"{message.ending.id.request_id}/{message.ending.id.attempt}"]
                self._end(stream, message.ending.detail)
            case "admission" if not message.admission.accepted:
                stream = self.streams[f"{message.admission.id.request_id}/{message.admission.id.attempt}"]
                self._end(stream, message.admission.reason)

    def on_crash(self, error: BaseException) -> None:
        for stream in self._by_handle.values():
            self._end(stream, f"the engine crashed: {error!r}")

    @staticmethod
    def _end(stream: Stream, failure: str) -> None:
        if not stream.ended.is_set():
            stream.end_ns, stream.failure = now(), failure
            stream.ended.set()


async def finished(streams: Sequence[Stream]) -> None:
    """Raises BatonError when one fails, or does not end in time."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            for stream in streams:
                await stream.ended.wait()
    except TimeoutError as error:
        raise BatonError(f"the traced requests did not end within {TIMEOUT_S:g} s") from error
    for stream in streams:
        if stream.failure or stream.num_tokens < stream.max_tokens:
            raise BatonError(f"traced request {stream.name} failed: {stream.failure or 'tokens are missing'}")


async def record_relay(
    model: LoadedModel, engine: EngineOptions, handover: HandoverOptions, lanes: Sequence[str], long_tokens: int
) -> Recorded:
    """Run the workload of the module with long prompts of so many tokens. Raises BatonError when it fails."""
    coordinator = _Coordinator()
    options = replace(engine, kv_memory=str(_pool_bytes(model, engine, long_tokens)))
    with watched_transfers() as transfers:
        async with AsyncExitStack() as stack:
            workers: list[_Worker] = []
            # The decode worker comes last, so that it stops first: it would miss the others.
            wanted = [(f"prefill-{lane}", wire.ROLE_PREFILL, lane) for lane in lanes]
            for name, role, served in [*wanted, ("decode", wire.ROLE_DECODE, handover.lanes)]:
                watch = watched(model, name)
                parts = await asyncio.to_thread(assemble, watch.model, options, watch.build)
                watch.notes.take_steps()
                worker = _Worker(parts, watch.notes, len(workers) + 1, coordinator)
                workers.append(worker)
                await worker.start(stack, role, replace(handover, lanes=served))
            await _drive(coordinator, workers, model.config.vocab_size, long_tokens, engine.page_size)
    block_bytes = workers[0].parts.memory.block_bytes
    return Recorded([each.notes for each in workers], transfers, coordinator.streams, engine.page_size, block_bytes)


def _pool_bytes(model: LoadedModel, options: EngineOptions, long_tokens: int) -> int:
    """Room for all requests side by side, so that nobody is preempted in a picture of ordinary work."""
    positions = NUM_STREAMS * (SHORT_PROMPT + STREAM_TOKENS) + 3 * (long_tokens + LONG_TOKENS)
    shape = BlockShape.of(model.config, options.page_size, model.dtype)
    return (positions // options.page_size + 2 * (NUM_STREAMS + 3)) * shape.block_bytes


async def _drive(
    coordinator: _Coordinator, workers: list[_Worker], vocab_size: int, long_tokens: int, page_size: int
) -> None:
    numbers = random.Random(2)
    *prefills, decode = workers

    def prompt(length: int) -> list[int]:
        return [numbers.randrange(vocab_size) for _ in range(length)]

    short = [Stream(f"stream {n}", prompt(SHORT_PROMPT), STREAM_TOKENS) for n in range(1, NUM_STREAMS + 1)]
    for stream in short:
        coordinator.send(stream, decode, None)
    long = [Stream(f"long from {prefill.notes.worker}", prompt(long_tokens), LONG_TOKENS) for prefill in prefills]
    for stream, prefill in zip(long, prefills, strict=True):
        coordinator.send(stream, decode, prefill)
    await finished([*short, *long])
    if prefills:
        known = long[0].prompt[: max(page_size, long_tokens // 2 // page_size * page_size)]
        again = Stream("long with a cached beginning", known + prompt(long_tokens - len(known)), LONG_TOKENS)
        coordinator.send(again, decode, prefills[0])
        await finished([again])
