"""Lets calls in, over HTTP and gRPC, and says for the rest of each whose it is. There only with `--keys`.

What is not listed here needs a key with the scope "infer": a path that somebody adds is closed until it is opened.
"""

import math
import re
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
from aiohttp import web

from coordinator.dashboard.pages import FEED, PAGES
from coordinator.failures import FailureKind, RequestFailed
from coordinator.openai_answers import json_body
from coordinator.tenants.accounts import Account, KeyHolder
from coordinator.tenants.caller import ANYBODY, Caller, calling
from coordinator.tenants.tenants import Tenants

OPEN: Final = frozenset({"/health", "/ready"}) | PAGES
OPERATE: Final = frozenset({"/metrics", "/status", "/drain", FEED})
"""These ask for the scope themselves, because from this machine they need none."""
ANY_SCOPE: Final = frozenset({"/v1/usage", "/version"})
PINS: Final = "/v1/cache/pins"
COUNTED: Final = frozenset({"/tokenize", "/detokenize", PINS})
"""No requests, but work: each counts as one in the tenant's limit."""
_OPEN_SERVICES: Final = frozenset({"/grpc.health.v1.Health", "/grpc.reflection.v1alpha.ServerReflection"})
_GRPC_PINS: Final = frozenset({"CreatePin", "GetPin", "DeletePin"})
_GRPC_COUNTED: Final = frozenset({"Tokenize", "Detokenize", "CreatePin"})
_CODES: Final = {
    FailureKind.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    FailureKind.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    FailureKind.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


_TRACE = re.compile(r"/v1/requests/[^/]+/trace")


class Nobody(Caller):
    """Who came without a key to where this machine itself needs none. Owns nothing, and may do no more than that."""

    def owns(self, tenant: str) -> bool:
        return False


_NOBODY: Final = Nobody()


class HttpGate:
    def __init__(self, tenants: Tenants, is_local: Callable[[web.Request], bool]) -> None:
        """`is_local`: a request that comes from this machine itself."""
        self._tenants = tenants
        self._is_local = is_local

    def install(self, app: web.Application) -> None:
        """Before every path of the application, and one of its own."""

        @web.middleware
        async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
            calling.set(ANYBODY)  # not who asked before on this connection, whatever becomes of this request
            if request.path not in OPEN:
                calling.set(self._caller(request))
            return await handler(request)

        app.middlewares.append(gate)
        app.on_response_prepare.append(self._add_headers)
        app.router.add_get("/v1/usage", self._usage)

    def _caller(self, http: web.Request) -> Caller:
        path, authorization = http.path, http.headers.get("Authorization")
        listing = path == PINS and http.method == "GET"
        trace = http.method == "GET" and _TRACE.fullmatch(http.rel_url.raw_path) is not None
        local_too = path in OPERATE or path == "/v1/usage" or listing or trace
        if authorization is None and local_too and self._is_local(http):
            return _NOBODY
        holder = self._tenants.caller(authorization)
        if path == PINS or path.startswith(PINS + "/"):
            holder.check_scope("pins")
        elif path not in OPERATE and path not in ANY_SCOPE and not trace:
            holder.check_scope("infer")
        if path in COUNTED and http.method == "POST":
            holder.count_call()
        return holder

    async def _add_headers(self, http: web.Request, response: web.StreamResponse) -> None:
        if response.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        caller = calling.get()
        if http.method == "POST" and isinstance(caller, KeyHolder):
            response.headers.update(limit_headers(caller.account))

    async def _usage(self, http: web.Request) -> web.Response:
        """Of the caller's tenant; of all for operators."""
        caller = calling.get()
        operates = caller.operates or caller is _NOBODY  # on this machine itself, else the gate had stopped it
        names = list(self._tenants.accounts) if operates else [caller.tenant]
        data = [_usage_of(self._tenants.accounts[name]) for name in names]
        return web.Response(body=json_body({"object": "list", "data": data}), content_type="application/json")


class GrpcGate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Before every service of a server."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        service, _, method = handler_call_details.method.rpartition("/")
        if service in _OPEN_SERVICES:
            return await continuation(handler_call_details)
        try:
            calling.set(self._caller(method, handler_call_details.invocation_metadata))
        except RequestFailed as failure:
            return grpc.unary_unary_rpc_method_handler(_refusal(failure))
        return await continuation(handler_call_details)

    def _caller(self, method: str, metadata: Any) -> KeyHolder:
        values = [value for name, value in metadata or () if name == "authorization"]
        holder = self._tenants.caller(values[0] if values else None)
        holder.check_scope("pins" if method in _GRPC_PINS else "infer")
        if method in _GRPC_COUNTED:
            holder.count_call()
        return holder


def _refusal(failure: RequestFailed) -> Callable[..., Awaitable[None]]:
    wait_s = failure.retry_after_s
    pushback = () if wait_s is None else (("grpc-retry-pushback-ms", str(math.ceil(wait_s * 1e3))),)

    async def refuse(request: object, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        await context.abort(_CODES[failure.kind], str(failure), pushback)

    return refuse


def limit_headers(account: Account) -> dict[str, str]:
    """As OpenAI names them: https://developers.openai.com/api/docs/guides/rate-limits."""
    headers = {}
    for name, bucket in (("requests", account.requests), ("tokens", account.tokens)):
        if bucket.per_minute is not None:
            now = account.now_s()
            headers[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
            headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level(now))))
            headers[f"x-ratelimit-reset-{name}"] = _duration(bucket.full_after_s(now))
    return headers


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1e3)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    return f"{minutes:.0f}m{rest:g}s" if minutes else f"{rest:g}s"


def _usage_of(account: Account) -> dict[str, Any]:
    usage = account.usage
    return {
        "object": "usage",
        "tenant": account.name,
        "requests": dict(usage.requests),
        "refused": dict(usage.refused),
        "input_tokens": usage.input_tokens,
        "cached_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
        "cost": float(usage.cost),
        "streams": account.num_streams,
    }
