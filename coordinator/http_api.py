"""The HTTP front end: OpenAI's endpoints with SSE, and those that operators need.

A client that hangs up cancels its handler, and the handler's `finally` aborts the request in every worker, unless the
client asked that it be kept (`coordinator.resumption`). A coordinator that is shut down hangs up on its clients: see
`Coordinator.hand_on`.
"""

import asyncio
import contextlib
import ipaddress
import logging
import math
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from aiohttp import web

import baton
from baton.errors import InvalidRequestError
from coordinator import openai_api
from coordinator.dashboard.pages import FEED, Pages
from coordinator.delivery import Delta, Position, Request
from coordinator.drains import DrainRequest, Drains
from coordinator.event_stream import EventStream, EventStreams
from coordinator.failures import FailureKind, RequestFailed
from coordinator.limits import is_name_of_this_machine
from coordinator.openai_answers import SSE_DONE, AnswerWriter, ErrorBody, ErrorDetail, json_body, positions_of, sse
from coordinator.pins import CachePin
from coordinator.requests import GenerateSpec, Intake, check_request_id, new_request_id
from coordinator.resumption import Resumption
from coordinator.tenants.accounts import KeyHolder
from coordinator.tenants.caller import calling
from coordinator.tenants.gate import HttpGate
from coordinator.tenants.tenants import Tenants
from coordinator.timelines import numbered, traceparent_of
from coordinator.tracing import arriving

access = logging.getLogger("baton.access")

_HTTP_STATUS = {
    FailureKind.UNKNOWN_MODEL: (404, "invalid_request_error", "model_not_found"),
    FailureKind.UNAUTHENTICATED: (401, "invalid_request_error", "invalid_api_key"),
    FailureKind.FORBIDDEN: (403, "invalid_request_error", "insufficient_permissions"),
    FailureKind.RATE_LIMITED: (429, "rate_limit_error", "rate_limit_exceeded"),
    FailureKind.UNKNOWN_PIN: (404, "invalid_request_error", "pin_not_found"),
    FailureKind.UNKNOWN_REQUEST: (404, "invalid_request_error", "request_not_found"),
    FailureKind.ID_IN_USE: (409, "invalid_request_error", "request_id_in_use"),
    FailureKind.SUPERSEDED: (409, "invalid_request_error", "resumed_elsewhere"),
    FailureKind.DIFFERS: (409, "conflict_error", "computed_otherwise"),
    FailureKind.CANNOT_PIN: (422, "invalid_request_error", "cannot_pin"),
    FailureKind.OVERLOADED: (429, "rate_limit_error", "overloaded"),
    FailureKind.POISON: (422, "invalid_request_error", "poison"),  # no 5xx, which clients' libraries send again
    FailureKind.UNAVAILABLE: (503, "service_unavailable_error", "unavailable"),
    FailureKind.HANDED_ON: (503, "service_unavailable_error", "handed_on"),  # reaches nobody: the connection ends
    FailureKind.FILTERED: (400, "invalid_request_error", "filtered"),
    FailureKind.FILTER_FAILED: (503, "service_unavailable_error", "filter_failed"),
    FailureKind.TIMEOUT: (504, "timeout_error", "timeout"),
    FailureKind.INTERNAL: (500, "server_error", "internal_error"),
}
_BODY_TIMEOUT_S = 30.0
_PROBES = {"/health", "/ready", "/metrics", "/status", FEED}  # asked every few seconds by somebody's monitor
NOT_READY = "not ready: no worker that can decode is connected, or shutting down"
_RETRY_AFTER_S = {FailureKind.OVERLOADED: 1.0, FailureKind.UNAVAILABLE: 5.0}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class _Call:
    """What a handler tells the middleware around it."""

    chosen_id: str = ""
    request: Request | None = None

    @property
    def id(self) -> str:
        """Of the request; one is made for what has none of its own, such as a question for the models."""
        self.chosen_id = self.chosen_id or new_request_id("req")
        return self.chosen_id


