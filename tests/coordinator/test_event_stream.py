"""A stream of events: what a step brought in one write, nothing beyond what a slow client takes, signs of life."""

import asyncio
import gc
import json
import re
import socket
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from aiohttp import HttpVersion10, HttpVersion11
from coordinator_harness import running

from baton.v1 import worker_link_pb2 as wire
from coordinator.delivery import AnswerForm, Choice, Delta, Position, Request
from coordinator.detokenizer import TextStream, WindowDetokenizer
from coordinator.event_stream import ALIVE, EventStream, EventStreams
from coordinator.failures import FailureKind, RequestFailed
from coordinator.openai_answers import (
    SSE_DONE,
    AnswerWriter,
    ChatChunkChoice,
    ChatText,
    CompletionChoice,
    sse,
)

Run = Callable[[Coroutine[Any, Any, Any]], Any]


class Connection:
    """A client's, as aiohttp shows it."""

    def __init__(self, version: Any = HttpVersion11) -> None:
        self.version = version
        self.written: list[bytes] = []
        self.closing = False
        self.room = asyncio.Event()
        self.room.set()
        self.transport = SimpleNamespace(write=self.written.append, is_closing=lambda: self.closing)
        self.writer = SimpleNamespace(drain=self.room.wait)
        self.protocol = self

    @property
    def writing_paused(self) -> bool:
        return not self.room.is_set()

    def text(self) -> bytes:
        """What was in the chunks, each of which must be whole."""
        data = b""
        for chunk in self.written:
            size, rest = chunk.split(b"\r\n", 1)
            assert rest.endswith(b"\r\n")
            assert len(rest) == int(size, 16) + 2
            data += rest[:-2]
        return data


def a_request(num_choices: int = 1, chat: bool = False, include_usage: bool = False, **form: bool) -> Request:
    """Whose tokens are characters."""
    asked = AnswerForm(chat=chat, include_usage=include_usage, choices_per_prompt=num_choices, **form)
    request = Request("r" * 20, form=asked)
    for _ in range(num_choices):
        text = TextStream(WindowDetokenizer(lambda ids: "".join(map(chr, ids))))
        Choice(request, 0, [65], wire.EngineSampling(max_tokens=1000), text, False)
    return request


def say(request: Request, text: str, choice: int = 0) -> None:
    stream = request.choices[choice].stream
    for character in text:
        stream.tokens.append(ord(character))
        request.choices[choice].add(ord(character), None, False)


def end(request: Request, failure: RequestFailed | None = None) -> None:
    """As the dispatcher does."""
    for choice in request.choices if failure is None else ():
        choice.end("length")
    request.ended, request.failure = True, failure
    request.wake()


def stream_of(
    request: Request, http: Connection, streams: EventStreams | None = None, elsewhere: bool = False
) -> EventStream:
    writer = AnswerWriter(request, "demo", lambda id: chr(id).encode())
    reader = request.reader or request.attach()
    streams = streams or EventStreams(60.0)
    return EventStream(http, request, reader, writer, streams, lambda request: elsewhere)  # type: ignore[arg-type]


def begin(
    request: Request, http: Connection, streams: EventStreams | None = None, deltas: Any = (), elsewhere: bool = False
) -> "asyncio.Task[bytes]":
    stream = stream_of(request, http, streams, elsewhere)
    if (first := stream.begin(deltas)) and deltas != ():
        http.written.append(b"%x\r\n%b\r\n" % (len(first), first))
    return asyncio.create_task(stream.run())


async def turns(count: int = 4) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_what_a_step_brought_to_all_choices_is_one_write(run: Run) -> None:
    async def main() -> None:
        request, http = a_request(3), Connection()
        running = begin(request, http)
        await turns()
        for choice in (0, 1, 2):
            say(request, "ab", choice)
        await turns()
        assert len(http.written) == 1
        assert http.text().count(b'"text":"ab"') == 3
        end(request)
        rest = await running
        assert rest.endswith(SSE_DONE)
        assert rest.count(b'"finish_reason":"length"') == 3
        assert request.on_news is None

    run(main())


def test_a_slow_client_gets_all_of_it_and_what_waits_for_it_is_tokens(run: Run) -> None:
    async def main() -> None:
        request, http = a_request(), Connection()
        running = begin(request, http)
        await turns()
        say(request, "a")
        await turns()
        http.room.clear()
        for character in "bcdefgh":  # each a step
            say(request, character)
            await turns()
        assert len(http.written) == 1, "more was written to a connection without room"
        http.room.set()
        await turns()
        assert len(http.written) == 2
        assert b'"text":"bcdefgh"' in http.written[1]
        http.room.clear()
        say(request, "i")
        end(request)
        http.room.set()
        assert (await running).endswith(SSE_DONE)

    run(main())


