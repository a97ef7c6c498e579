"""The fast path of tokens writes what the slow one would, and knows when it is not to be taken."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

import pytest
from aiohttp import HttpVersion11
from hypothesis import given, settings
from hypothesis import strategies as st
from outbox import Outbox

from baton.config import CoordinatorOptions
from baton.cork import Cork
from baton.v1 import worker_link_pb2 as wire
from coordinator.delivery import AnswerForm, Choice, Request
from coordinator.detokenizer import ByteLevelDetokenizer, Detokenizer, TextStream, TokenTexts, WindowDetokenizer
from coordinator.dispatch import Dispatcher
from coordinator.event_stream import EventStream, EventStreams
from coordinator.fast_path import MAX_TOKEN_ID, library
from coordinator.metrics import Metrics
from coordinator.openai_answers import AnswerWriter
from coordinator.workers import Leg, Worker, WorkerRegistry

STOP_TOKEN: Final = 300
MAX_TOKENS: Final = 30
PLAIN: Final = [ord(each) for each in 'ab "\\\n']
BYTES: Final = [*"é€😀".encode(), 0xC0, 0xED, 0xA0, 0xF5]
"""Tokens of a part of a character, or of none."""
CONTROLS: Final = [0, 8, 9, 11, 12, 13, 31, 127]
ECHO: Final = 301
"""Says the token before it once more: its text depends on its company, so that it takes a window."""
SILENT: Final = 302
"""Has no text, as special tokens have none."""
LONG: Final = 303
"""Says more than a connection takes at once."""
FAR: Final = MAX_TOKEN_ID + 1


def said_by(token_id: int) -> str | bytes:
    named = {SILENT: "", LONG: "long " * 200_000, FAR: "_"}
    return named[token_id] if token_id in named else chr(token_id) if token_id < 128 else bytes([token_id])


TEXTS: Final = TokenTexts(said_by)


def byte_level() -> Detokenizer:
    return ByteLevelDetokenizer(TEXTS)


def window() -> Detokenizer:
    return WindowDetokenizer(decoded)


def decoded(token_ids: list[int]) -> str:
    said: list[int] = []
    for each in token_ids:
        said.append(each if each != ECHO else said[-1] if said else ord("?"))
    return bytes(said).decode(errors="replace")


@pytest.fixture(autouse=True)
def compiler() -> None:
    if library() is None:
        pytest.skip("the fast path cannot be compiled here")


class Connection:
    """A client's, as aiohttp shows it, and its transport. `corked`: as the coordinator's listener makes them."""

    def __init__(self, corked: bool) -> None:
        self.version = HttpVersion11
        self.own, self.clients = socket.socketpair()
        self.own.setblocking(False)
        self.clients.setblocking(False)
        self.unsent = b""
        self.reads, self.closing, self.encrypted = True, False, False
        self._got = b""
        self._ahead = 0
        """Bytes on their way that are none of ours: they fill it."""
        self.room = asyncio.Event()
        self.room.set()
        self.protocol = self.writer = self
        self.transport: Any = Cork().transport(self) if corked else self  # type: ignore[arg-type]

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"socket": self.own, "sslcontext": self if self.encrypted else None}[name]

    def write(self, data: bytes) -> None:
        self.unsent += data
        self._flush()

    def _flush(self) -> None:
        try:
            while self.unsent:
                self.unsent = self.unsent[self.own.send(self.unsent) :]
            self.room.set()
        except BlockingIOError:
            self.room.clear()
        except BrokenPipeError:
            self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return len(self.unsent)

    @property
    def writing_paused(self) -> bool:
        return not self.room.is_set()

    async def drain(self) -> None:
        await self.room.wait()

    @property
    def written(self) -> bytes:
        """What the client got."""
        if self.reads:
            self._receive()
        return self._got

    def _receive(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            while data := self.clients.recv(1 << 20):
                self._got += data

    def stop_reading(self) -> None:
        """There is no room for anything now."""
        if not self.reads:
            return
        self._receive()
        self.reads = False
        with contextlib.suppress(BlockingIOError):
            while True:
                self._ahead += self.own.send(b"." * 4096)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._ahead += self.own.send(b".")

    def read(self) -> None:
        self.reads = True
        had = len(self._got)
        self._receive()
        self._got = self._got[:had] + self._got[had + self._ahead :]
        self._ahead = 0
        while self.unsent and not self.closing:
            self._flush()
            self._receive()


class Client:
    """A request, the stream of its events, and what its worker was told."""

    def __init__(
        self, world: "World", id: str, corked: bool, num_choices: int = 1, stops: Sequence[str] = (),
        continuous_usage: bool = False, detokenizer: Callable[[], Detokenizer] = byte_level, **sampling: Any,
    ) -> None:  # fmt: skip
        self._world = world
        self.request = Request(id, form=AnswerForm(chat=True, continuous_usage=continuous_usage))
        self.request.created_unix_s = 0
        self.http = Connection(corked)
        asked = wire.EngineSampling(max_tokens=MAX_TOKENS, stop_token_ids=[STOP_TOKEN], **sampling)
        for _ in range(num_choices):
            text = TextStream(detokenizer(), stops)
            Choice(self.request, 0, [1, 2, 3], asked, text, False)
        self.choice = self.request.choices[0]
        self.rest = b""
        world.dispatcher.start(self.request)
        self.running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        reader = self.request.attach()
        deltas = await self.request.deltas(reader)
        writer = AnswerWriter(self.request, "demo", lambda token_id: b"")
        events = EventStream(
            self.http, self.request, reader, writer, self._world.streams, lambda request: False  # type: ignore[arg-type]
        )  # fmt: skip
        self.http.write(events.begin(deltas))
        self.rest = await events.run()

    @property
    def on_fast_path(self) -> bool:
        return self.choice.fast_path in self._world.worker.fast_paths.entered.values()

    def seen(self) -> bytes:
        """All that its client got, as any client would have."""
        return (self.http.written + self.rest).replace(self.request.id.encode(), b"id")

    def text(self) -> str:
        shown = [json.loads(line[6:]) for line in self.seen().splitlines() if line.startswith(b"data: {")]
        return "".join(each["choices"][0]["delta"].get("content", "") for each in shown)


class World:
    """A coordinator with one worker that decodes, whose part the test plays."""

    def __init__(self) -> None:
        self._registry = WorkerRegistry("demo")
        options = CoordinatorOptions(max_attempts=100, local_prefill_tokens=0)
        self.dispatcher = Dispatcher(options, self._registry, Metrics())
        self.worker = self.joins("w", wire.ROLE_DECODE)
        self.streams = EventStreams(60.0)

    def joins(self, id: str, role: "wire.Role.ValueType") -> Worker:
        registration = wire.Registration(
            protocol_version=wire.LINK_PROTOCOL_VERSION, worker_id=id, incarnation=1, roles=[role],
            page_size_tokens=16, total_blocks=64, max_model_tokens=512, model="demo", handover_address="x",
            model_version="v", model_fingerprint="v",
        )  # fmt: skip
        return self._registry.register(registration, Outbox())

    def say(self, **message: Any) -> None:
        self.dispatcher.on_message(self.worker, wire.WorkerMessage(**message))

    def token(self, clients: list["Client"], token_id: int, back: int = 0) -> None:
        """The next one of each, or one that is so much before it."""
        legs = [self.leg(each) for each in clients]
        indices = [len(each.choice.stream.tokens) - back for each in clients]
        token_ids = [token_id] * len(clients)
        self.say(tokens=wire.StepTokens(handles=[leg.handle for leg in legs], indices=indices, token_ids=token_ids))

    def leg(self, client: "Client") -> Leg:
        (leg,) = self.dispatcher.legs(client.choice)
        return leg

    async def has_had(self, num_tokens: int) -> "Client":
        """One that is on the fast path."""
        client = Client(self, "r", corked=True)
        for _ in range(num_tokens):
            await turns()
            self.token([client], PLAIN[0])
        assert client.on_fast_path
        return client


async def turns() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


ACTIONS: Final = (
    ["plain"] * 6
    + ["bytes"] * 4
    + ["echo"] * 3
    + ["repeat", "waits", "has computed", "slow", "reads", "look", "controls"] * 2
    + ["stop"]
)
FAILURES: Final = ["lie", "skip", "fail"]
"""Each costs the attempt; the next one goes on at the same worker."""


async def _play(draw: st.DataObject) -> None:
    world = World()
    kind = draw.draw(st.sampled_from((byte_level, window)))
    fast, slow = clients = [
        Client(world, "fast", corked=True, detokenizer=kind), Client(world, "slow", corked=False, detokenizer=kind)
    ]  # fmt: skip
    await turns()
    world.token(clients, PLAIN[0])
    await turns()
    failures = 0
    while not fast.request.ended and draw.draw(st.integers(0, 40)):
        action = draw.draw(st.sampled_from(ACTIONS + (FAILURES if failures < 3 else [])))
        if action == "echo" and kind is byte_level:
            action = "bytes"
        failures += action in FAILURES
        if action in ("plain", "bytes", "controls"):
            said = {"plain": PLAIN, "bytes": BYTES, "controls": CONTROLS}[action]
            world.token(clients, draw.draw(st.sampled_from(said)))
        elif action == "echo":
            world.token(clients, ECHO)
        elif action == "repeat":
            world.token(clients, fast.choice.stream.tokens[-1], back=1)
        elif action == "lie":
            world.token(clients, fast.choice.stream.tokens[-1] + 1, back=1)
        elif action == "skip":
            world.token(clients, PLAIN[0], back=-1)
        elif action == "stop":
            world.token(clients, STOP_TOKEN)
        elif action in ("waits", "has computed"):
            for each in clients:
                computed = 1 if action == "waits" else 1000
                world.say(progress=wire.Progress(id=world.leg(each).id, computed_tokens=computed))
        elif action == "look":
            for each in clients:
                each.choice.settle()
        elif action == "fail":
            for each in clients:
                world.say(ending=wire.Ending(id=world.leg(each).id, reason=wire.END_REASON_ERROR))
        else:
            for each in clients:
                each.http.read() if action == "reads" else each.http.stop_reading()
        await turns()
        assert fast.choice.stream.tokens == slow.choice.stream.tokens
        assert fast.seen() == slow.seen()
        assert not slow.on_fast_path
        if not fast.request.ended:
            assert (
                all(leg.remembered and not leg.waiting_tokens for leg in map(world.leg, clients))
                or not fast.on_fast_path
            )
    for each in clients:
        each.http.read()
    await turns()
    while not fast.request.ended:
        world.token(clients, PLAIN[1])
        await turns()
        assert fast.seen() == slow.seen()
    await asyncio.gather(*(each.running for each in clients))
    assert fast.seen() == slow.seen()
    for each in clients:
        each.request.attach()
    assert fast.choice.pieces == slow.choice.pieces, "for whoever comes back"
    assert fast.choice.finish_reason == slow.choice.finish_reason
    assert world.worker.fast_paths.entered == world.worker.legs == {}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_comes_a_client_gets_the_same_bytes_on_either_path(draw: st.DataObject) -> None:
    run(_play(draw))


def test_all_tokens_but_the_first_and_the_last_take_the_fast_path() -> None:
    async def main() -> None:
        world = World()
        client = Client(world, "r", corked=True)
        fast = []
        for _ in range(MAX_TOKENS):
            await turns()
            world.token([client], PLAIN[0])
            fast.append(client.on_fast_path)
        assert fast == [False] + [True] * (MAX_TOKENS - 2) + [False]
        figures = client.request.figures
        assert figures is not None
        assert figures.fast_path_tokens == MAX_TOKENS - 2
        await client.running

    run(main())


def test_where_another_worker_said_the_first_all_that_the_decode_worker_says_takes_it() -> None:
    async def main() -> None:
        world = World()
        world.joins("p", wire.ROLE_PREFILL)
        client = Client(world, "r", corked=True)
        await turns()
        prefill, decode = world.dispatcher.legs(client.choice)
        for index, leg in enumerate((prefill, decode, decode)):
            step = wire.StepTokens(handles=[leg.handle], indices=[index], token_ids=[PLAIN[index]])
            world.dispatcher.on_message(leg.worker, wire.WorkerMessage(tokens=step))
            assert client.on_fast_path is (index > 0)
            assert leg.remembered
            await turns()
        assert client.text() == "ab "
        client.choice.settle()
        assert client.request.figures is not None
        assert client.request.figures.fast_path_tokens == 2
        world.dispatcher.abort(client.request)
        await client.running

    run(main())


def test_who_goes_back_to_the_beginning_gets_again_what_took_it() -> None:
    async def main() -> None:
        world = World()
        client = await world.has_had(5)
        first, second = "é".encode()
        world.token([client], first)
        assert client.on_fast_path
        reader = client.request.attach()
        (delta,) = client.request.take(reader)
        assert (delta.text, len(delta.token_ids)) == ("aaaaa", 6)
        world.token([client], second)
        (delta,) = client.request.take(reader)
        assert delta.text == "é"
        client.running.cancel()
        await asyncio.gather(client.running, return_exceptions=True)
        assert client.request.ended is False
        world.dispatcher.abort(client.request)

    run(main())


def test_tokens_that_come_together_are_written_in_order() -> None:
    async def main() -> None:
        world = World()
        client = Client(world, "r", corked=True)
        for token_id in [*b"01234567", *"é€".encode(), *b"89"]:
            world.token([client], token_id)
            if token_id in b"0124":
                await turns()
        world.token([client], STOP_TOKEN)
        await client.running
        assert client.text() == "01234567é€89"

    run(main())


def test_a_client_that_does_not_read_gets_no_more_until_it_does() -> None:
    async def main() -> None:
        world = World()
        client = await world.has_had(5)
        client.http.stop_reading()
        waiting = []
        for _ in range(5):
            world.token([client], PLAIN[0])
            await turns()
            assert not client.on_fast_path
            waiting.append(client.http.unsent)
        assert waiting == [waiting[0]] * 5
        assert waiting[0].count(b"data: ") == 1
        client.http.read()
        await turns()
        events = [line for line in client.seen().splitlines() if line.startswith(b"id: ")]
        assert len(events) == 5 + 1 + 1, "what waited leaves in one event"
        assert client.text() == "a" * 10
        world.token([client], PLAIN[0])
        assert client.on_fast_path

    run(main())


def test_an_event_that_has_only_partly_left_is_completed_before_what_follows() -> None:
    async def main() -> None:
        world = World()
        client = await world.has_had(5)
        world.token([client], LONG)
        assert not client.on_fast_path
        assert 0 < len(client.http.unsent) < 1_000_000
        world.token([client], PLAIN[1])
        await turns()
        client.http.read()
        await turns()
        world.token([client], PLAIN[2])
        assert client.on_fast_path
        assert client.text() == "aaaaa" + "long " * 200_000 + "b "

    run(main())


def test_a_token_beyond_any_vocabulary_takes_the_slow_path() -> None:
    async def main() -> None:
        world = World()
        client = await world.has_had(5)
        world.token([client], FAR)
        assert not client.on_fast_path
        await turns()
        world.token([client], PLAIN[1])
        assert client.on_fast_path
        assert client.text() == "aaaaa_b"

    run(main())


def test_without_a_compiler_tokens_take_the_slow_path(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        world = World()
        client = Client(world, "r", corked=True)
        for token_id in b"01234":
            await turns()
            world.token([client], token_id)
        await turns()
        assert world.worker.fast_paths.entered == {}
        assert client.text() == "01234"
        world.dispatcher.abort(client.request)
        await client.running

    monkeypatch.setenv("CXX", "no-such-compiler")
    library.cache_clear()
    try:
        run(main())
    finally:
        library.cache_clear()
    assert [each.message for each in caplog.records if "no fast path" in each.message] == [
        "no fast path, so that tokens cost more: there is no C++ compiler; install g++, or name one in CXX"
    ]


@pytest.mark.parametrize("ending", ["abort", "hand on", "worker lost", "client gone", "hung up", "later reader"])
def test_nothing_is_written_after_a_stream_has_ended_or_gone_elsewhere(ending: str) -> None:
    async def main() -> None:
        world = World()
        client = await world.has_had(5)
        leg = world.leg(client)
        if ending == "abort":
            world.dispatcher.abort(client.request)
        elif ending == "hand on":
            world.dispatcher.let_go()
        elif ending == "worker lost":
            world.worker.lose("the test says so")
        elif ending == "client gone":
            client.running.cancel()
        elif ending == "hung up":
            assert client.text() == "aaaaa"
            client.http.clients.close()
        else:
            client.request.attach()
        if ending in ("worker lost", "client gone"):
            await turns()
        written = client.http.written
        for index in (5, 6, 7):
            step = wire.StepTokens(handles=[leg.handle], indices=[index], token_ids=[PLAIN[1]])
            world.say(tokens=step)
            await turns()
        assert client.http.written == written
        assert not client.on_fast_path
        if ending in ("client gone", "hung up", "later reader"):
            assert len(client.choice.stream.tokens) == 8, "they are kept for whoever comes back"
        client.running.cancel()
        await asyncio.gather(client.running, return_exceptions=True)
        assert client.text() == "aaaaa"

    run(main())


@pytest.mark.parametrize("asked", ["logprobs", "stop strings", "several choices", "usage in all events", "TLS"])
def test_what_is_more_than_text_to_a_socket_takes_the_slow_path(asked: str) -> None:
    async def main() -> None:
        world = World()
        sampling = {"logprobs": 1} if asked == "logprobs" else {}
        client = Client(
            world, "r", True, 2 if asked == "several choices" else 1, ("zz",) if asked == "stop strings" else (),
            asked == "usage in all events", **sampling,
        )  # fmt: skip
        client.http.encrypted = asked == "TLS"
        for _ in range(5):
            await turns()
            world.token([client], PLAIN[0])
        assert len(client.choice.stream.tokens) == 5
        assert world.worker.fast_paths.entered == {}
        world.dispatcher.abort(client.request)
        await client.running

    run(main())


def test_tokens_without_text_are_no_signs_of_life() -> None:
    async def main() -> None:
        world = World()
        client = await world.has_had(5)
        assert client.choice.fast_path is not None
        (stream,) = world.streams._open
        stream.wrote_at -= 1000.0
        client.choice.settle()
        client.choice.fast_path._last_write_s -= 1000.0
        world.token([client], SILENT)
        assert client.on_fast_path
        world.streams._tick()
        await turns()
        assert client.seen().endswith(b"\n:\n\r\n")
        world.dispatcher.abort(client.request)
        await client.running

    run(main())


def test_a_stream_that_tokens_come_to_is_not_silent_and_the_dashboard_knows_when_the_last_one_came() -> None:
    async def main() -> None:
        world = World()
        client = await world.has_had(5)
        (stream,) = world.streams._open
        stream.wrote_at -= 1000.0
        world.streams._tick()
        await turns()
        assert b"\n:\n" not in client.seen()
        client.choice.last_token_s = 0.0
        client.choice.settle()
        assert client.choice.last_token_s == pytest.approx(time.monotonic(), abs=30)
        assert not client.on_fast_path
        world.token([client], PLAIN[0])
        assert client.on_fast_path, "it goes on"
        world.dispatcher.abort(client.request)
        await client.running

    run(main())