_call: ContextVar[_Call] = ContextVar("call")


class _HeadWithEvents(web.StreamResponse):
    """Its head goes with the first events, in one write: it is written once they are there anyway."""

    _send_headers_immediately = False


class HttpApi:
    def __init__(
        self,
        intake: Intake,
        resumption: Resumption,
        max_body_bytes: int,
        worker_status: Callable[[], Mapping[str, Any]],
        feed: Callable[[], bytes],
        drains: Drains,
        alive_interval_s: float,
        tenants: Tenants | None = None,
    ) -> None:
        """`feed`: of the dashboard. `alive_interval_s`: of signs of life, while a stream has nothing else to say."""
        self._tenants = tenants
        self._intake = intake
        self._resumption = resumption
        self._max_body_bytes = max_body_bytes
        self._worker_status = worker_status
        self._feed = feed
        self._drains = drains
        self._streams = EventStreams(alive_interval_s)

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._outermost], client_max_size=self._max_body_bytes)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/streams/{id}", self._resume_stream)
        app.router.add_get("/v1/requests/{id}", self._resume_whole)
        app.router.add_delete("/v1/requests/{id}", self._abort)
        app.router.add_get("/v1/requests/{id}/trace", self._trace)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._model)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_post("/v1/cache/pins", self._create_pin)
        app.router.add_get("/v1/cache/pins", self._pins)
        app.router.add_get("/v1/cache/pins/{id}", self._pin)
        app.router.add_delete("/v1/cache/pins/{id}", self._delete_pin)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/status", self._status)
        app.router.add_post("/drain", self._drain)
        Pages(self._feed, _operators_only).install(app)
        if self._tenants is not None:
            HttpGate(self._tenants, _is_local).install(app)
        return app

    # Generation

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        body = openai_api.parse(await _json_bytes(http), openai_api.CompletionRequest)
        return await self._generate(http, body.spec(), bool(body.stream))

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        body = openai_api.parse(await _json_bytes(http), openai_api.ChatRequest)
        return await self._generate(http, body.spec(), bool(body.stream))

    async def _generate(self, http: web.Request, spec: GenerateSpec, stream: bool) -> web.StreamResponse:
        call = _call.get()
        resume_s = _resume_s(http)
        if chosen := http.headers.get("X-Request-Id"):
            self._resumption.check_free(check_request_id(chosen))
        call.chosen_id = id = chosen or new_request_id("chatcmpl" if spec.chat else "cmpl")
        # A client that has some of the answer asks for all of it again where nobody knows the request any more.
        positions = positions_of(http.headers.get("Last-Event-ID", "") if stream else "", id)
        if positions is None:
            return web.Response(body=SSE_DONE, content_type="text/event-stream")
        call.request = await self._intake.submit(spec, id, resume_s, asked_again=bool(positions))
        if positions:
            self._intake.metrics.resumed.labels("asked_again").inc()
        return await self._answer(http, call.request, stream, positions)

    async def _answer(
        self, http: web.Request, request: Request, stream: bool, positions: Sequence[Position] = ()
    ) -> web.StreamResponse:
        reader = request.attach(positions)
        writer = AnswerWriter(request, self._intake.model_name, self._intake.tokenizer.token_bytes, positions)
        try:
            if stream:
                return await self._stream(http, request, reader, writer)
            deltas: list[Delta] = []
            while new := await request.deltas(reader):
                deltas += new
            return _json(writer.whole(deltas))
        finally:
            self._resumption.left(request, reader)

    async def _stream(
        self, http: web.Request, request: Request, reader: int, writer: AnswerWriter
    ) -> web.StreamResponse:
        """Silence for longer than the interval means that this coordinator hangs, or is cut off from its client."""
        # Wait for the first token before saying 200: what fails until then gets a status of its own. A client that
        # resumes would rather know that somebody is here.
        deltas = await request.news(reader, self._streams.alive_s if request.resume_s else None)
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Request-Id": request.id}
        if trace := traceparent_of(request):
            headers["traceparent"] = trace
        response = _HeadWithEvents(headers=headers)
        events = EventStream(http, request, reader, writer, self._streams, self._resumption.better_elsewhere)
        first = events.begin(deltas)
        await response.prepare(http)
        try:
            try:
                if first:
                    await response.write(first)
                rest = await events.run()
            except RequestFailed as failure:
                if failure.kind is FailureKind.HANDED_ON:
                    raise
                rest = sse(_failure_body(failure))
            await response.write_eof(rest)
        except ConnectionError:
            # The client hung up while we wrote; the caller decides what becomes of the request.
            return response
        return response

    # Clients that come back

    async def _resume_stream(self, http: web.Request) -> web.StreamResponse:
        call, id = _call.get(), http.match_info["id"]
        last = http.headers.get("Last-Event-ID") or http.query.get("last_event_id", "")
        positions = positions_of(last, id)
        if positions is None:
            return web.Response(body=SSE_DONE, content_type="text/event-stream")
        call.request = await self._resumption.resume(id, positions)
        call.chosen_id = id
        return await self._answer(http, call.request, True, positions)

    async def _resume_whole(self, http: web.Request) -> web.StreamResponse:
        call, id = _call.get(), http.match_info["id"]
        call.request = await self._resumption.resume(id)
        call.chosen_id = id
        return await self._answer(http, call.request, False)

    async def _abort(self, http: web.Request) -> web.Response:
        id = http.match_info["id"]
        self._resumption.abort(id)
        return _json(json_body({"id": id, "object": "request", "aborted": True}))

    async def _trace(self, http: web.Request) -> web.Response:
        """For operators, and for whose request it is: they see no worker's name."""
        caller, timeline = calling.get(), self._intake.dispatcher.timelines.get(http.match_info["id"])
        strangers = isinstance(caller, KeyHolder) and not caller.operates
        if not strangers:
            _operators_only(http)
        if timeline is None or (strangers and not caller.owns(timeline.tenant)):
            raise RequestFailed(FailureKind.UNKNOWN_REQUEST, "this request is not among the last ones here")
        return _json(json_body(timeline.described(time.monotonic(), numbered() if strangers else str)))

    # What is here

    async def _models(self, http: web.Request) -> web.Response:
        return _json(json_body({"object": "list", "data": [self._model_card()]}))

    async def _model(self, http: web.Request) -> web.Response:
        self._intake.check_model(http.match_info["name"])
        return _json(json_body(self._model_card()))

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self._intake.model_name,
            "object": "model",
            "created": self._intake.created_unix_s,
            "owned_by": "baton",
            "max_model_len": self._intake.registry.context_tokens,
        }

    async def _tokenize(self, http: web.Request) -> web.Response:
        body = openai_api.parse(await _json_bytes(http), openai_api.TokenizeRequest)
        self._intake.check_model(body.model or "")
        tokens = await self._intake.token_ids(body.prompt_or_chat(), body.add_special_tokens)
        context = self._intake.registry.context_tokens
        return _json(json_body({"count": len(tokens), "max_model_len": context, "tokens": tokens}))

    async def _detokenize(self, http: web.Request) -> web.Response:
        body = openai_api.parse(await _json_bytes(http), openai_api.DetokenizeRequest)
        self._intake.check_model(body.model or "")
        return _json(json_body({"prompt": self._intake.text(body.tokens)}))

    # Pinned prefixes

    async def _create_pin(self, http: web.Request) -> web.Response:
        body = openai_api.parse(await _json_bytes(http), openai_api.PinRequest)
        return _json(json_body(_pin_card(await self._intake.pin(body.spec()))))

    async def _pins(self, http: web.Request) -> web.Response:
        caller, pins = calling.get(), self._intake.pins.all()
        if isinstance(caller, KeyHolder) and not caller.operates:
            pins = [pin for pin in pins if caller.owns(pin.tenant)]
        else:
            _operators_only(http)  # whoever knows the id of a pin may delete it
        return _json(json_body({"object": "list", "data": [_pin_card(pin) for pin in pins]}))

    async def _pin(self, http: web.Request) -> web.Response:
        return _json(json_body(_pin_card(self._intake.pins.get(http.match_info["id"]))))

    async def _delete_pin(self, http: web.Request) -> web.Response:
        id = http.match_info["id"]
        self._intake.pins.delete(id)
        return _json(json_body({"id": id, "object": "cache.pin", "deleted": True}))

    # About this process

    async def _health(self, http: web.Request) -> web.Response:
        return _json(b'{"status":"alive"}')

    async def _ready(self, http: web.Request) -> web.Response:
        if self._intake.ready:
            return _json(b'{"status":"ready"}')
        return _json(json_body({"status": NOT_READY}), 503)

    async def _version(self, http: web.Request) -> web.Response:
        return _json(json_body({"version": baton.__version__}))

    async def _metrics(self, http: web.Request) -> web.Response:
        _operators_only(http)
        return web.Response(
            body=await self._intake.metrics.page(), headers={"Content-Type": "text/plain; version=0.0.4"}
        )

    async def _status(self, http: web.Request) -> web.Response:
        _operators_only(http)
        return _json(json_body(self._worker_status()))

    async def _drain(self, http: web.Request) -> web.Response:
        _operators_only(http)
        asked = openai_api.parse(await _json_bytes(http), DrainRequest)
        return _json(json_body(self._drains.ask(asked)))

    # Around every request

    @property
    def _outermost(self) -> Any:
        @web.middleware
        async def outermost(http: web.Request, handler: Handler) -> web.StreamResponse:
            started_s = time.monotonic()
            call = _Call()
            _call.set(call)
            arriving.set(http.headers.get("traceparent", ""))
            code = 499  # nginx's word for a client that hung up
            try:
                response = await _answered(http, handler, call)
                code = response.status
                # What this client asks next, another coordinator answers. One that was promised its connection, before
                # it was known, may ask once more, lest it does so while the connection closes.
                dispatcher = self._intake.dispatcher
                if dispatcher.draining or (dispatcher.leaving and not response.prepared):
                    response.force_close()
                if not response.prepared:
                    with contextlib.suppress(ConnectionError):  # aiohttp finds out by itself that nobody is there
                        await response.prepare(http)
                        await response.write_eof()
                return response
            finally:
                _log_access(http, call, code, started_s)
                if http.path not in _PROBES:
                    self._intake.metrics.responses.labels("http", str(code)).inc()

        return outermost


