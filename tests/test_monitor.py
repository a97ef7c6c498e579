"""The port for monitors: what probes, Prometheus and routers are told, and that nobody else is told more by it."""

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import cast
from unittest import mock

import aiohttp
import pytest

from baton.config import CoordinatorOptions, WorkerOptions, validate
from baton.errors import ConfigurationError
from baton.monitor import monitored
from cli import worker
from cli.doors import doors
from engine.engine import Engine
from worker.links import CoordinatorLinks
from worker.shell import WorkerShell
from worker.step_loop import StepLoop


async def ask(port: int, path: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{port}{path}"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.text()


def test_it_says_what_is_wrong_with_503_and_nothing_is_wrong_with_200() -> None:
    async def page() -> bytes:
        return b"n 1\n"

    pages = {"/metrics": page}
    wrong = {"health": "", "ready": "no coordinator"}

    async def run() -> None:
        async with monitored("127.0.0.1", 0, lambda: wrong["health"], lambda: wrong["ready"], pages) as port:
            assert await ask(port, "/health") == (200, json.dumps({"status": "alive"}))
            assert await ask(port, "/ready") == (503, json.dumps({"status": "no coordinator"}))
            wrong.update(health="stalled", ready="")
            assert await ask(port, "/health") == (503, json.dumps({"status": "stalled"}))
            assert await ask(port, "/ready") == (200, json.dumps({"status": "ready"}))
            assert await ask(port, "/metrics") == (200, "n 1\n")
            assert (await ask(port, "/status"))[0] == 404
        with pytest.raises(aiohttp.ClientError):
            await ask(port, "/health")

    asyncio.run(run())


def test_a_worker_counts_nothing_there_and_without_a_port_there_is_none() -> None:
    async def run() -> None:
        async with monitored("127.0.0.1", 0, str, str) as port:
            assert (await ask(port, "/metrics"))[0] == 404
            with pytest.raises(ConfigurationError, match=f"--monitor-port {port} on 127.0.0.1 cannot be opened"):
                async with monitored("127.0.0.1", port, str, str):
                    pass
        async with monitored("127.0.0.1", -1, str, str) as port:
            assert port == -1

    asyncio.run(run())


@pytest.mark.parametrize("options", [CoordinatorOptions(monitor_port=70000), WorkerOptions(monitor_port=-2)])
def test_a_port_that_is_none_is_refused(options: object) -> None:
    with pytest.raises(ConfigurationError, match="--monitor-port"):
        validate(options)


@pytest.mark.parametrize(("coordinators", "processes"), [(2, 1), (1, 2)])
def test_several_coordinators_of_one_command_cannot_share_it(coordinators: int, processes: int) -> None:
    with pytest.raises(ConfigurationError, match="--monitor-port is one process's"):
        doors(CoordinatorOptions(port=0, grpc_port=0, link_port=0, monitor_port=9000), coordinators, processes)


def test_a_worker_whose_engine_hangs_is_not_alive_and_one_that_is_idle_is() -> None:
    """The thread of a step loop gives a sign of life before every step, and while there is nothing to do."""
    hangs = threading.Event()

    class Idle:
        def load(self) -> None: ...

        def has_work(self) -> bool:
            return False

    async def run() -> None:
        steps = StepLoop(cast(Engine, Idle()), lambda output: None, lambda error: None)
        shell = cast(WorkerShell, SimpleNamespace(steps=steps))
        with mock.patch("worker.step_loop.time", clock):
            steps.start()
            await steps.call(lambda engine: None)
            assert worker.unhealthy(shell) == ""
            steps.submit(lambda engine: hangs.wait(20))
            while steps._commands:
                await asyncio.sleep(0.001)
            clock.monotonic.return_value += worker.STALLED_S + 1
            assert "one step for 181 s" in worker.unhealthy(shell)
            hangs.set()
            await steps.call(lambda engine: None)
            assert worker.unhealthy(shell) == ""
            steps.stop()

    clock = mock.Mock(monotonic=mock.Mock(return_value=1000.0))
    asyncio.run(run())


def test_a_worker_is_ready_while_a_coordinator_has_it_and_it_does_not_drain() -> None:
    reasons = ["no coordinator has this worker"]
    shell, links = SimpleNamespace(draining=False), SimpleNamespace(unready=lambda: reasons[-1])

    def reason() -> str:
        return worker.unready(cast(WorkerShell, shell), cast(CoordinatorLinks, links))

    assert reason() == "no coordinator has this worker"
    reasons.append("")
    assert reason() == ""
    shell.draining = True
    assert reason() == "draining"