def test_silence_is_filled_with_signs_of_life_and_only_silence(run: Run) -> None:
    async def main() -> None:
        silent, talking, streams = a_request(), a_request(), EventStreams(60.0)
        quiet, loud = Connection(), Connection()
        tasks = [begin(silent, quiet, streams, deltas=None), begin(talking, loud, streams)]
        await turns()
        say(talking, "x")
        await turns()
        (quiet_one,) = (stream for stream in streams._open if stream._request is silent)
        for signs in (2, 3, 4):  # the first one was due with the head of the answer
            quiet_one.wrote_at -= 55.0  # as if nearly a minute had passed
            streams._tick()
            assert quiet.text() == ALIVE * signs
            streams._tick()
            assert quiet.text() == ALIVE * signs
            say(talking, "x")
            await turns()
            assert streams._timer is not None
            assert streams._timer.when() - asyncio.get_running_loop().time() == pytest.approx(60.0, abs=5.0)
        assert ALIVE not in loud.text()
        end(silent)
        end(talking)
        await asyncio.gather(*tasks)
        streams._tick()
        assert streams._timer is None, "a timer of nobody runs"

    run(main())


def test_a_client_that_another_coordinator_would_serve_is_let_go_at_its_next_silence(run: Run) -> None:
    async def main() -> None:
        request, http = a_request(), Connection()
        assert await begin(request, http, EventStreams(0.01), deltas=None, elsewhere=True) == b""
        assert http.written == []

    run(main())


def test_what_was_delivered_is_written_before_the_failure_is_raised(run: Run) -> None:
    async def main() -> None:
        request, http = a_request(), Connection()
        running = begin(request, http)
        await turns()
        say(request, "ab")
        end(request, RequestFailed(FailureKind.TIMEOUT, "too long"))
        with pytest.raises(RequestFailed, match="too long"):
            await running
        assert b'"text":"ab"' in http.text()

    run(main())


def test_a_failure_between_the_first_token_and_the_stream_is_not_missed(run: Run) -> None:
    async def main() -> None:
        request, http = a_request(), Connection()
        reader = request.attach()
        say(request, "a")
        deltas = request.take(reader)
        end(request, RequestFailed(FailureKind.TIMEOUT, "too long"))
        with pytest.raises(RequestFailed, match="too long"):
            await begin(request, http, deltas=deltas)
        assert b'"text":"a"' in http.text()

    run(main())


def test_of_two_readers_the_later_one_goes_on(run: Run) -> None:
    async def main() -> None:
        request, first, second = a_request(), Connection(), Connection()
        old = begin(request, first)
        await turns()
        say(request, "ab")
        await turns()
        request.attach()
        new = begin(request, second)
        with pytest.raises(RequestFailed) as caught:
            await old
        assert caught.value.kind is FailureKind.SUPERSEDED
        say(request, "c")
        end(request)
        rest = await new
        assert re.findall(rb'"text":"(\w*)"', second.text() + rest) == [b"ab", b"c"]

    run(main())


def test_a_reader_whose_first_write_took_until_a_later_one_came_leaves_that_alone(run: Run) -> None:
    async def main() -> None:
        request, slow, later = a_request(), Connection(), Connection()
        say(request, "a")
        slow_one = stream_of(request, slow)
        slow_one.begin(())
        request.attach()
        running = begin(request, later)
        await turns()
        with pytest.raises(RequestFailed) as raised:
            await slow_one.run()
        assert raised.value.kind is FailureKind.SUPERSEDED
        say(request, "b")
        await turns()
        assert slow.written == []
        assert re.findall(rb'"text":"(\w*)"', later.text()) == [b"a", b"b"]
        end(request)
        await running

    run(main())