async def _answered(http: web.Request, handler: Handler, call: _Call) -> web.StreamResponse:
    """The handler's response, or the error body for what it raised."""
    try:
        response = await handler(http)
    except InvalidRequestError as error:
        response = _error(400, str(error), "invalid_request_error", error.param, None)
    except RequestFailed as failure:
        if failure.kind is FailureKind.HANDED_ON and http.transport is not None:
            http.transport.close()  # as when this process dies: a client knows that its answer is not complete
        code = _HTTP_STATUS[failure.kind][0]
        response = _json(json_body(_failure_body(failure)), code)
        retry_after_s = failure.retry_after_s or _RETRY_AFTER_S.get(failure.kind)
        if retry_after_s is not None:
            response.headers["Retry-After"] = str(math.ceil(retry_after_s))
            response.headers["Retry-After-Ms"] = str(math.ceil(retry_after_s * 1e3))  # which OpenAI's clients prefer
    except web.HTTPException as error:
        response = _http_error(http, error)
    except Exception as error:  # noqa: BLE001 - logged, without its message
        # The exception's message is left out: it might quote a prompt.
        where = "".join(traceback.format_tb(error.__traceback__))
        access.error("%s failed on %s\n%s", call.id, type(error).__name__, where)
        response = _error(500, "internal error; the log has it under the request id", "server_error", None, None)
    if not response.prepared:
        response.headers["X-Request-Id"] = call.id
        if trace := traceparent_of(call.request):
            response.headers["traceparent"] = trace
    return response


