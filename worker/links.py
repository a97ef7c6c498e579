"""A worker's links to all coordinators: one to each that discovery finds, so that every coordinator has every worker.

A link that works is never cut because of what discovery says: an address that is announced no more (its lease ended
while etcd or the coordinator was stopped) is only not dialled again once its link is broken.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from baton.discovery.base import Discovery
from baton.errors import ConfigurationError
from baton.tls import Tls
from baton.v1 import worker_link_pb2 as wire
from worker.link import CoordinatorLink, LinkHandler, Refused

log = logging.getLogger(__name__)
ANSWERS_WITHIN_S = 10.0
"""What a coordinator that was found has to take this worker before it is not waited for any more."""
REFUSED_RETRY_S = 10.0
"""Before a coordinator is asked again that refused this worker, which others have taken."""


class CoordinatorLinks:
    def __init__(
        self, registration: wire.Registration, handler: LinkHandler, heartbeat: Callable[[], wire.WorkerHeartbeat],
        tls: Tls | None = None,
    ) -> None:  # fmt: skip
        self._registration = registration
        self._handler = handler
        self._heartbeat = heartbeat
        self._tls = tls
        self._wanted: frozenset[str] = frozenset()
        self._links: dict[str, CoordinatorLink] = {}
        self._tasks: dict[asyncio.Task[None], CoordinatorLink] = {}
        self._refused: dict[str, Refused] = {}
        self._connected = asyncio.Event()
        """Set by the first link ever."""
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def unready(self) -> str:
        """Why others of its pool had better not go yet, as in a rolling upgrade; empty where nothing speaks against it.
        Somebody has to have this worker, and so has everybody who was found lately: it may be all they have left."""
        if not any(link.connected.is_set() for link in self._links.values()):
            return "no coordinator has this worker"
        since_s = time.monotonic() - ANSWERS_WITHIN_S
        late = any(not link.connected.is_set() and link.found_s > since_s for link in self._links.values())
        return "a coordinator that was found lately does not have this worker yet" if late else ""

    def send_all(self, message: wire.WorkerMessage) -> None:
        for link in self._links.values():
            link.send(message)

    async def close(self, timeout_s: float) -> None:
        """Let the coordinators that are there read all that was sent, and hang up."""
        self._wanted = frozenset()
        reading = [task for task, link in self._tasks.items() if link.connected.is_set()]
        for link in self._links.values():
            link.close()
        if reading:
            await asyncio.wait(reading, timeout=timeout_s)

    async def run(self, discovery: Discovery, connect_timeout_s: float) -> None:
        """Keep links up until cancelled. Raises ConfigurationError when none could be had for `connect_timeout_s` at
        the start, or every coordinator refused this worker."""
        watching = asyncio.create_task(discovery.watch(self._update))
        connected = asyncio.create_task(self._connected.wait())
        ends: set[asyncio.Future[Any]] = {watching, self._failed}
        try:
            await asyncio.wait({*ends, connected}, timeout=connect_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not any(end.done() for end in (*ends, connected)):
                raise ConfigurationError(self._nobody(discovery, connect_timeout_s))
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                if end.done():
                    end.result()
        finally:
            tasks = [watching, connected, *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _nobody(self, discovery: Discovery, timeout_s: float) -> str:
        if self._wanted:
            addresses = ", ".join(sorted(self._wanted))
            return (
                f"no coordinator answered at {addresses} for {timeout_s:g} s; "
                "check --coordinator and that `baton coordinator` runs there"
            )
        if discovery.trouble:
            return f"--discovery gave no answer for {timeout_s:g} s ({discovery.trouble}); check --discovery"
        return f"no coordinator was announced for {timeout_s:g} s; start one with the same --discovery"

    def _update(self, addresses: frozenset[str]) -> None:
        self._wanted = addresses
        for address, link in self._links.items():
            link.wanted = address in addresses
        for address in addresses - self._links.keys():
            self._dial(address)

    def _dial(self, address: str) -> None:
        link = CoordinatorLink(address, self._registration, self._handler, self._heartbeat, self._tls)
        self._links[address] = link
        task = asyncio.create_task(self._keep(address, link))
        self._tasks[task] = link
        task.add_done_callback(self._ended)

    async def _keep(self, address: str, link: CoordinatorLink) -> None:
        """Until it is broken and not wanted, or everybody refuses this worker."""
        try:
            while link.wanted:
                self._refused.pop(address, None)
                try:
                    await link.run(self._connected.set, self._has)
                except Refused as error:
                    self._refused[address] = error
                    if self._links.keys() <= self._refused.keys():
                        raise
                    log.warning("%s; asking again in %g s", error, REFUSED_RETRY_S)
                    await asyncio.sleep(REFUSED_RETRY_S)
        finally:
            del self._links[address]
            self._refused.pop(address, None)
        if address in self._wanted:  # again, since the loop looked
            self._dial(address)

    def _has(self, coordinator: int) -> bool:
        """Whether a link to it works."""
        return any(link.connected.is_set() and link.coordinator == coordinator for link in self._links.values())

    def _ended(self, task: "asyncio.Task[None]") -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()) and not self._failed.done():
            self._failed.set_exception(error)
