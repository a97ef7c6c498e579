"""Starting, draining and ending a coordinator."""

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import aiohttp
import grpc
import pytest
from coordinator_harness import DEMO_FOLDER, OPTIONS, System, running, until

from baton.config import CoordinatorOptions, ModelOptions
from baton.errors import ConfigurationError, ModelError
from baton.v1 import inference_pb2 as api
from coordinator.delivery import Choice, Request
from coordinator.server import Coordinator


@pytest.mark.parametrize("flag", ["--port", "--grpc-port", "--link-port"])
def test_a_port_in_use_is_named_by_its_flag_and_nothing_stays_open(run, flag: str) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            name = flag.removeprefix("--").replace("-", "_")
            options = CoordinatorOptions(**(OPTIONS | {name: port}))
            with pytest.raises(ConfigurationError, match=f"{flag} {port} .*choose another with {flag}"):
                await Coordinator(options, ModelOptions(), DEMO_FOLDER).start()

    run(main())


def test_a_second_coordinator_on_the_same_grpc_port_is_refused(run) -> None:
    async def main() -> None:
        async with running() as system:
            for name, port in (("grpc_port", system.ports.grpc), ("link_port", system.ports.link)):
                options = CoordinatorOptions(**(OPTIONS | {name: port}))
                with pytest.raises(ConfigurationError, match="in use"):
                    await Coordinator(options, ModelOptions(), DEMO_FOLDER).start()

    run(main())


def test_a_bad_model_folder_is_refused_before_any_port_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Coordinator(CoordinatorOptions(**OPTIONS), ModelOptions(), tmp_path)


