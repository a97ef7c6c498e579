"""The thread that owns the engine.

Wires live on the asyncio thread, steps in this one; the step loop never waits for a socket. Commands go in through a
bounded queue and run between steps; everything a step changed comes back as one call on the asyncio thread.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from baton.errors import BatonError
from engine.engine import Engine
from engine.requests import EngineLoad, EngineRates, StepOutput

log = logging.getLogger(__name__)
R = TypeVar("R")
Command = Callable[[Engine], object]
MAX_COMMANDS = 65536


class StepLoopFull(BatonError):
    """The engine has not taken up commands for so long that their queue is full."""


class StepLoop:
    """Runs `engine` until `stop`. `on_output` is called on the asyncio loop, in order, at least once a step.

    A crash of the engine is not survivable (its books may be torn), so it is reported once through `on_crash`, and
    the process is expected to end.
    """

    def __init__(
        self, engine: Engine, on_output: Callable[[StepOutput], None], on_crash: Callable[[BaseException], None]
    ) -> None:
        self._engine = engine
        self._on_output = on_output
        self._on_crash = on_crash
        self._loop = asyncio.get_running_loop()
        self._commands: deque[Command] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._load = engine.load()
        self._seen_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, command: Command) -> None:
        """Run `command` before the next step. Its exceptions count as a crash: catch what a peer can cause."""
        with self._wake:
            if len(self._commands) >= MAX_COMMANDS:
                raise StepLoopFull(f"{MAX_COMMANDS} commands wait for the engine")
            self._commands.append(command)
            self._wake.notify()

    async def call(self, function: Callable[[Engine], R], timeout_s: float = 60.0) -> R:
        """Run `function` between two steps and return what it returned or raise what it raised."""
        future: asyncio.Future[R] = self._loop.create_future()

        def resolve(result: R | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def command(engine: Engine) -> None:
            try:
                result = function(engine)
            except BatonError as error:
                self._loop.call_soon_threadsafe(resolve, None, error)
            else:
                self._loop.call_soon_threadsafe(resolve, result, None)

        self.submit(command)
        return await asyncio.wait_for(future, timeout_s)

    @property
    def load(self) -> EngineLoad:
        """As of the end of the latest step or command; safe to read from the asyncio thread."""
        return self._load

    @property
    def silent_s(self) -> float:
        """How long the engine has been at what it does now: about a second at most, unless a step takes longer."""
        return time.monotonic() - self._seen_s

    @property
    def counters(self) -> dict[str, float]:
        return dict(self._engine.counters)

    @property
    def rates(self) -> EngineRates:
        return self._engine.rates()

    def stop(self, timeout_s: float = 10.0) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._once()
        except BaseException as error:
            log.critical("the engine crashed: %s", type(error).__name__, exc_info=error)
            self._loop.call_soon_threadsafe(self._on_crash, error)

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._seen_s = time.monotonic()
            while not (self._commands or self._stopping or self._engine.has_work()):
                self._wake.wait(timeout=1.0)
                self._seen_s = time.monotonic()
            return not self._stopping

    def _report(self, output: StepOutput) -> None:
        self._loop.call_soon_threadsafe(self._on_output, output)

    def _once(self) -> None:
        with self._wake:
            commands, self._commands = self._commands, deque()
        for command in commands:
            command(self._engine)
        output = self._engine.step(self._report) if self._engine.has_work() else None
        self._load = self._engine.load()
        if output is not None:
            self._report(output)
