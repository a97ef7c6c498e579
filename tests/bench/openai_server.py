"""A server of OpenAI's API whose times and failures are set by a test, in this process."""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Answer = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


def completion(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}}


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def prompt_tokens(body: dict[str, Any]) -> int:
    if "messages" in body:
        return sum(len(str(message["content"]).split()) for message in body["messages"])
    prompt = body["prompt"]
    return len(prompt.split()) if isinstance(prompt, str) else len(prompt)


async def waits(seconds: float) -> None:
    """Not less: uvloop's timers, of whole milliseconds, may fire a part of one early."""
    end = time.monotonic() + seconds
    await asyncio.sleep(seconds)
    while (left := end - time.monotonic()) > 0:
        await asyncio.sleep(left)


async def streamed(http: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(http)
    return response


class OpenAiServer:
    """`first_s`: to the first token; `step_s`: from one to the next. `answer` takes the place of all that."""

    def __init__(self) -> None:
        self.first_s, self.step_s = 0.0, 0.0
        self.answer: Answer = self.says_words
        self.can_tokenize = True
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""

    async def says_words(self, http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response, number = await streamed(http), int(body["max_tokens"])
        await waits(self.first_s)
        for index in range(number):
            if index:
                await waits(self.step_s)
            end = "length" if index == number - 1 else None
            if "messages" in body:
                choice = {"index": 0, "delta": {"content": f" w{index}"}, "finish_reason": end}
                await response.write(event({"choices": [choice]}))
            else:
                await response.write(event(completion(f" w{index}", end)))
        if body.get("stream_options"):
            await response.write(event(usage(prompt_tokens(body), number)))
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self.bodies.append(body)
        self.headers.append(dict(http.headers))
        if not body.get("stream"):
            return web.json_response({"usage": {"prompt_tokens": prompt_tokens(body), "completion_tokens": 1}})
        return await self.answer(http, body)

    async def _tokenize(self, http: web.Request) -> web.Response:
        if not self.can_tokenize:
            raise web.HTTPNotFound
        words = (await http.json())["prompt"].split()
        return web.json_response({"tokens": [sum(word.encode()) for word in words]})

    async def _models(self, http: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "words"}]})


@asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[OpenAiServer]:
    server, app = OpenAiServer(), web.Application(client_max_size=1 << 24)
    app.router.add_post("/v1/completions", server._generate)
    app.router.add_post("/v1/chat/completions", server._generate)
    app.router.add_post("/tokenize", server._tokenize)
    app.router.add_get("/v1/models", server._models)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    try:
        server.url = f"http{'s' if tls else ''}://127.0.0.1:{runner.addresses[0][1]}"
        yield server
    finally:
        await runner.cleanup()