def test_a_client_that_is_gone_ends_its_stream(run: Run) -> None:
    async def main() -> None:
        request, http = a_request(), Connection()
        running = begin(request, http)
        await turns()
        http.closing = True
        say(request, "a")
        with pytest.raises(ConnectionError):
            await running

    run(main())


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_client_that_is_gone_leaves_nothing_for_the_collector_of_garbage(run: Run, cancelled: bool) -> None:
    """`cancelled`: its handler is, between the write that failed and when it would have heard of that."""

    async def gone() -> None:
        request, http = a_request(), Connection()
        running = begin(request, http)
        await turns()
        http.closing = True
        say(request, "a")
        await asyncio.sleep(0)
        if cancelled:
            running.cancel()
        await asyncio.wait([running])
        assert running.cancelled() if cancelled else isinstance(running.exception(), ConnectionError)
        say(request, "b")  # which nobody takes any more
        request.ended = True
        request.forget()

    async def main() -> list[object]:
        await gone()
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            await gone()
            gc.collect()
            return [each for each in gc.garbage if isinstance(each, Request | Choice | EventStream)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    assert not run(main())


def test_a_mistake_of_ours_ends_a_stream_instead_of_leaving_it_without_an_end(run: Run) -> None:
    async def main() -> None:
        request, http = a_request(), Connection()
        running = begin(request, http)
        await turns()
        http.transport.write = lambda data: 1 // 0
        say(request, "a")
        with pytest.raises(ZeroDivisionError):
            await running

    run(main())


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("include_usage", [False, True])
def test_an_event_that_is_filled_in_is_the_one_that_would_be_encoded(chat: bool, include_usage: bool) -> None:
    request = a_request(2, chat, include_usage)
    writer = AnswerWriter(request, "demo", lambda id: chr(id).encode())
    kind, usage = "chat.completion.chunk" if chat else "text_completion", None if include_usage else msgspec.UNSET
    if chat:
        for choice in (0, 1):
            assert b'"role":"assistant"' in writer.chunk(Delta(choice, 0, 0, [0], "first", digest="0123abcd"))
    for index, text in enumerate(["a", 'quote "', "back \\ slash", "\n\t\x01", "日本語", "\U0001f642", "</s>", "\0"]):
        for choice in (0, 1):
            event = writer.chunk(Delta(choice, 0, index, [index], text, digest="0123abcd"))
            body = ChatChunkChoice(choice, ChatText(content=text), None, None)
            whole = writer._answer(kind, [body if chat else CompletionChoice(choice, text, None, None)], usage)
            assert event == sse(whole, writer._event_id())


@pytest.mark.parametrize("chat", [False, True])
def test_every_event_may_say_what_was_used_so_far(chat: bool, run: Run) -> None:
    """As load generators want it; after a resumption the count goes on where it was."""

    async def main() -> None:
        async with running() as system:
            await system.worker()
            path, prompt = ("chat/completions", {"messages": [{"role": "user", "content": "hello"}]}) if chat else (
                "completions", {"prompt": "hello"}
            )  # fmt: skip
            options = {"include_usage": True, "continuous_usage_stats": True}
            body = {"model": "demo", **prompt, "max_tokens": 5, "stream": True, "stream_options": options}
            async with system.http.post(f"/v1/{path}", json=body) as response:
                lines = (await response.text()).splitlines()
            usages = [json.loads(line[6:])["usage"] for line in lines if line.startswith("data: {")]
            counts = [usage["completion_tokens"] for usage in usages]
            assert counts == sorted(counts)
            assert counts[-1] == 5
            assert len(set(counts)) > 2
            assert len({usage["prompt_tokens"] for usage in usages}) == 1

    run(main())
    request = a_request(2, chat, include_usage=True, continuous_usage=True)
    positions = [Position(3, False, "0123abcd"), Position()]
    writer = AnswerWriter(request, "demo", lambda id: chr(id).encode(), positions)
    event = writer.chunk(Delta(0, 0, 3, [7, 8], "x", digest="4567cdef"))
    assert json.loads(event.split(b"data: ")[1])["usage"]["completion_tokens"] == 5, "what came before is counted"


def test_a_client_of_http_1_0_gets_a_stream_that_its_connection_ends(run: Run) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker()
            body = json.dumps({"model": "demo", "prompt": "hello", "max_tokens": 5, "stream": True}).encode()
            head = f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            port = system.ports.http
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(client, head.encode() + b"\r\n" + body)
                answer = b""
                while data := await loop.sock_recv(client, 1 << 16):
                    answer += data
            assert b"chunked" not in answer
            text = answer.split(b"\r\n\r\n", 1)[1]
            assert text.endswith(SSE_DONE)
            events = text.removesuffix(SSE_DONE).split(b"\n\n")[:-1]
            assert all(re.match(rb'id: [^\n]+\ndata: \{"id":', event) for event in events)

    run(main())


def test_a_stream_without_chunks_is_for_http_1_0_alone(run: Run) -> None:
    async def main() -> None:
        request, http = a_request(), Connection(HttpVersion10)
        running = begin(request, http)
        await turns()
        say(request, "a")
        await turns()
        assert http.written[0].startswith(b"id: ")
        end(request)
        await running

    run(main())
