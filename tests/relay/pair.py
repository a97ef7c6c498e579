"""A prefill and a decode worker in one process: real engines, pools, roles and hand-over; the coordinator is the test.

`Pair.generate` plays the coordinator for one request and returns what a client would get.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from baton.config import EngineOptions, HandoverOptions, TierOptions
from baton.token_ids import pack
from baton.v1 import worker_link_pb2 as wire
from cli.assembly import NO_TIERS, Parts, Wired, assemble, wire_up
from engine.loading import LoadedModel, load_model
from kvtransfer.wire import PeerIdentity

TIMEOUT_S = 120.0
_numbers = itertools.count(1)


@dataclass
class Stream:
    """Everything that workers sent about one attempt."""

    tokens: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, float] = field(default_factory=dict)
    first_logprobs: dict[str, wire.StepLogprob] = field(default_factory=dict)
    """Of the first token, by the worker that says it."""
    senders: dict[int, set[str]] = field(default_factory=dict)
    endings: dict[str, wire.Ending] = field(default_factory=dict)
    cached_tokens: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def output(self) -> list[int]:
        return [self.tokens[index] for index in sorted(self.tokens)]


class Worker:
    """One worker of the pair and what it said."""

    coordinator = 0

    def __init__(self, name: str, parts: Parts, streams: dict[int, Stream], ids: dict[str, Stream]) -> None:
        self.name = name
        self.parts = parts
        self.identity = PeerIdentity(name, next(_numbers))
        self.wired: Wired | None = None
        self.crash: BaseException | None = None
        self._streams = streams
        self._ids = ids

    @property
    def shell(self) -> Wired:
        assert self.wired is not None
        return self.wired

    def counters(self) -> dict[str, float]:
        return dict(self.shell.shell.heartbeat().counters)

    def crashed(self, error: BaseException) -> None:
        self.crash = error
        for stream in self._ids.values():
            stream.changed.set()

    def send(self, message: wire.WorkerMessage) -> None:
        match message.WhichOneof("message"):
            case "tokens":
                self._on_tokens(message.tokens)
            case "ending":
                stream = self._ids[message.ending.id.request_id]
                stream.endings[self.name] = message.ending
                stream.changed.set()
            case "admission":
                stream = self._ids[message.admission.id.request_id]
                if message.admission.accepted:
                    stream.cached_tokens[self.name] = message.admission.cached_tokens
                else:
                    stream.refusals[self.name] = message.admission.reason
                    stream.changed.set()

    def _on_tokens(self, step: wire.StepTokens) -> None:
        for handle, index, token in zip(step.handles, step.indices, step.token_ids, strict=True):
            stream = self._streams[handle]
            assert stream.tokens.setdefault(index, token) == token, "two workers disagree about a token"
            stream.senders.setdefault(index, set()).add(self.name)
        for logprob in step.logprobs:
            stream, index = self._streams[step.handles[logprob.entry]], step.indices[logprob.entry]
            stream.logprobs[index] = logprob.logprob
            if index == 0:
                stream.first_logprobs[self.name] = wire.StepLogprob()
                stream.first_logprobs[self.name].CopyFrom(logprob)
                stream.first_logprobs[self.name].entry = 0


class Pair:
    def __init__(self, prefill: Parts | None, decode: Parts) -> None:
        self._streams: dict[int, Stream] = {}
        self._ids: dict[str, Stream] = {}
        self.decode = Worker("decode", decode, self._streams, self._ids)
        self.prefill = Worker("prefill", prefill, self._streams, self._ids) if prefill else None

    def start(
        self, token_ids: Sequence[int], max_tokens: int, *, remote: bool, num_prompt_tokens: int | None = None,
        sampling: wire.EngineSampling | None = None, deadline_s: float = TIMEOUT_S,
        holder: Worker | None = None, at: Worker | None = None, cache_salt: str = "",
    ) -> tuple[str, Stream]:  # fmt: skip
        """Send the assignments of one request; both at the same time when it is to be handed over.

        `holder`: named to whoever computes the prompt as having all of it. `at`: who decodes, if not the decode worker.
        """
        number, stream = next(_numbers), Stream()
        id = wire.AttemptId(request_id=f"r{number}", attempt=1)
        self._streams[number] = self._ids[id.request_id] = stream
        assignment = wire.Assignment(
            id=id, handle=number, role=wire.ROLE_DECODE, token_ids=pack(token_ids),
            num_prompt_tokens=num_prompt_tokens or len(token_ids),
            sampling=sampling or wire.EngineSampling(top_p=1.0, repetition_penalty=1.0, logprobs=0),
            deadline_s=deadline_s, cache_salt=cache_salt,
        )  # fmt: skip
        holders = [wire.PrefixHolder(worker=self.peer(holder), num_tokens=len(token_ids))] if holder else []
        assignment.sampling.max_tokens = max_tokens
        if remote:
            assert self.prefill is not None
            assignment.prefill.CopyFrom(self.peer(self.prefill))
            to_prefill = wire.Assignment()
            to_prefill.CopyFrom(assignment)
            to_prefill.role = wire.ROLE_PREFILL
            to_prefill.ClearField("prefill")
            to_prefill.decode.CopyFrom(self.peer(self.decode))
            to_prefill.holders.extend(holders)
            self.prefill.shell.shell.on_assignment(self.prefill, to_prefill)
        else:
            assignment.holders.extend(holders)
        decode = at or self.decode
        decode.shell.shell.on_assignment(decode, assignment)
        return id.request_id, stream

    @staticmethod
    def peer(worker: Worker) -> wire.HandoverPeer:
        return wire.HandoverPeer(
            worker_id=worker.identity.worker_id, incarnation=worker.identity.incarnation,
            handover_address=worker.shell.handover_address,
        )  # fmt: skip

    async def finished(self, stream: Stream, worker: str = "decode") -> Stream:
        """Until the worker reported an ending or a refusal."""
        async with asyncio.timeout(TIMEOUT_S):
            while worker not in stream.endings and worker not in stream.refusals:
                await stream.changed.wait()
                stream.changed.clear()
                assert self.decode.crash is None, repr(self.decode.crash)
        return stream

    async def generate(
        self, token_ids: Sequence[int], max_tokens: int, *, remote: bool = False, cache_salt: str = ""
    ) -> Stream:
        return await self.finished(self.start(token_ids, max_tokens, remote=remote, cache_salt=cache_salt)[1])

    async def whole(self) -> None:
        """Both pools have every block free or cached, soon."""
        async with asyncio.timeout(30):
            for worker in filter(None, (self.prefill, self.decode)):
                steps = worker.shell.shell.steps
                while True:
                    blocks = (await steps.call(lambda engine: engine.load())).blocks
                    if blocks.free + blocks.cached == blocks.total:
                        break
                    await asyncio.sleep(0.01)
                await steps.call(lambda engine: engine.check_idle())


@asynccontextmanager
async def relay(
    model: LoadedModel, *, lanes: str = "shm", prefill: EngineOptions | None = None,
    decode: EngineOptions | None = None, handover: HandoverOptions | None = None, giver: LoadedModel | None = None,
    prefill_tiers: TierOptions = NO_TIERS, decode_tiers: TierOptions = NO_TIERS,
) -> AsyncIterator[Pair]:  # fmt: skip
    """A pair over one model; `prefill` None leaves the decode worker alone. `giver`: the prefill worker's own model."""
    handover = handover or HandoverOptions(lanes=lanes)
    pair = Pair(
        assemble(giver or model, prefill, tiers=prefill_tiers, writes_to_peers=handover.direct_wait_s > 0)
        if prefill
        else None,
        assemble(model, decode or EngineOptions(), tiers=decode_tiers),
    )
    async with AsyncExitStack() as stack:
        both = [wire.ROLE_PREFILL, wire.ROLE_DECODE]  # a prefill worker stands in for those that decode
        for worker, roles in ((pair.prefill, both), (pair.decode, [wire.ROLE_DECODE])):
            if worker is not None:
                worker.wired = await stack.enter_async_context(
                    wire_up(worker.parts, worker.identity, roles, handover, "127.0.0.1", worker.send, worker.crashed)
                )
        yield pair


def load(folder: Path) -> LoadedModel:
    return load_model(folder, "float32")
