"""A whole run against a server whose times, errors and hang-ups are known."""

import asyncio
import contextlib
import json
import os
import signal
import ssl
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import web
from openai_server import OpenAiServer, completion, event, serving, streamed, usage, waits

from cli.bench.asking import Asking
from cli.bench.client import transport_of
from cli.bench.content import WORDS, Content, prepare
from cli.bench.frames import Target
from cli.bench.load import Load
from cli.bench.measuring import CUT_OFF, REFUSED, Record
from cli.bench.options import LoadOptions, WorkloadOptions
from cli.bench.stream import AskError, Seen, now
from cli.bench.workload import sessions, warmup
from tests.authority import Authority

ROOT = Path(__file__).resolve().parent.parent.parent
CONTENT = Content(7, list(range(100, 200)), list(WORDS), 1.0)
TIMEOUT_S = 60.0


def run(main: Coroutine[Any, Any, None]) -> None:
    uvloop.run(asyncio.wait_for(main, TIMEOUT_S))


def load_of(server: OpenAiServer, options: LoadOptions, into: list[Record], chat: bool = False) -> Load:
    target = Target(server.url, "", "", "", "Bearer abc")
    transport = transport_of(target, "/v1/chat/completions" if chat else "/v1/completions")
    return Load(options, Asking(False, chat, "words", True, {}), CONTENT, transport, into.append)


async def measured(server: OpenAiServer, options: LoadOptions, **workload: Any) -> list[Record]:
    records: list[Record] = []
    load = load_of(server, options, records, workload.get("api") == "chat")
    what = WorkloadOptions(**{"input_tokens": 12, "output_tokens": 5, **workload})
    await load.measure(sessions(options, what, 3, None), now())
    return records


def test_times_are_those_of_the_server() -> None:
    async def main() -> None:
        async with serving() as server:
            server.first_s, server.step_s = 0.06, 0.02
            records = await measured(server, LoadOptions(concurrency=2, requests=6))
        assert len(records) == 6
        for each in records:
            assert (each.error, each.prompt_tokens, each.output_tokens, each.events) == ("", 12, 5, 5)
            assert each.counted
            assert each.asked_tokens == 12
            assert 0.06 <= each.ttft < 0.3
            assert 0.06 + 4 * 0.02 <= each.latency < 0.6
        assert sum(each.tpot for each in records) / 6 == pytest.approx(0.02, rel=0.5)

    run(main())


