"""Who makes a call: set by the gate before anything else happens in it, and asked wherever it matters."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from baton.v1 import worker_link_pb2 as wire

if TYPE_CHECKING:
    from coordinator.delivery import Request


class Caller:
    """Anybody, where no keys are asked for: does everything that clients may, and has what belongs to nobody."""

    tenant = ""
    """Name; of requests and pins: whose they are."""

    @property
    def opaque(self) -> str:
        """The same for workers."""
        return ""

    @property
    def operates(self) -> bool:
        """May do, from anywhere, what else only this machine may."""
        return False

    def check_model(self, name: str) -> None:
        """Raise RequestFailed for a model that it may not use."""

    def check_limits(self, num_streams: int) -> None:
        """Raise RequestFailed where a request of so many, however small, would be refused now."""

    def salt(self, client_salt: str) -> str:
        """Of its requests in the KV cache."""
        return client_salt

    def owns(self, tenant: str) -> bool:
        return tenant == self.tenant

    def refused(self, reason: str) -> None:
        """Count a request that was not taken."""

    @contextmanager
    def admitting(self, request: "Request", adopted_tokens: int | None = None) -> Iterator[None]:
        """The request is its, and is started in this context: its limits are asked and charged, and given back when
        that fails. `adopted_tokens`: another coordinator let it in, and so many were delivered there.

        Raises RequestFailed.
        """
        yield

    def assign(self, assignment: wire.Assignment) -> None:
        """Fill in what workers share their steps and blocks by."""

    def ended(self, request: "Request", outcome: str) -> None:
        """One that was admitted."""


ANYBODY = Caller()
calling: ContextVar[Caller] = ContextVar("calling", default=ANYBODY)
"""Makes the current call. With `--keys` set for every call, or the call is refused."""
