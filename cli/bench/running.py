"""A run, from where `baton bench` stands: processes that send are started, warmed, let go together, and listened to."""

import asyncio
import contextlib
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from baton.errors import BatonError
from cli.bench.frames import Done, Ended, Frame, Go, Job, Ready, Stop, next_frame, packed
from cli.bench.load import Measured
from cli.bench.measuring import Record

log = logging.getLogger(__name__)
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
HEAD_START_S = 0.2
"""From the word to go to the start: all processes have heard it by then."""


class Standing(NamedTuple):
    """How far the run is, for whoever watches."""

    elapsed_s: float
    sent: int
    running: int
    waiting: int
    records: list[Record]


class Outcome(NamedTuple):
    records: list[Record]
    measured: list[Measured]
    """Of the processes that came to their end."""
    lost: int
    """Processes that died: what they measured last is missing."""
    interrupted: bool
    started_unix_s: float


class _Client:
    def __init__(self, process: asyncio.subprocess.Process, job: Job) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout
        self.number = job.number
        self.told = Ended([], 0, 0, 0)
        self.measured: Measured | None = None

    def say(self, frame: Frame) -> None:
        with contextlib.suppress(ConnectionError, RuntimeError):
            self._stdin.write(packed(frame))

    async def ready(self) -> Ready:
        """Raises BatonError when it ends instead."""
        try:
            frame = await next_frame(self._stdout)
        except EOFError:
            raise BatonError(f"process {self.number} that sends ended at its start; its message is above") from None
        assert isinstance(frame, Ready), "the first thing it says"
        return frame

    async def listen(self, take: Callable[[list[Record]], None]) -> None:
        """Until it is done, or dead."""
        with contextlib.suppress(EOFError):
            while self.measured is None:
                frame = await next_frame(self._stdout)
                if isinstance(frame, Ended):
                    take(frame.records)
                    frame.records = []
                    self.told = frame
                elif isinstance(frame, Done):
                    self.measured = frame.measured

    async def end(self) -> None:
        """However it is."""
        with contextlib.suppress(ConnectionError, RuntimeError):
            self._stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


async def run(jobs: list[Job], stop: asyncio.Event, watch: Callable[[Standing], None], warm_up_s: float) -> Outcome:
    """Raises BatonError when a process does not start, or the whole warm-up failed."""
    clients: list[_Client] = []
    stopping: asyncio.Future[Any] = asyncio.create_task(stop.wait())
    try:
        for job in jobs:
            # Sessions of their own: a Ctrl-C at the terminal reaches this process alone, which then collects.
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "cli.bench.client", start_new_session=True,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 20,
            )  # fmt: skip
            clients.append(_Client(process, job))
            clients[-1].say(job)
        readying: asyncio.Future[Any] = asyncio.gather(*(client.ready() for client in clients))
        await asyncio.wait([readying, stopping], timeout=START_TIMEOUT_S + warm_up_s, return_when="FIRST_COMPLETED")
        if not readying.done():
            readying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await readying
            if stop.is_set():
                return Outcome([], [], 0, True, time.time())
            raise BatonError("the processes that send were not ready in time")
        _check_warm_up(readying.result(), sum(job.load.warmup for job in jobs[:1]))
        return await _measure(clients, stopping, watch)
    finally:
        stopping.cancel()
        await asyncio.gather(*(client.end() for client in clients))


def _check_warm_up(said: list[Ready], requests: int) -> None:
    errors = Counter[str]()
    for each in said:
        errors.update(each.errors)
    if not errors:
        return
    example = next((each.example for each in said if each.example), "")
    kinds = ", ".join(f"{number} x {kind}" for kind, number in errors.most_common())
    if errors.total() >= requests:
        raise BatonError(f"the whole warm-up failed ({kinds}): {example}")
    log.warning("warm-up: %s", kinds)


async def _measure(
    clients: list[_Client], stopping: "asyncio.Future[Any]", watch: Callable[[Standing], None]
) -> Outcome:  # fmt: skip
    records: list[Record] = []
    start_at = time.monotonic() + HEAD_START_S
    started_unix_s = time.time() + HEAD_START_S
    for client in clients:
        client.say(Go(start_at))

    def take(new: list[Record]) -> None:
        records.extend(new)
        told = [client.told for client in clients]
        sent, running, waiting = (sum(getattr(each, name) for each in told) for name in ("sent", "running", "waiting"))
        watch(Standing(max(0.0, time.monotonic() - start_at), sent, running, waiting, new))

    listening: asyncio.Future[Any] = asyncio.gather(*(client.listen(take) for client in clients))
    await asyncio.wait([listening, stopping], return_when=asyncio.FIRST_COMPLETED)
    interrupted = not listening.done()
    if interrupted:
        for client in clients:
            client.say(Stop())
        await asyncio.wait([listening], timeout=STOP_TIMEOUT_S)
        if not listening.done():
            listening.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await listening
    measured = [client.measured for client in clients if client.measured is not None]
    return Outcome(records, measured, len(clients) - len(measured), interrupted, started_unix_s)