def test_a_closed_loop_keeps_its_streams_busy_and_no_more() -> None:
    async def main() -> None:
        busy = most = 0
        async with serving() as server:
            says = server.says_words

            async def answer(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                nonlocal busy, most
                busy += 1
                most = max(most, busy)
                await asyncio.sleep(0.01)
                busy -= 1
                return await says(http, body)

            server.answer = answer
            assert len(await measured(server, LoadOptions(concurrency=3, requests=20))) == 20
        assert most == 3

    run(main())


def test_an_open_loop_sends_by_the_clock_whatever_the_server_does() -> None:
    async def main() -> None:
        async with serving() as server:
            server.first_s = 0.5  # longer than all of the schedule: who waits for answers would be seen
            options = LoadOptions(rate=50.0, burstiness=float("inf"), requests=10)
            records = sorted(await measured(server, options), key=lambda each: each.start)
        assert [each.scheduled for each in records] == pytest.approx([0.02 * place for place in range(1, 11)])
        assert all(each.start >= each.scheduled for each in records)
        assert records[-1].start < 0.5, "before the first answer"

    run(main())


def test_what_waits_in_the_client_for_others_is_seen_as_such() -> None:
    async def main() -> None:
        async with serving() as server:
            server.first_s = 0.1
            records = await measured(server, LoadOptions(rate=float("inf"), requests=3, concurrency=1))
        queued = sorted(each.start - each.scheduled for each in records)
        assert queued[0] < 0.1
        assert queued[1] >= 0.1
        assert queued[2] >= 0.2
        assert all(each.ttft < 0.2 for each in records), "from when it was sent"

    run(main())


def test_connections_are_taken_up_again_and_one_that_was_closed_meanwhile_is_no_error() -> None:
    async def main() -> None:
        async with serving() as server:
            records: list[Record] = []
            load = load_of(server, LoadOptions(concurrency=1, requests=5), records)
            seen = await load.measure(
                sessions(LoadOptions(requests=5), WorkloadOptions(output_tokens=2), 3, None), now()
            )
            assert seen.health.connections == 1

            async def once(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                response = await says(http, body)
                response.force_close()
                assert http.transport is not None
                asyncio.get_running_loop().call_soon(http.transport.close)
                return response

            says, server.answer = server.says_words, once
            records = await measured(server, LoadOptions(concurrency=1, requests=4), output_tokens=2)
            assert [each.error for each in records] == [""] * 4

    run(main())


def failing(status: int, headers: dict[str, str]) -> Any:
    async def answer(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no room for you"}}, status=status, headers=headers)

    return answer


@pytest.mark.parametrize(("status", "kind"), [(429, REFUSED), (500, "HTTP 500"), (503, "HTTP 503"), (400, "HTTP 400")])
def test_errors_are_told_apart_in_the_servers_words(status: int, kind: str) -> None:
    async def main() -> None:
        async with serving() as server:
            server.answer = failing(status, {})
            records: list[Record] = []
            options = LoadOptions(concurrency=2, requests=4)
            seen = await load_of(server, options, records).measure(sessions(options, WorkloadOptions(), 3, None), now())
            assert {each.error for each in records} == {kind}
            assert seen.examples == {kind: "no room for you"}
            assert seen.gaps.count == 0

    run(main())


def test_a_refused_request_can_be_asked_again_when_the_server_says_and_its_wait_counts() -> None:
    async def main() -> None:
        async with serving() as server:
            refused: set[str] = set()
            says, refuse = server.says_words, failing(429, {"Retry-After": "1", "Retry-After-Ms": "80"})

            async def answer(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                if (key := str(body["prompt"])) not in refused:
                    refused.add(key)
                    return await refuse(http, body)
                return await says(http, body)

            server.answer = answer
            records = await measured(server, LoadOptions(concurrency=2, requests=4, retry_after=True))
        assert [(each.error, each.refusals) for each in records] == [("", 1)] * 4
        assert all(each.ttft >= 0.079 for each in records), "uvloop counts whole milliseconds"

    run(main())


async def hangs(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await streamed(http)
    await response.write(event(completion(" w")))
    await asyncio.sleep(TIMEOUT_S)
    return response


async def hangs_up(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await streamed(http)
    await response.write(event(completion(" w")))
    assert http.transport is not None
    http.transport.abort()
    return response


async def breaks_off(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await streamed(http)
    await response.write(event(completion(" w")))
    return response


async def fails_later(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await streamed(http)
    await response.write(event(completion(" w")))
    await response.write(event({"error": {"message": "the worker died"}}))
    return response


async def is_no_stream(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.json_response(completion(" all at once", "stop"))


async def says_nonsense(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await streamed(http)
    await response.write(b"data: {nonsense\n\n")
    return response


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (hangs, "timed out"),
        (hangs_up, "hung up"),
        (breaks_off, "broke off"),
        (fails_later, "error in the stream"),
        (is_no_stream, "not a stream"),
        (says_nonsense, "not OpenAI's events"),
    ],
)
def test_what_a_bad_server_does_ends_in_an_error_of_its_kind(answer: Any, kind: str) -> None:
    async def main() -> None:
        async with serving() as server:
            server.answer = answer
            records = await measured(server, LoadOptions(concurrency=1, requests=2, request_timeout_s=0.3))
            assert [each.error for each in records] == [kind] * 2
            server.answer = server.says_words
            assert [each.error for each in await measured(server, LoadOptions(concurrency=1, requests=1))] == [""]

    run(main())


def test_nobody_there_is_an_error_of_each_request_and_of_no_more() -> None:
    async def main() -> None:
        server = OpenAiServer()
        server.url = "http://127.0.0.1:9"
        records = await measured(server, LoadOptions(concurrency=2, requests=4))
        assert [each.error for each in records] == ["cannot connect"] * 4

    run(main())


def test_an_interrupted_run_keeps_what_was_measured() -> None:
    async def main() -> None:
        async with serving() as server:
            server.answer = hangs
            records: list[Record] = []
            options = LoadOptions(concurrency=3, requests=9)
            load = load_of(server, options, records)
            measuring = asyncio.create_task(load.measure(sessions(options, WorkloadOptions(), 3, None), now()))
            while len(server.bodies) < 3:
                await asyncio.sleep(0.005)
            measuring.cancel()
            seen = await measuring
        assert [each.error for each in records] == [CUT_OFF] * 3
        assert seen.health.connections == 3

    run(main())


def test_turns_ask_with_all_that_was_said() -> None:
    async def main() -> None:
        async with serving() as server:
            records = await measured(server, LoadOptions(concurrency=1, requests=3), turns=3, api="chat")
            messages = [body["messages"] for body in server.bodies]
        assert [len(each) for each in messages] == [1, 3, 5]
        assert messages[1][:1] == messages[0]
        assert messages[2][:3] == messages[1]
        assert messages[2][1] == {"role": "assistant", "content": " w0 w1 w2 w3 w4"}
        assert [each.turn for each in sorted(records, key=lambda each: each.start)] == [0, 1, 2]
        assert [each.asked_tokens for each in records] == [12, 12 + 5 + 12, 29 + 5 + 12]
        assert [each.prompt_tokens for each in records] == [12, 29, 46]

    run(main())


def test_later_turns_of_an_open_loop_are_due_when_they_are_sent() -> None:
    async def main() -> None:
        async with serving() as server:
            server.first_s = 0.05
            records = await measured(server, LoadOptions(rate=50.0, requests=4), turns=2, api="chat")
        assert sorted(each.turn for each in records) == [0, 0, 1, 1]
        assert all(each.scheduled == each.start for each in records if each.turn)
        assert all(each.scheduled <= each.start for each in records)

    run(main())


def test_time_ends_a_closed_loop_and_what_runs_then_is_counted() -> None:
    async def main() -> None:
        async with serving() as server:
            server.first_s = 0.12
            records = await measured(server, LoadOptions(concurrency=2, duration_s=0.2))
        assert len(records) >= 2
        assert [each.error for each in records] == [""] * len(records)
        assert all(each.start <= 0.2 for each in records)
        assert max(each.start + each.latency for each in records) > 0.2

    run(main())


def test_an_event_that_names_the_role_alone_is_no_first_token() -> None:
    async def main() -> None:
        async with serving() as server:

            async def answer(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                response = await streamed(http)
                for wait_s, delta, end in (
                    (0.0, {"role": "assistant", "content": ""}, None),
                    (0.08, {"content": "a"}, None),
                    (0.0, {}, "stop"),
                ):
                    await waits(wait_s)
                    await response.write(event({"choices": [{"index": 0, "delta": delta, "finish_reason": end}]}))
                return response

            server.answer = answer
            (seen,) = await measured(server, LoadOptions(concurrency=1, requests=1), api="chat")
        assert (seen.error, seen.events, seen.output_tokens, seen.counted) == ("", 1, 1, False)
        assert seen.ttft >= 0.08

    run(main())


def test_a_session_whose_turn_failed_asks_no_more() -> None:
    async def main() -> None:
        async with serving() as server:
            server.answer = failing(500, {})
            options, records = LoadOptions(concurrency=1, requests=6), list[Record]()
            what = WorkloadOptions(turns=3, api="chat")
            seen = await load_of(server, options, records, True).measure(sessions(options, what, 3, None), now())
        assert [each.turn for each in records] == [0, 0]
        assert seen.unasked == 4

    run(main())


def test_warm_up_is_sent_and_measured_nowhere() -> None:
    async def main() -> None:
        async with serving() as server:
            options, what, records = LoadOptions(concurrency=2, requests=3, warmup=5), WorkloadOptions(), list[Record]()
            load = load_of(server, options, records)
            warm = await load.warm_up(warmup(options, what, 3, None))
            assert (len(warm), len(server.bodies), records) == (5, 5, [])
            seen = await load.measure(sessions(options, what, 3, None), now())
            assert len(records) == 3
            assert seen.gaps.count == 3 * (128 - 1)
            assert sum(seen.timeline.tokens) == 3 * 128

    run(main())


def test_bodies_ask_for_a_stream_with_usage_and_carry_the_key() -> None:
    async def main() -> None:
        async with serving() as server:
            await measured(server, LoadOptions(concurrency=1, requests=1))
            body, headers = server.bodies[0], server.headers[0]
        assert body.pop("prompt")
        assert body == {
            "model": "words", "max_tokens": 5, "temperature": 0, "stream": True, "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        assert headers["Authorization"] == "Bearer abc"

    run(main())


def test_https_is_trusted_by_the_authority_that_is_named_and_by_no_other(tmp_path: Path) -> None:
    files = Authority(tmp_path / "ours", "ours").sign("server")
    other = Authority(tmp_path / "others", "others").sign("server").ca
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(files.cert, files.key)

    async def main() -> None:
        async with serving(tls) as server:
            for ca, error in ((files.ca, ""), (other, "cannot connect")):
                transport = transport_of(Target(server.url, ca, "", "", ""), "/v1/completions")
                options, records = LoadOptions(concurrency=2, requests=4), list[Record]()
                load = Load(options, Asking(False, False, "words", True, {}), CONTENT, transport, records.append)
                await load.measure(sessions(options, WorkloadOptions(output_tokens=3), 3, None), now())
                await transport.close()
                assert [each.error for each in records] == [error] * 4

    run(main())


# Bytes come in any pieces


async def answered_with(pieces: list[bytes], close: bool = False) -> tuple[Seen, str]:
    """What a client makes of a server that sends these bytes, each when the one before has been read."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.002)
        if close:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    transport = transport_of(Target(f"http://127.0.0.1:{port}", "", "", "", ""), "/v1/completions")
    seen = Seen(keep=True)
    try:
        async with asyncio.timeout(5.0):
            await transport.ask(b"{}", seen)
    except AskError as error:
        return seen, error.kind
    finally:
        await transport.close()
        server.close()
    return seen, ""


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
BODY = (
    b": a comment\r\n\r\n" + event(completion("a")) + event(completion("")) + event(completion("b"))
    + event(completion("", "stop")) + event(usage(3, 4)) + b"data: [DONE]\n\n"
)  # fmt: skip


def chunked(data: bytes, size: int) -> bytes:
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(b"%x;ext=1\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\nX-Trailer: 1\r\n\r\n"


WHOLE = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY, 37)


@pytest.mark.parametrize("size", [7, 64, 1 << 20])
def test_an_answer_is_understood_however_its_bytes_are_cut(size: int) -> None:
    async def main() -> None:
        seen, error = await answered_with([WHOLE[at : at + size] for at in range(0, len(WHOLE), size)])
        assert error == ""
        assert seen.texts == ["a", "", "b", ""]
        assert len(seen.times) == 3, "what only says how it ended is no piece of it"
        assert (seen.prompt_tokens, seen.output_tokens, seen.finished) == (3, 4, True)

    run(main())


def test_an_answer_may_end_with_its_connection_or_its_length() -> None:
    async def main() -> None:
        for head, close in ((HEAD + b"\r\n", True), (HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY), False)):
            seen, error = await answered_with([head, BODY], close)
            assert (error, len(seen.times)) == ("", 3)

    run(main())


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ([b"SSH-2.0-OpenSSH_9.2\r\n\r\n"], "not HTTP/1.1"),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"], "not HTTP/1.1"),
        ([b"x" * 70_000], "not HTTP/1.1"),
        ([WHOLE[:-60]], "hung up"),
        ([HEAD[:20]], "hung up"),
    ],
)
def test_what_is_no_answer_is_an_error(pieces: list[bytes], kind: str) -> None:
    async def main() -> None:
        assert (await answered_with(pieces, close=True))[1] == kind

    run(main())


# Lengths


def test_prompts_are_exact_by_the_servers_tokens_and_about_right_by_its_usage() -> None:
    async def one_each(text: str) -> list[int]:
        return [len(word) for word in text.split()]

    async def nothing(text: str) -> list[int]:
        raise LookupError

    async def two_each(text: str) -> int:
        return 9 + 2 * len(text.split())

    async def silence(text: str) -> int:
        return 0

    async def main() -> None:
        exact = await prepare(1, "", one_each, two_each)
        assert (exact.source, exact.content.tokens_per_word) == ("/tokenize of the server", 1.0)
        counted = await prepare(1, "", nothing, two_each)
        assert (counted.content.tokens_per_word, counted.content.ids) == (2.0, [])
        guessed = await prepare(1, "", nothing, silence)
        assert "guess" in guessed.source

    run(main())


# The command


def first_child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


async def bench(
    server: OpenAiServer, *words: str, interrupt_after: int = 0, kill_one_after: int = 0
) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "cli.main", "bench", "--url", server.url, *words,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        if interrupt_after:
            while len(server.bodies) < interrupt_after:
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGINT)
        if kill_one_after:
            while len(server.bodies) < kill_one_after:
                await asyncio.sleep(0.01)
            os.kill(first_child_of(process.pid), signal.SIGKILL)
        said, _ = await process.communicate()
        return process.returncode or 0, said.decode()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


def test_the_command_measures_with_processes_and_writes_json_and_a_page(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving() as server:
            server.first_s, server.step_s = 0.03, 0.005
            status, said = await bench(
                server, "--concurrency", "4", "--clients", "2", "--requests", "21", "--warmup", "3", "--input-tokens",
                "9", "--output-tokens", "4", "--goodput", "ttft:1", "e2el:60000", "--json", str(tmp_path / "r.json"),
                "--html", str(tmp_path / "r.html"), "--detailed", "--label", "<b>mine</b>",
            )  # fmt: skip
            assert status == 0, said
            assert len(server.bodies) == 24
        result = json.loads((tmp_path / "r.json").read_text())
        assert (result["completed"], result["failed"], result["num_prompts"]) == (21, 0, 21)
        assert result["total_input_tokens"] == 21 * 9
        assert result["total_output_tokens"] == 21 * 4
        assert result["request_goodput"] == 0.0, "no server answers within a millisecond here"
        assert result["mean_ttft_ms"] >= 30
        assert [len(each) for each in result["itls"]] == [3] * 21
        assert len(set(result["start_times"])) == 21
        assert result["baton"]["health"]["clients"] == 2
        assert result["max_concurrency"] == 4
        page = (tmp_path / "r.html").read_text()
        assert page.count("<svg") == 8
        assert "&lt;b&gt;mine" in page
        assert not [each for each in ("http-equiv", "<script", "src=", "@import", "url(") if each in page]

    run(main())


def test_ctrl_c_writes_what_was_measured(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving() as server:
            number, says = 0, server.says_words

            async def answer(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                nonlocal number
                number += 1
                return await (says if number <= 4 else hangs)(http, body)

            server.answer = answer
            path = tmp_path / "r.json"
            status, said = await bench(server, "--concurrency", "2", "--json", str(path), interrupt_after=6)
            assert status == 130, said
        result = json.loads(path.read_text())
        assert (result["completed"], result["failed"], result["baton"]["cut_off"]) == (4, 0, 2)
        assert "interrupted" in said

    run(main())


def test_a_process_that_dies_while_it_sends_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving() as server:
            server.first_s, path = 0.02, tmp_path / "r.json"
            words = ("--concurrency", "2", "--clients", "2", "--requests", "60", "--output-tokens", "2")
            status, said = await bench(server, *words, "--json", str(path), kill_one_after=6)
            assert status == 0, said
        result = json.loads(path.read_text())
        assert result["baton"]["lost_clients"] == 1
        assert 30 <= result["completed"] < 60, "all of the one that lived"
        assert "1 of the processes that send died" in said

    run(main())


def test_nobody_there_ends_the_command_with_words() -> None:
    async def main() -> None:
        server = OpenAiServer()
        server.url = "http://127.0.0.1:9"
        status, said = await bench(server)
        assert status == 1
        assert "nobody answers at http://127.0.0.1:9" in said
        assert "Traceback" not in said

    run(main())


def test_a_server_that_fails_all_of_the_warm_up_is_not_measured() -> None:
    async def main() -> None:
        async with serving() as server:
            server.answer = failing(500, {})
            status, said = await bench(server, "--warmup", "2", "--requests", "50")
            assert (status, len(server.bodies)) == (1, 2)
            assert "the whole warm-up failed (2 x HTTP 500): no room for you" in said

    run(main())