def _http_error(http: web.Request, error: web.HTTPException) -> web.Response:
    match error.status:
        case 404:
            message = "there is nothing at this path; the API is under /v1"
        case 405:
            message = f"{http.method} is not possible here; use {error.headers.get('Allow', 'another method')}"
        case 413:
            message = "the body is too large"
        case _:
            message = error.reason
    response = _error(error.status, message, "invalid_request_error", None, None)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def _error(code: int, message: str, type: str, param: str | None, name: str | None) -> web.Response:
    return _json(json_body(ErrorBody(ErrorDetail(message, type, param, name))), code)


def _failure_body(failure: RequestFailed) -> ErrorBody:
    _, type, name = _HTTP_STATUS[failure.kind]
    param = "model" if failure.kind is FailureKind.UNKNOWN_MODEL else None
    return ErrorBody(ErrorDetail(str(failure), type, param, name))


def _pin_card(pin: CachePin) -> dict[str, Any]:
    return {
        "id": pin.id,
        "object": "cache.pin",
        "tokens": len(pin.token_ids),
        "blocks": pin.blocks,
        "expires_at": pin.expires_at,
    }


def _json(body: bytes, code: int = 200) -> web.Response:
    return web.Response(body=body, status=code, content_type="application/json")


async def _json_bytes(http: web.Request) -> bytes:
    if http.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(reason="Content-Type must be application/json")
    if http.content.is_eof():  # all of it came with the head
        return await http.read()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            return await http.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(reason=f"the body did not arrive within {_BODY_TIMEOUT_S:g} s") from None


