"""An HTTP engine that computes nothing, as SGLang's router expects its workers: for gateways that forward HTTP.

python -m benchmarks.peers.mock_engine --port 0 --mode prefill|decode|null --step-ms 12
"""

import argparse
import asyncio
import json
import time
from typing import Any

import uvloop
from aiohttp import web


class MockEngine:
    def __init__(self, mode: str, step_s: float) -> None:
        self._mode, self._step_s = mode, step_s

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

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        if self._mode == "prefill":  # its answer is read and thrown away
            return web.json_response({"choices": [], "usage": {}})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        id, created = f"chatcmpl-{time.monotonic_ns()}", int(time.time())
        loop = asyncio.get_running_loop()
        at = loop.time()
        last = int(body.get("max_tokens") or 16) - 1
        for index in range(last + 1):
            choice = {"index": 0, "delta": {"content": f" token{index}"}, "logprobs": None}
            choice["finish_reason"] = "length" if index == last else None
            event = {"id": id, "object": "chat.completion.chunk", "created": created, "model": "mock"}
            text = json.dumps({**event, "choices": [choice]}, separators=(",", ":"))
            await response.write(f"data: {text}\n\n".encode() + (b"data: [DONE]\n\n" if index == last else b""))
            at += self._step_s
            await asyncio.sleep(max(0.0, at - loop.time()))
        await response.write_eof()
        return response


def _always(body: dict[str, Any]) -> Any:
    async def answer(http: web.Request) -> web.Response:
        return web.json_response(body)

    return answer


async def _serve(arguments: argparse.Namespace) -> None:
    runner = web.AppRunner(MockEngine(arguments.mode, arguments.step_ms / 1e3).application(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", arguments.port).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--mode", choices=("prefill", "decode", "null"), default="null")
    parser.add_argument("--step-ms", type=float, default=12.0)
    uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
