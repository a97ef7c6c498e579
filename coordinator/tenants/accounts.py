"""What a tenant has at this coordinator: what is left of its limits, what runs, what it has used.

A prompt is charged when its request is started, an answer as it comes. So clients need not say how long an answer may
be, and those that say too much lose nothing. The last answers may go beyond the limit: that is paid back by waiting.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final

from baton.errors import InvalidRequestError
from baton.v1 import worker_link_pb2 as wire
from coordinator.delivery import Request, UsageCounts
from coordinator.failures import FailureKind, RequestFailed, revoked
from coordinator.tenants.buckets import Bucket
from coordinator.tenants.caller import Caller
from coordinator.tenants.keys import Key, Secret, Tenant

SETTLE_S = 0.05
"""So old may be what is known of running answers; counting them costs time for each."""
STREAMS_RETRY_S = 1.0
ELSEWHERE: Final = frozenset({"handed_on", "moved"})
"""Outcomes of requests that another coordinator goes on with, and counts."""


@dataclass(slots=True)
class Usage:
    """Since this coordinator was started, of requests that have ended."""

    requests: "Counter[str]" = field(default_factory=Counter)
    """By outcome."""
    refused: "Counter[str]" = field(default_factory=Counter)
    """By reason."""
    input_tokens: int = 0
    cached_tokens: int = 0
    """Of those."""
    output_tokens: int = 0
    cost: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True)
class Ended:
    """For the audit log."""

    request: Request
    used: UsageCounts
    """None of what another coordinator counts."""
    key_id: str
    outcome: str
    tenant: str


class Account:
    def __init__(
        self, name: str, tenant: Tenant, secret: Secret,
        on_ended: Callable[[Ended], None], clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.name = name
        self.usage = Usage()
        self.running: dict[Request, int] = {}
        """Tokens of each that are charged."""
        self.num_streams = 0
        self.removed = False
        """The file does not have the tenant any more."""
        self.requests = Bucket(tenant.requests_per_minute, clock())
        self.tokens = Bucket(tenant.tokens_per_minute, clock())
        self.on_ended = on_ended
        self.now_s = clock
        self._settled_s = clock()
        self.configure(tenant, secret)

    def configure(self, tenant: Tenant, secret: Secret) -> None:
        """The file says something else now. What runs keeps its salt."""
        self.tenant, self.secret = tenant, secret
        self.opaque = secret.opaque(self.name)
        self.requests.set_limit(tenant.requests_per_minute, self.now_s())
        self.tokens.set_limit(tenant.tokens_per_minute, self.now_s())

    def check(self, num_requests: int, num_tokens: int, num_streams: int) -> None:
        """Raise RequestFailed where so much would go beyond a limit now, InvalidRequestError where it always would."""
        if self.removed:
            raise revoked()
        limit = self.tenant.max_streams
        if limit is not None and num_streams > limit:
            raise InvalidRequestError(f"the request asks for {num_streams} choices, and {limit} may run at once", "n")
        if limit is not None and self.num_streams + num_streams > limit:
            message = f"this tenant may have {limit} answers on their way at once; wait for one to end"
            raise RequestFailed(FailureKind.RATE_LIMITED, message, STREAMS_RETRY_S)
        now = self.now_s()
        self.settle(now)
        for bucket, amount, what in ((self.requests, num_requests, "requests"), (self.tokens, num_tokens, "tokens")):
            if wait_s := bucket.wait_s(amount, now):
                message = f"this tenant may use {bucket.per_minute} {what} a minute; try again in {wait_s:.1f} s"
                raise RequestFailed(FailureKind.RATE_LIMITED, message, wait_s)

    def charge(self, num_requests: int, num_tokens: int) -> None:
        """Negative numbers give back."""
        now = self.now_s()
        self.requests.take(num_requests, now)
        self.tokens.take(num_tokens, now)

    def settle(self, now_s: float, force: bool = False) -> None:
        """Charge what running answers got since the last time."""
        if self.tokens.per_minute is None or (now_s - self._settled_s < SETTLE_S and not force):
            return
        self._settled_s = now_s
        for request, charged in self.running.items():
            output = request.output_tokens
            if output > charged:
                self.tokens.take(output - charged, now_s)
                self.running[request] = output

    def begin(self, request: Request, charged: int) -> None:
        self.running[request] = charged
        self.num_streams += len(request.choices)

    def forget(self, request: Request) -> int | None:
        """Its tokens that are charged; None if it is not running."""
        charged = self.running.pop(request, None)
        if charged is not None:
            self.num_streams -= len(request.choices)
        return charged

    def ended(self, request: Request, key_id: str, outcome: str) -> None:
        if (charged := self.forget(request)) is None:
            return  # it was never started
        used = request.usage()
        self.tokens.take(max(0, used.completion - charged), self.now_s())
        if outcome in ELSEWHERE:
            used = UsageCounts(0, 0, 0)
        self._count(used, outcome)
        self.on_ended(Ended(request, used, key_id, outcome, self.name))

    def _count(self, used: UsageCounts, outcome: str) -> None:
        usage, tenant = self.usage, self.tenant
        usage.requests[outcome] += 1
        usage.input_tokens += used.prompt
        usage.cached_tokens += used.cached_prompt
        usage.output_tokens += used.completion
        cached_price = tenant.price_input if tenant.price_cached is None else tenant.price_cached
        parts = (
            (used.prompt - used.cached_prompt, tenant.price_input),
            (used.cached_prompt, cached_price),
            (used.completion, tenant.price_output),
        )
        usage.cost += sum((tokens * Decimal(str(price)) for tokens, price in parts), Decimal(0)) / 1_000_000


class KeyHolder(Caller):
    """A call with a key of a tenant."""

    def __init__(self, account: Account, key: Key) -> None:
        self.account = account
        self.key = key
        self.tenant = account.name

    @property
    def opaque(self) -> str:
        return self.account.opaque

    @property
    def operates(self) -> bool:
        return "operate" in self.account.tenant.scopes

    def check_scope(self, scope: str) -> None:
        """Raise RequestFailed where the tenant does not have it."""
        if scope and scope not in self.account.tenant.scopes:
            self.refused("forbidden")
            raise RequestFailed(FailureKind.FORBIDDEN, f"this API key may not do that: it lacks the scope '{scope}'")

    def check_model(self, name: str) -> None:
        if self.account.tenant.models and name not in self.account.tenant.models:
            raise RequestFailed(FailureKind.FORBIDDEN, "this API key may not use the model that is served here")

    def check_limits(self, num_streams: int) -> None:
        self.account.check(1, 1, num_streams)

    def count_call(self) -> None:
        """A call that computes something, but is no request. Raises RequestFailed beyond the limit of requests."""
        try:
            self.account.check(1, 0, 0)
        except RequestFailed as failure:
            self.refused(failure.kind.value)
            raise
        self.account.charge(1, 0)

    def salt(self, client_salt: str) -> str:
        account = self.account
        return account.secret.salt(account.name, account.tenant.cache_group, client_salt)

    def refused(self, reason: str) -> None:
        self.account.usage.refused[reason] += 1

    @contextmanager
    def admitting(self, request: Request, adopted_tokens: int | None = None) -> Iterator[None]:
        num_requests, num_tokens = (1, request.prompt_tokens) if adopted_tokens is None else (0, 0)
        account = self.account
        if adopted_tokens is None:
            account.check(num_requests, num_tokens, len(request.choices))
        account.charge(num_requests, num_tokens)
        account.begin(request, adopted_tokens or 0)
        request.caller = self
        try:
            yield
        except BaseException:
            if account.forget(request) is not None:
                account.charge(-num_requests, -num_tokens)
            raise

    def assign(self, assignment: wire.Assignment) -> None:
        tenant = self.account.tenant
        assignment.tenant, assignment.priority = self.account.opaque, tenant.priority
        assignment.weight, assignment.kv_share = tenant.weight, tenant.kv_share

    def ended(self, request: Request, outcome: str) -> None:
        self.account.ended(request, self.key.id, outcome)
