"""The gRPC front end: the Inference service beside the standard health and reflection services.

Requests take the same path as those over HTTP. A cancelled call aborts its request in every worker, unless its client
asked that it be kept.
"""

import asyncio
import contextlib
import logging
import math
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.config import CoordinatorOptions
from baton.errors import InvalidRequestError
from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc as rpc
from coordinator.delivery import ABORTED, CONTENT_FILTER, LENGTH, STOP, Delta, Position, Request, Urgency
from coordinator.failures import FailureKind, RequestFailed, cut_off
from coordinator.pins import CachePin
from coordinator.requests import (
    ChatPrompt,
    GenerateSpec,
    Intake,
    PinSpec,
    Prompt,
    check_request_id,
    new_request_id,
)
from coordinator.resumption import Resumption
from coordinator.sampling import SamplingRequest
from coordinator.tenants.gate import GrpcGate
from coordinator.tenants.tenants import Tenants
from coordinator.timelines import traceparent_of
from coordinator.tracing import arriving

access = logging.getLogger("baton.access")

_WATCH = "/grpc.health.v1.Health/Watch"
_REFLECT = f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"
_SERVICE = api.DESCRIPTOR.services_by_name["Inference"].full_name
_CODES = {
    FailureKind.UNKNOWN_MODEL: grpc.StatusCode.NOT_FOUND,
    FailureKind.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    FailureKind.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    FailureKind.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    FailureKind.UNKNOWN_PIN: grpc.StatusCode.NOT_FOUND,
    FailureKind.UNKNOWN_REQUEST: grpc.StatusCode.NOT_FOUND,
    FailureKind.ID_IN_USE: grpc.StatusCode.ALREADY_EXISTS,
    FailureKind.SUPERSEDED: grpc.StatusCode.ABORTED,
    FailureKind.DIFFERS: grpc.StatusCode.DATA_LOSS,
    FailureKind.CANNOT_PIN: grpc.StatusCode.FAILED_PRECONDITION,
    FailureKind.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    FailureKind.POISON: grpc.StatusCode.FAILED_PRECONDITION,  # "should not be retried", unlike UNAVAILABLE and ABORTED
    FailureKind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    FailureKind.HANDED_ON: grpc.StatusCode.UNAVAILABLE,
    FailureKind.FILTERED: grpc.StatusCode.INVALID_ARGUMENT,
    FailureKind.FILTER_FAILED: grpc.StatusCode.UNAVAILABLE,
    FailureKind.TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    FailureKind.INTERNAL: grpc.StatusCode.INTERNAL,
}
_FINISH: dict[str | None, api.FinishReason.ValueType] = {
    STOP: api.FINISH_REASON_STOP,
    LENGTH: api.FINISH_REASON_LENGTH,
    ABORTED: api.FINISH_REASON_ABORTED,
    CONTENT_FILTER: api.FINISH_REASON_CONTENT_FILTER,
}