def test_draining_finishes_what_runs_and_refuses_what_is_new(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker()
            worker.pause_at = 3
            body = {"prompt": "x", "max_tokens": 6}
            held = asyncio.create_task(system.http.post("/v1/completions", json=body))
            await worker.wait_for(lambda: bool(worker.assignments))
            drain = asyncio.create_task(system.coordinator.drain())
            await asyncio.sleep(0)
            for path in ("/ready", "/health"):
                async with system.http.get(path) as response:
                    assert response.status == (503 if path == "/ready" else 200)
            async with system.http.post("/v1/completions", json=body) as response:
                assert response.status == 503
                assert response.headers["Retry-After"] == "1"
                assert response.headers["Connection"] == "close"
            async with system.http.get("/v1/streams/of-another-coordinator") as response:
                assert response.status == 503, "try elsewhere: a 404 would say that nobody has it"
            assert not drain.done()
            worker.go.set()
            response = await held
            assert (await response.json())["usage"]["completion_tokens"] == 6
            await asyncio.wait_for(drain, 2)

    run(main())


def test_who_is_told_to_go_serves_on_for_its_notice_and_sends_everybody_elsewhere(run) -> None:
    async def main() -> None:
        async with running(drain_notice_s=1.0) as system:
            await system.worker()
            body = {"prompt": "x", "max_tokens": 2}
            reader, writer = await asyncio.open_connection("127.0.0.1", system.ports.http)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert await reader.readuntil(b"}")
            assert not reader.at_eof()
            told = api.GenerateRequest(text="x", sampling=api.Sampling(max_tokens=2))
            drain = asyncio.create_task(system.coordinator.drain())
            await asyncio.sleep(0)
            async with system.http.get("/ready") as response:
                assert response.status == 503
            async with system.http.post("/v1/completions", json=body) as response:
                assert response.status == 200
                assert response.headers["Connection"] == "close"
            assert [answer async for answer in system.inference.Generate(told)]
            assert not reader.at_eof(), "it may still ask"
            assert await asyncio.wait_for(reader.read(), 5) == b"", "not to be refused by this connection"
            assert system.coordinator.dispatcher.draining
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                [answer async for answer in system.inference.Generate(told)]
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            writer.close()
            await asyncio.wait_for(drain, 2)

    run(main())


def test_a_stream_that_ends_during_the_notice_leaves_its_connection_for_one_more_request(run) -> None:
    """Its head said that the connection stays: a client that asks at once would ask into a closing one."""

    async def main() -> None:
        async with running(drain_notice_s=30.0) as system:
            worker = await system.worker()
            worker.pause_at = 1
            reader, writer = await asyncio.open_connection("127.0.0.1", system.ports.http)
            body = json.dumps({"prompt": "x", "max_tokens": 2, "stream": True}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert b"close" not in await reader.readuntil(b"\r\n\r\n")
            drain = asyncio.create_task(system.coordinator.drain())
            await asyncio.sleep(0)
            worker.go.set()
            await asyncio.wait_for(reader.readuntil(b"[DONE]\n\n\r\n0\r\n\r\n"), 5)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            last = await asyncio.wait_for(reader.read(), 5)
            assert last.startswith(b"HTTP/1.1 200")
            assert b"Connection: close" in last
            writer.close()
            drain.cancel()

    run(main())


def test_what_does_not_finish_in_time_is_told_so(run) -> None:
    async def main() -> None:
        async with running(drain_timeout_s=0.1) as system:
            worker = await system.worker()
            worker.pause_at = 1
            body = {"prompt": "x", "max_tokens": 6, "stream": True}
            response = await system.http.post("/v1/completions", json=body)
            await system.coordinator.drain()
            stop = asyncio.create_task(system.coordinator.stop())
            text = await response.text()
            assert json.loads(text.strip().split("\n\n")[-1].rpartition("data: ")[2])["error"]["code"] == "unavailable"
            await stop

    run(main())


def test_what_does_not_finish_in_time_is_handed_on_as_if_the_process_had_died(run) -> None:
    async def main() -> None:
        async with running(drain_timeout_s=0.1) as system:
            worker = await system.worker()
            worker.pause_at = 2
            body = {"prompt": "x", "max_tokens": 6}
            stream = await system.http.post("/v1/completions", json=body | {"stream": True})
            assert stream.status == 200
            whole = asyncio.create_task(system.http.post("/v1/completions", json=body))
            left = await system.http.post(
                "/v1/completions", json=body | {"stream": True}, headers={"X-Baton-Resume-S": "5"}
            )
            call = system.inference.Generate(api.GenerateRequest(text="x", sampling=api.Sampling(max_tokens=6)))
            assert (await anext(aiter(call))).token_ids
            await worker.wait_for(lambda: len(worker.assignments) == 4)
            drain = asyncio.create_task(system.coordinator.drain())
            left.close()  # it may come back, wherever that is
            await drain
            await system.coordinator.hand_on()
            await asyncio.wait_for(worker.closed.wait(), 2)
            assert worker.aborts == [], "it goes on with all of them"
            with pytest.raises(aiohttp.ClientPayloadError):
                await stream.read()
            with pytest.raises(aiohttp.ServerDisconnectedError):
                await whole
            with pytest.raises(grpc.aio.AioRpcError, match="resume it") as raised:
                [response async for response in call]
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            assert system.metric("baton_requests_total", outcome="handed_on") == 4
            await asyncio.wait_for(system.coordinator.stop(), 2)

    run(main())


SERVE = """
import asyncio, sys, uvloop
from pathlib import Path
from baton.config import CoordinatorOptions, ModelOptions
from coordinator.server import serve
options = CoordinatorOptions(port=0, grpc_port=0, link_port=0, parent_pid=int(sys.argv[2]))
ready = lambda ports: print(ports.http, ports.grpc, ports.link, flush=True)
uvloop.run(serve(options, ModelOptions(), Path(sys.argv[1]), ready))
print("ended", flush=True)
"""


def spawn(parent_pid: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SERVE, str(DEMO_FOLDER), str(parent_pid)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_coordinator_cleanly(number: signal.Signals) -> None:
    with spawn(0) as process:
        assert process.stdout is not None
        assert len(process.stdout.readline().split()) == 3
        process.send_signal(number)
        assert process.stdout.readline() == "ended\n"
        assert process.wait(10) == 0


def test_a_coordinator_whose_parent_is_gone_ends() -> None:
    with subprocess.Popen(["sleep", "60"]) as parent, spawn(parent.pid) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        parent.kill()
        parent.wait(5)
        assert process.stdout.readline() == "ended\n"
        assert process.wait(10) == 0


def test_the_coordinator_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, coordinator.server; sys.exit(bool({'torch', 'transformers', 'engine'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("ends", ["whole", "streamed", "hung up", "refused", "gRPC"])
def test_a_request_that_is_over_leaves_nothing_for_the_collector_of_garbage(run, ends: str) -> None:
    """Which would stop every stream for as long as it looks."""

    async def ask(system: System) -> None:
        chat = {"model": "demo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        if ends == "gRPC":
            call = system.inference.Generate(api.GenerateRequest(text="hello", sampling=api.Sampling(max_tokens=4)))
            assert [each async for each in call]
        else:
            chat |= {"stream": ends != "whole"} | ({"max_ttft_s": 1e-6} if ends == "refused" else {})
            async with system.http.post("/v1/chat/completions", json=chat) as answer:
                assert answer.status == (429 if ends == "refused" else 200)
                if ends != "hung up":
                    assert await answer.read()
        await until(lambda: not system.coordinator.dispatcher.requests)

    async def found(system: System) -> list[object]:
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for _ in range(3):
                await ask(system)
            await asyncio.sleep(0)
            gc.collect()
            return [each for each in gc.garbage if isinstance(each, Request | Choice)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    async def test() -> None:
        async with running() as system:
            await system.worker()
            assert await system.openai.completions.create(model="demo", prompt="hello", max_tokens=2)
            others = int(ends == "refused")
            system.coordinator.dispatcher.num_streams += others
            await ask(system)
            assert not await found(system)
            system.coordinator.dispatcher.num_streams -= others

    run(test())
