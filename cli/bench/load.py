"""One process that sends: warm-up, then an open or a closed loop, by one clock for all processes.

In an open loop each request has a deadline of its own, counted from the start of the run: one that goes out late
delays no other, and how late it was is recorded. Bodies are made ahead, while there is time.
"""

import asyncio
import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from cli.bench.asking import Asking, Conversation
from cli.bench.content import Content
from cli.bench.measuring import CUT_OFF, ClientHealth, Histogram, Record, Timeline
from cli.bench.options import DEFAULT_STREAMS, LoadOptions
from cli.bench.stream import AskError, Seen, Transport, now
from cli.bench.workload import Session, Turn

LOOK_AHEAD, LOOK_AHEAD_BYTES = 512, 32 << 20
MAX_PENDING = 20_000
"""Sessions of an open loop that run or wait in one process. More are not sent, and counted: memory has an end."""
LAG_INTERVAL_S = 0.01
_SOON_S = 0.002
"""Before the next deadline nothing is made ahead any more."""


class Measured(msgspec.Struct):
    """What one process has to say in the end, besides its records."""

    gaps: Histogram
    timeline: Timeline
    health: ClientHealth
    examples: dict[str, str]
    """Of each kind of error the first, in the server's words."""
    unasked: int
    """Turns that were not asked because one before them failed, or time was up."""