MAX_STREAMS = 1024
"""Of one connection."""
MAX_OPEN_CALLS = 256
"""Of those that need no key and may last for ever: watching the health, and reflection."""
MIN_PING_MS, MAX_PING_STRIKES = 100, 100
"""A client that pings more often, so many times while it gets nothing else, is hung up on."""
MAX_CALLS = 8192
"""At one time; more are RESOURCE_EXHAUSTED."""
_READ_TIMEOUT_S = 30.0
"""A client that makes no room for the next response for so long is not reading."""
_Answer = TypeVar("_Answer")
_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(rpc.InferenceServicer):
    def __init__(self, intake: Intake, resumption: Resumption, alive_interval_s: float) -> None:
        self._intake = intake
        self._resumption = resumption
        self._alive_interval_s = alive_interval_s

    async def Generate(self, request: api.GenerateRequest, context: _Context) -> None:  # type: ignore[override]
        async def start() -> Request:
            if not 0 <= request.resume_s < math.inf:
                raise InvalidRequestError("resume_s must be a number of seconds, such as 30", "resume_s")
            if request.request_id:
                self._resumption.check_free(check_request_id(request.request_id))
            _check_digests(request.positions)
            id = request.request_id or new_request_id("gen")
            spec = _spec(request, None if request.resume_s else context.time_remaining())
            running = await self._intake.submit(spec, id, request.resume_s, asked_again=bool(request.positions))
            if request.positions:
                self._intake.metrics.resumed.labels("asked_again").inc()
            return running

        positions = [Position(each.num_tokens, each.ended, each.digest) for each in request.positions]
        await self._answer("Generate", context, start(), positions)

    async def Resume(self, request: api.ResumeRequest, context: _Context) -> None:  # type: ignore[override]
        positions = [Position(each.num_tokens, each.ended, each.digest) for each in request.positions]
        await self._answer("Resume", context, self._resume(request, positions), positions)

    async def _resume(self, request: api.ResumeRequest, positions: Sequence[Position]) -> Request:
        _check_digests(request.positions)
        return await self._resumption.resume(request.request_id, positions)

    async def _answer(
        self, method: str, context: _Context, start: Awaitable[Request], positions: Sequence[Position] = ()
    ) -> None:
        running: Request | None = None
        reader = 0
        code = "CANCELLED"
        arriving.set(str(dict(context.invocation_metadata() or ()).get("traceparent", "")))
        try:
            running = await start
            trace = traceparent_of(running)
            reader = running.attach(positions)
            said, last = None, False
            while (deltas := await running.news(reader, self._alive_interval_s)) != []:
                if deltas is None and self._resumption.better_elsewhere(running):
                    raise cut_off()
                if deltas and trace:  # no sooner: a client that has metadata does not try again by itself
                    await context.send_initial_metadata((("traceparent", trace),))
                    trace = ""
                for delta in deltas or ():
                    last = running.drained and deltas is not None and delta is deltas[-1]
                    await _write(context, _response(running, delta, last))
                    said = delta
            if said is not None and not last:  # a choice ended after it whose end the client knows
                await _write(context, _response(running, _end_of(said), True))
            code = "OK"
        except TimeoutError:
            # The call lasts until its client goes, whatever is done here; the request does not.
            self._intake.metrics.slow_readers.inc()
            if running is not None:
                self._resumption.left(running, reader)
            await context.abort(grpc.StatusCode.CANCELLED, "the client does not read its answer")
        except (InvalidRequestError, RequestFailed) as error:
            code = _code(error).name
            await context.abort(_code(error), str(error), _pushback(error))
        except Exception as error:  # noqa: BLE001 - logged, without its message
            code = "INTERNAL"
            await _internal(context, error)
        finally:
            if running is not None:
                self._resumption.left(running, reader)
            _log_access(method, code, running)
            self._intake.metrics.responses.labels("grpc", code).inc()

    async def Tokenize(self, request: api.TokenizeRequest, context: _Context) -> api.TokenizeResponse:
        async def answer() -> api.TokenizeResponse:
            self._intake.check_model(request.model)
            kind = request.WhichOneof("input")
            if kind is None:
                raise InvalidRequestError("input is missing: give text or chat", "input")
            prompt = request.text if kind == "text" else _chat(request.chat)
            token_ids = await self._intake.token_ids(prompt, request.add_special_tokens)
            return api.TokenizeResponse(token_ids=token_ids, max_model_tokens=self._intake.registry.context_tokens)

        return await _unary(context, answer)

    async def Detokenize(self, request: api.DetokenizeRequest, context: _Context) -> api.DetokenizeResponse:
        async def answer() -> api.DetokenizeResponse:
            self._intake.check_model(request.model)
            return api.DetokenizeResponse(text=self._intake.text(request.token_ids))

        return await _unary(context, answer)

    async def ListModels(self, request: api.ListModelsRequest, context: _Context) -> api.ListModelsResponse:
        model = api.Model(
            id=self._intake.model_name,
            max_model_tokens=self._intake.registry.context_tokens,
            created_unix_s=self._intake.created_unix_s,
        )
        return api.ListModelsResponse(models=[model])

    async def Abort(self, request: api.AbortRequest, context: _Context) -> api.AbortResponse:
        self._resumption.abort(request.request_id)
        return api.AbortResponse()

    async def CreatePin(self, request: api.CreatePinRequest, context: _Context) -> api.CachePin:
        async def answer() -> api.CachePin:
            salt = request.cache_salt if request.HasField("cache_salt") else None
            ttl_s = request.ttl_s if request.HasField("ttl_s") else None
            prompt = _prompt(request, add_generation_prompt=False)
            return _pin(await self._intake.pin(PinSpec(request.model, prompt, salt, ttl_s)))

        return await _unary(context, answer)

    async def GetPin(self, request: api.PinId, context: _Context) -> api.CachePin:
        async def answer() -> api.CachePin:
            return _pin(self._intake.pins.get(request.id))

        return await _unary(context, answer)

    async def DeletePin(self, request: api.PinId, context: _Context) -> api.DeletePinResponse:
        async def answer() -> api.DeletePinResponse:
            self._intake.pins.delete(request.id)
            return api.DeletePinResponse()

        return await _unary(context, answer)


