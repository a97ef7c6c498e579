"""An HTTP engine that computes nothing, as SGLang's router expects its workers: for gateways that forward HTTP.

    python -m benchmarks.peers.mock_engine [--mode prefill|decode|null] [--step-ms 12] [--count 1] [--port 0]

It prints its addresses, `count` of them. All running streams get their next token at the same moment, as from a real
batch, each in a chunk of its own that was encoded before: it takes as little as it can of the cores that it shares.
"""

import argparse
import asyncio
import json
import time
from typing import Any

import uvloop
from aiohttp import web

DONE = b"data: [DONE]\n\n"


class MockEngine:
    def __init__(self, mode: str, step_s: float) -> None:
        self._mode, self._step_s = mode, step_s
        self._streams: dict[_Stream, None] = {}
        self._has_work = asyncio.Event()

    def application(self) -> web.Application:
        app = web.Application(client_max_size=1 << 24)
        facts: dict[str, Any] = {"model_path": "mock", "served_model_name": "mock", "tokenizer_path": "mock"}
        facts |= {"is_generation": True, "disaggregation_mode": self._mode, "page_size": 16, "version": "0"}
        for path in ("/server_info", "/get_server_info", "/model_info", "/get_model_info"):
            app.router.add_get(path, _always(facts))
        app.router.add_get("/v1/models", _always({"object": "list", "data": [{"id": "mock", "object": "model"}]}))
        app.router.add_get("/v1/loads", _always({"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0}]}))
        for path in ("/health", "/health_generate", "/metrics"):
            app.router.add_get(path, _always({}))
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def run(self) -> None:
        """Steps, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            if not self._streams:
                self._has_work.clear()
                await self._has_work.wait()
            started = loop.time()
            for stream in list(self._streams):
                if not stream.advance():
                    del self._streams[stream]
            await asyncio.sleep(max(0.0, started + self._step_s - loop.time()))

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        if self._mode == "prefill":  # its answer is read and thrown away
            return web.json_response({"choices": [], "usage": {}})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        stream = _Stream(http, int(body.get("max_tokens") or 16))
        self._streams[stream] = None
        self._has_work.set()
        try:
            await stream.ended
            await response.write_eof(stream.last + DONE)
        except ConnectionError:  # the gateway has seen enough
            pass
        finally:
            self._streams.pop(stream, None)
        return response


class _Stream:
    def __init__(self, http: web.Request, num_tokens: int) -> None:
        self._http = http
        id, created = f"chatcmpl-{time.monotonic_ns()}", int(time.time())
        events = [
            _event(id, created, index, "length" if index == num_tokens - 1 else None) for index in range(num_tokens)
        ]
        self._chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in events[:-1]]
        self._chunks.reverse()
        self.last = events[-1]
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def advance(self) -> bool:
        """Its next token; False for the last one, which whoever waits for its end writes."""
        transport = self._http.transport
        if self._chunks and transport is not None:
            transport.write(self._chunks.pop())
            return True
        if not self.ended.done():
            self.ended.set_result(None)
        return False


def _event(id: str, created: int, index: int, finish_reason: str | None) -> bytes:
    choice = {"index": 0, "delta": {"content": f" token{index}"}, "logprobs": None, "finish_reason": finish_reason}
    event = {"id": id, "object": "chat.completion.chunk", "created": created, "model": "mock", "choices": [choice]}
    return f"data: {json.dumps(event, separators=(',', ':'))}\n\n".encode()


def _always(body: dict[str, Any]) -> Any:
    async def answer(http: web.Request) -> web.Response:
        return web.json_response(body)

    return answer


async def _serve(arguments: argparse.Namespace) -> None:
    engine = MockEngine(arguments.mode, arguments.step_ms / 1e3)
    runner = web.AppRunner(engine.application(), access_log=None)
    await runner.setup()
    for _ in range(arguments.count):
        await web.TCPSite(runner, "127.0.0.1", arguments.port).start()
    for address in runner.addresses:
        print(f"http://127.0.0.1:{address[1]}", flush=True)
    await engine.run()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--mode", choices=("prefill", "decode", "null"), default="null")
    parser.add_argument("--step-ms", type=float, default=12.0)
    uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