class Load:
    """`record` takes each request that ended. `number`: of this process, among those that send."""

    def __init__(
        self, options: LoadOptions, asking: Asking, content: Content, transport: Transport,
        record: Callable[[Record], None], detailed: bool = False, number: int = 0,
    ) -> None:  # fmt: skip
        self._options, self._asking, self._content = options, asking, content
        self._transport, self._record, self._detailed = transport, record, detailed
        self._number = number
        self._started_at = self._ends_at = math.inf
        self._ahead: deque[tuple[Session, Conversation, bytes]] = deque()
        self._ahead_bytes = 0
        self._gaps, self._timeline, self._lag = Histogram(), Timeline(), Histogram()
        self._examples: dict[str, str] = {}
        self._unasked = 0
        self._numbers = itertools.count()
        self.sent = self.running = self.waiting = 0
        self.example_of_warmup = ""
        """Of an error, in the server's words."""

    @property
    def streams(self) -> int:
        """Of this process, in a closed loop; or the most at once, 0 without a limit."""
        total, clients = self._options.concurrency, self._options.clients
        return total // clients + (self._number < total % clients)

    async def warm_up(self, sessions: Iterator[Session]) -> list[Record]:
        """As a closed loop; nothing of it is measured."""
        kept, self._record, records = self._record, lambda each: records.append(each), list[Record]()
        self._started_at = now()
        try:
            await self._side_by_side(sessions, self.streams or DEFAULT_STREAMS)
        finally:
            self._record, self.example_of_warmup = kept, next(iter(self._examples.values()), "")
            self._gaps, self._timeline, self._examples = Histogram(), Timeline(), {}
            self._numbers, self.sent, self._unasked = itertools.count(), 0, 0
        return records

    def look_ahead(self, sessions: Iterator[Session]) -> bool:
        """Make one more body. Whether there was room, and a session."""
        if len(self._ahead) >= LOOK_AHEAD or self._ahead_bytes >= LOOK_AHEAD_BYTES:
            return False
        session = next(sessions, None)
        if session is None:
            return False
        conversation = Conversation(self._asking, self._content, session)
        request = conversation.request(session.turns[0])
        self._ahead_bytes += len(request)
        self._ahead.append((session, conversation, request))
        return True

    async def measure(self, sessions: Iterator[Session], start_at: float) -> Measured:
        """From `start_at`, of `time.monotonic`, to the end of the last request. Cancelled, what runs is cut off, and
        what was measured is there all the same."""
        self._started_at = start_at
        self._ends_at = start_at + self._options.duration_s if self._options.duration_s else math.inf
        await self._until(start_at)
        watching = asyncio.create_task(self._watch_lag())
        cpu_at, began = time.process_time(), now()
        with contextlib.suppress(asyncio.CancelledError):
            await self._send(sessions)
        cpu_share = (time.process_time() - cpu_at) / max(now() - began, 1e-9)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        connections, reconnections = self._transport.connections, self._transport.reconnections
        health = ClientHealth(cpu_share, self._lag, connections, reconnections)
        return Measured(self._gaps, self._timeline, health, self._examples, self._unasked)

    async def _send(self, sessions: Iterator[Session]) -> None:
        while not self._ahead and self.look_ahead(sessions):
            pass
        if not self._ahead:
            return
        if self._ahead[0][0].at_s is None:
            await self._side_by_side(sessions, self.streams)
        else:
            await self._on_time(sessions)

    # Closed loop

    async def _side_by_side(self, sessions: Iterator[Session], streams: int) -> None:
        async def stream() -> None:
            while now() < self._ends_at and (self._ahead or self.look_ahead(sessions)):
                session, conversation, request = self._ahead.popleft()
                self._ahead_bytes -= len(request)
                await self._converse(session, conversation, request, None)

        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(stream())

    # Open loop

    async def _on_time(self, sessions: Iterator[Session]) -> None:
        limited = asyncio.Semaphore(self.streams) if self._options.concurrency else contextlib.nullcontext()

        async def begin(session: Session, conversation: Conversation, request: bytes, due: float) -> None:
            self.waiting += 1
            try:
                async with limited:
                    self.waiting -= 1
                    await self._converse(session, conversation, request, due)
            except asyncio.CancelledError:
                self._unasked += len(session.turns)
                raise

        pending: set[asyncio.Task[None]] = set()
        try:
            while True:
                while not self._ahead or now() < self._due(self._ahead[0][0]) - _SOON_S:
                    if not self.look_ahead(sessions):
                        break
                    await asyncio.sleep(0)  # answers come meanwhile
                if not self._ahead:
                    break
                session, conversation, request = self._ahead.popleft()
                self._ahead_bytes -= len(request)
                due = self._due(session)
                await self._until(due)
                if len(pending) >= MAX_PENDING:
                    self._not_sent(due)
                    continue
                task = asyncio.create_task(begin(session, conversation, request, due))
                pending.add(task)
                task.add_done_callback(pending.discard)
            await asyncio.gather(*pending)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    def _due(self, session: Session) -> float:
        return self._started_at + (session.at_s or 0.0)

    @staticmethod
    async def _until(due: float) -> None:
        """Never early; late by up to a millisecond, which is what timers of the loop are good for."""
        while (left_s := due - now()) > 0:  # noqa: ASYNC110 a time is waited for
            await asyncio.sleep(max(left_s, 0.001))

    def _not_sent(self, due: float) -> None:
        at, kind = due - self._started_at, f"not sent: {MAX_PENDING} before it"
        self._record(Record(next(self._numbers), 0, at, now() - self._started_at, 0, error=kind))

    # Both

    async def _converse(
        self, session: Session, conversation: Conversation, request: bytes, due: float | None
    ) -> None:  # fmt: skip
        """All turns, each after the answer of the one before."""
        for place, turn in enumerate(session.turns):
            if place:
                await asyncio.sleep(turn.think_s)
                if now() >= self._ends_at:
                    self._unasked += len(session.turns) - place
                    return
                request, due = conversation.request(turn), None
            if not await self._ask(conversation, turn, place, request, due):
                self._unasked += len(session.turns) - place - 1
                return

    async def _ask(
        self, conversation: Conversation, turn: Turn, place: int, request: bytes, due: float | None
    ) -> bool:  # fmt: skip
        seen, start = Seen(keep=conversation.goes_on), now()
        at = start - self._started_at
        scheduled = at if due is None else due - self._started_at
        record = Record(next(self._numbers), place, scheduled, at, conversation.asked_tokens(turn))
        self.sent += 1
        self.running += 1
        try:
            async with asyncio.timeout(self._options.request_timeout_s):
                await self._patiently(request, seen, record)
            if not (seen.times or seen.ended_at):
                raise AskError("empty answer")
        except TimeoutError:
            record.error = "timed out"
        except AskError as error:
            record.error = error.kind
            self._examples.setdefault(error.kind, error.example)
        except asyncio.CancelledError:
            record.error = CUT_OFF
            raise
        finally:
            self.running -= 1
            self._ended(record, seen, start)
        if record.ok:
            conversation.answered(seen)
        return record.ok

    async def _patiently(self, request: bytes, seen: Seen, record: Record) -> None:
        while True:
            try:
                return await self._transport.ask(request, seen)
            except AskError as error:
                if not (self._options.retry_after and error.is_refusal and error.retry_after_s is not None):
                    raise
                record.refusals += 1
                await asyncio.sleep(max(error.retry_after_s, 0.001))

    def _ended(self, record: Record, seen: Seen, start: float) -> None:
        times = np.asarray(seen.times or [seen.ended_at])
        if seen.ended_at:
            record.ttft, record.latency = float(times[0]) - start, seen.ended_at - start
        record.events = len(seen.times)
        record.prompt_tokens, record.counted = seen.prompt_tokens, seen.counted
        record.output_tokens = seen.output_tokens or record.events
        if not record.ok:
            record.latency = now() - start
        else:
            gaps = np.diff(times)
            self._gaps.add(gaps)
            self._timeline.add(times - self._started_at, record.output_tokens / len(times))
            if self._detailed:
                record.gaps = gaps.astype(np.float32).tobytes()
        self._record(record)

    async def _watch_lag(self) -> None:
        waits: list[float] = []
        try:
            while True:
                due = now() + LAG_INTERVAL_S
                await asyncio.sleep(LAG_INTERVAL_S)
                waits.append(max(0.0, now() - due))
                if len(waits) >= 100:
                    self._lag.add(waits)
                    waits.clear()
        finally:
            self._lag.add(waits)