class OpenCalls(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Bounds the calls that anybody may keep open: others would find no room."""

    def __init__(self) -> None:
        self._num_open = 0

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method not in (_WATCH, _REFLECT):
            return handler
        if handler_call_details.method == _WATCH:
            return grpc.unary_stream_rpc_method_handler(
                self._watching(handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        return grpc.stream_stream_rpc_method_handler(
            self._reflecting(handler.stream_stream), handler.request_deserializer, handler.response_serializer
        )

    def _watching(self, watch: Callable[[Any, _Context], Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def watching(request: Any, context: _Context) -> None:
            async with self._slot(context):
                await watch(request, context)

        return watching

    def _reflecting(self, reflect: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
        async def reflecting(requests: Any, context: _Context) -> AsyncIterator[Any]:
            async with self._slot(context):
                async for answer in reflect(requests, context):
                    yield answer

        return reflecting

    @contextlib.asynccontextmanager
    async def _slot(self, context: _Context) -> AsyncIterator[None]:
        if self._num_open >= MAX_OPEN_CALLS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many such calls are open; try again later")
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1


class GrpcApi:
    """The server and its health. `host:port` is opened by `start`."""

    def __init__(
        self,
        intake: Intake,
        resumption: Resumption,
        options: CoordinatorOptions,
        max_connections: int,
        tenants: Tenants | None = None,
    ) -> None:
        arguments = [
            ("grpc.so_reuseport", int(options.own_port >= 0)),  # with other processes, of which clients meet any
            ("grpc.max_receive_message_length", options.max_body_bytes),
            # Clients find out by pings that their coordinator hangs.
            ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_MS),
            ("grpc.http2.max_ping_strikes", MAX_PING_STRIKES),
            ("grpc.max_concurrent_streams", MAX_STREAMS),
            ("grpc.max_allowed_incoming_connections", max_connections),
            ("grpc.server_handshake_timeout_ms", round(options.head_timeout_s * 1e3)),
            ("grpc.max_connection_idle_ms", round(options.idle_timeout_s * 1e3)),
        ]
        self.server = grpc.aio.server(
            options=arguments,
            interceptors=[OpenCalls(), *([GrpcGate(tenants)] if tenants else [])],
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        rpc.add_InferenceServicer_to_server(
            InferenceServicer(intake, resumption, options.heartbeat_interval_s), self.server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        names = (_SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)
        self.ready: bool | None = None

    async def set_ready(self, ready: bool) -> None:
        """What the health service answers for the whole server and for Inference."""
        self.ready = ready
        serving = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        await asyncio.gather(*(self._health.set(name, serving) for name in ("", _SERVICE)))


def _prompt(request: api.GenerateRequest | api.CreatePinRequest, add_generation_prompt: bool = True) -> Prompt:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequestError("prompt is missing: give text, token_ids or chat", "prompt")
    if kind == "text":
        return request.text
    return request.token_ids.ids if kind == "token_ids" else _chat(request.chat, add_generation_prompt)


def _spec(request: api.GenerateRequest, call_s: float | None) -> GenerateSpec:
    """`call_s`: what is left of the call's own deadline, if it ends the request as well."""
    prompt = _prompt(request)
    sampling = request.sampling

    def said(name: Any) -> Any:
        return getattr(sampling, name) if sampling.HasField(name) else None

    asked = SamplingRequest(
        temperature=said("temperature"),
        top_k=said("top_k"),
        top_p=said("top_p"),
        min_p=said("min_p"),
        seed=said("seed"),
        repetition_penalty=said("repetition_penalty"),
        presence_penalty=said("presence_penalty"),
        frequency_penalty=said("frequency_penalty"),
        logit_bias=sampling.logit_bias,
        min_tokens=sampling.min_tokens,
        max_tokens=said("max_tokens"),
        ignore_eos=sampling.ignore_eos,
        stop_token_ids=sampling.stop_token_ids,
        logprobs=said("logprobs"),
        n=request.n or 1,
        stop=request.stop,
    )
    salt = request.cache_salt if request.HasField("cache_salt") else None
    keep_special_tokens = request.keep_special_tokens
    max_ttft_s = request.max_ttft_s if request.HasField("max_ttft_s") else None
    deadline_s = request.deadline_s if request.HasField("deadline_s") else call_s
    return GenerateSpec(
        request.model, [prompt], asked, keep_special_tokens=keep_special_tokens, cache_salt=salt,
        urgency=Urgency(request.service_class, max_ttft_s, deadline_s),
    )  # fmt: skip


def _chat(chat: api.Chat, add_generation_prompt: bool = True) -> ChatPrompt:
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    return ChatPrompt(messages, add_generation_prompt=add_generation_prompt)


def _pin(pin: CachePin) -> api.CachePin:
    return api.CachePin(id=pin.id, tokens=len(pin.token_ids), blocks=pin.blocks, expires_at_unix_s=pin.expires_at)


def _check_digests(positions: Iterable[api.ChoicePosition]) -> None:
    if any(each.num_tokens and not each.digest for each in positions):
        raise InvalidRequestError("a position needs the digest of the last response of its choice", "positions")


def _end_of(said: Delta) -> Delta:
    """The same without its tokens: to say once more how its choice ended, beside the usage."""
    num_tokens = said.first_index + len(said.token_ids)
    return Delta(said.choice, said.prompt_index, num_tokens, finish_reason=said.finish_reason, digest=said.digest)


def _response(request: Request, delta: Delta, last: bool) -> api.GenerateResponse:
    response = api.GenerateResponse(
        request_id=request.id,
        choice=delta.choice,
        first_index=delta.first_index,
        token_ids=delta.token_ids,
        text=delta.text,
        logprobs=[
            api.TokenLogprob(
                token_id=entry.token_id,
                logprob=entry.logprob,
                alternatives=[
                    api.AlternativeLogprob(token_id=token_id, logprob=logprob)
                    for token_id, logprob in entry.alternatives
                ],
            )
            for entry in delta.logprobs
        ],
        finish_reason=_FINISH.get(delta.finish_reason, api.FINISH_REASON_UNSPECIFIED),
        digest=delta.digest,
    )
    if last:
        usage = request.usage()
        response.usage.prompt_tokens = usage.prompt
        response.usage.completion_tokens = usage.completion
        response.usage.cached_prompt_tokens = usage.cached_prompt
    return response


async def _write(context: _Context, response: api.GenerateResponse) -> None:
    """Raises TimeoutError for a client that does not read."""
    async with asyncio.timeout(_READ_TIMEOUT_S):
        await context.write(response)


async def _unary(context: _Context, answer: Callable[[], Awaitable[_Answer]]) -> _Answer:
    try:
        return await answer()
    except (InvalidRequestError, RequestFailed) as error:
        await context.abort(_code(error), str(error), _pushback(error))
    except Exception as error:  # noqa: BLE001 - logged, without its message
        await _internal(context, error)
    raise AssertionError("abort always raises")


def _code(error: InvalidRequestError | RequestFailed) -> grpc.StatusCode:
    return _CODES[error.kind] if isinstance(error, RequestFailed) else grpc.StatusCode.INVALID_ARGUMENT


def _pushback(error: InvalidRequestError | RequestFailed) -> tuple[tuple[str, str], ...]:
    """When to try again, as gRPC's own clients understand it."""
    retry_after_s = getattr(error, "retry_after_s", None)
    return () if retry_after_s is None else (("grpc-retry-pushback-ms", str(math.ceil(retry_after_s * 1e3))),)


async def _internal(context: _Context, error: Exception) -> NoReturn:
    # The exception's message is left out: it might quote a prompt.
    where = "".join(traceback.format_tb(error.__traceback__))
    access.error("gRPC call failed on %s\n%s", type(error).__name__, where)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error; the log has it")
    raise AssertionError("abort always raises")


def _log_access(method: str, code: str, request: Request | None) -> None:
    if request is None:
        access.info("gRPC %s %s", method, code, extra={"fields": {"method": method, "status": code}})
        return
    usage = request.usage()
    access.info(
        "gRPC %s %s %s prompt %d tokens, completion %d tokens",
        method, code, request.id, usage.prompt, usage.completion,
        extra={"fields": {"method": method, "status": code, **request.facts()}},
    )  # fmt: skip
