"""Prefixes that clients want kept: what `/v1/cache/pins` creates, and which workers have been told.

A worker with tiers is told of every pin, at once or when it registers; it keeps the blocks that it has or comes to
have. Pins live here alone: a coordinator that starts anew has none, and its workers drop those of the old one.
Room is counted with every block of every pin, as if no two had a block in common, so a worker never has to refuse one.
"""

import secrets
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.errors import InvalidRequestError
from baton.token_ids import pack
from baton.v1 import worker_link_pb2 as wire
from coordinator.failures import FailureKind, RequestFailed
from coordinator.metrics import Metrics
from coordinator.tenants.caller import calling
from coordinator.workers import Worker, WorkerRegistry

MAX_PINS = 256
DEFAULT_TTL_S, MIN_TTL_S, MAX_TTL_S = 3600.0, 1.0, 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class CachePin:
    id: str
    token_ids: "array[int]"
    """Packed: there may be millions in all pins."""
    cache_salt: str
    blocks: int
    """That the prefix fills, where pages are smallest."""
    tenant: str
    """Whose it is; empty: nobody's in particular."""
    expires_at: int
    """Unix seconds, for the client."""
    ends_s: float
    """The same by the clock of `Pins`."""


class Pins:
    """In the event loop's thread. `clock` in seconds that never go back."""

    def __init__(self, registry: WorkerRegistry, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = registry
        self._metrics = metrics
        self._clock = clock
        self._pins: dict[str, CachePin] = {}
        registry.on_joined = self._tell_all

    def create(self, token_ids: Sequence[int], cache_salt: str, ttl_s: float | None) -> CachePin:
        """Raises InvalidRequestError, or RequestFailed when no worker can keep it."""
        ttl_s = DEFAULT_TTL_S if ttl_s is None else ttl_s
        if not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
            raise InvalidRequestError(f"ttl_s must be {MIN_TTL_S:g} to {MAX_TTL_S:g}", "ttl_s")
        try:
            num_blocks = self._room_for(len(token_ids))
        except RequestFailed:
            self._metrics.pins.labels("refused").inc()
            raise
        id = f"pin-{secrets.token_hex(16)}"  # unguessable, because whoever knows it may delete the pin
        ends_at, ends_s = int(time.time() + ttl_s), self._clock() + ttl_s
        pin = CachePin(id, array("I", token_ids), cache_salt, num_blocks, calling.get().tenant, ends_at, ends_s)
        self._pins[id] = pin
        self._metrics.pins.labels("created").inc()
        for worker in self._keepers():
            self._tell(worker, pin)
        return pin

    def all(self) -> list[CachePin]:
        """Those whose time is not over, oldest first."""
        now = self._clock()
        for pin in [pin for pin in self._pins.values() if pin.ends_s <= now]:
            del self._pins[pin.id]  # workers count the time themselves
            self._metrics.pins.labels("expired").inc()
        return list(self._pins.values())

    def get(self, id: str) -> CachePin:
        """Raises RequestFailed for a pin that is not there, or no more, or that is not the caller's."""
        self.all()
        if id not in self._pins or not calling.get().owns(self._pins[id].tenant):
            raise RequestFailed(FailureKind.UNKNOWN_PIN, "there is no such pin; it may have expired, or been deleted")
        return self._pins[id]

    def delete(self, id: str) -> None:
        """Raises RequestFailed for a pin that is not there, or no more."""
        del self._pins[self.get(id).id]
        self._metrics.pins.labels("deleted").inc()
        for worker in self._keepers():
            worker.send(wire.CoordinatorMessage(unpin=wire.Unpin(id=id)))

    def _keepers(self) -> list[Worker]:
        return [worker for worker in self._registry.workers.values() if worker.registration.pinnable_blocks]

    def _room_for(self, num_tokens: int) -> int:
        """Blocks of a prefix, when every worker with tiers has room for them. Raises as `create`."""
        pins, keepers = self.all(), self._keepers()
        if not self._registry.workers:
            raise RequestFailed(FailureKind.UNAVAILABLE, "no worker is connected; try again later")
        if not keepers:
            raise RequestFailed(
                FailureKind.CANNOT_PIN,
                "no worker keeps KV blocks outside its pool, where a pin could hold them; start workers with "
                "--host-kv-memory, --disk-kv-folder or --shared-kv-folder",
            )
        if len(pins) >= MAX_PINS:
            raise RequestFailed(FailureKind.CANNOT_PIN, f"there are {MAX_PINS} pins already; delete one first")
        pages = [worker.registration.page_size_tokens for worker in keepers]
        if num_tokens < min(pages):
            raise InvalidRequestError(
                f"the prefix has {num_tokens} tokens, and only whole blocks of {min(pages)} can be kept"
            )
        for worker, page in zip(keepers, pages, strict=True):
            taken = sum(len(pin.token_ids) // page for pin in pins)
            room = max(0, worker.registration.pinnable_blocks - taken)
            if num_tokens // page > room:
                raise RequestFailed(
                    FailureKind.CANNOT_PIN,
                    f"the prefix has {num_tokens // page} blocks of {page} tokens, and pins may keep {room} more; "
                    "delete other pins, shorten the prefix, or give the workers more memory for KV blocks",
                )
        return num_tokens // min(pages)

    def _tell(self, worker: Worker, pin: CachePin) -> None:
        message = wire.CoordinatorMessage()
        message.pin.id, message.pin.cache_salt = pin.id, pin.cache_salt
        message.pin.token_ids = pack(pin.token_ids)
        message.pin.ttl_s = pin.ends_s - self._clock()
        worker.send(message)

    def _tell_all(self, worker: Worker) -> None:
        """Of a worker that has just registered."""
        if worker.registration.pinnable_blocks:
            for pin in self.all():
                self._tell(worker, pin)