def _resume_s(http: web.Request) -> float:
    """How long the client may be gone."""
    text = http.headers.get("X-Baton-Resume-S", "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise InvalidRequestError("X-Baton-Resume-S must be a number of seconds, such as 30", "X-Baton-Resume-S")
    return seconds


def _operators_only(http: web.Request) -> None:
    """Only this machine sees workers, and whoever has a key that says so."""
    if not (calling.get().operates or _is_local(http)):
        raise web.HTTPForbidden(reason="this path answers only on the machine itself, or to an operator's key")


def _is_local(http: web.Request) -> bool:
    """From this machine, and not through a proxy that speaks for somebody else."""
    peer = http.transport.get_extra_info("peername") if http.transport is not None else None
    forwarded = "X-Forwarded-For" in http.headers or "Forwarded" in http.headers
    here = peer is not None and not forwarded and _is_loopback(peer[0])
    return here and is_name_of_this_machine(http.headers.get("Host", ""))


def _is_loopback(host: str) -> bool:
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _log_access(http: web.Request, call: _Call, code: int, started_s: float) -> None:
    ms = (time.monotonic() - started_s) * 1e3
    request = call.request

    def fields() -> dict[str, Any]:
        facts = {"request_id": call.id} if request is None else request.facts()
        return {
            "method": http.method, "path": http.path[:200], "status": code, "duration_s": round(ms / 1e3, 6), **facts,
        }  # fmt: skip

    if request is None:
        level = logging.DEBUG if http.path in _PROBES and code == 200 else logging.INFO
        access.log(
            level, "%s %r %d %s %.1f ms", http.method, http.path[:200], code, call.id, ms, extra={"fields": fields}
        )
        return
    usage = request.usage()
    first = request.first_token_s
    access.info(
        "%s %r %d %s %.1f ms, first token %s ms, prompt %d tokens, completion %d tokens",
        http.method, http.path[:200], code, request.id, ms,
        "-" if first is None else f"{(first - request.started_s) * 1e3:.1f}", usage.prompt, usage.completion,
        extra={"fields": fields},
    )  # fmt: skip
