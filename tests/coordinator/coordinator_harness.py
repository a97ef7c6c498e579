"""Starts a whole coordinator on free ports, with fake workers, in the test's own event loop."""

import asyncio
import atexit
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import openai
import pytest
import uvloop
from fake_worker import FakeWorker

from baton.config import CoordinatorOptions, ModelOptions
from baton.v1 import inference_pb2_grpc as rpc
from baton.v1 import worker_link_pb2 as wire
from coordinator.server import Coordinator, Ports

DEMO_FOLDER = Path(__file__).resolve().parents[2] / "engine" / "demo_model"
OPTIONS: dict[str, object] = {
    "port": 0, "grpc_port": 0, "link_port": 0, "heartbeat_interval_s": 0.1, "heartbeat_timeout_s": 3.0,
    "request_timeout_s": 20.0, "drain_timeout_s": 5.0,
}  # fmt: skip
PREFILL, DECODE = wire.ROLE_PREFILL, wire.ROLE_DECODE


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """For what shows itself only inside the coordinator."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


@dataclass
class System:
    coordinator: Coordinator
    ports: Ports
    openai: openai.AsyncOpenAI
    http: aiohttp.ClientSession
    inference: rpc.InferenceStub
    channel: grpc.aio.Channel
    workers: list[FakeWorker] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports.http}"

    async def worker(self, id: str = "decode-0", *roles: int, **options: object) -> FakeWorker:
        """A started fake worker, decode if no role is given."""
        worker = FakeWorker(self.ports.link, id, roles or (DECODE,), **options)
        await worker.start()
        self.workers.append(worker)
        await until(lambda: bool(self.coordinator.registry.workers[id].heartbeat.counters))
        return worker

    def encode(self, text: str) -> list[int]:
        return self.coordinator.intake.tokenizer._tokenizer.encode(text).ids

    def decode(self, token_ids: list[int]) -> str:
        return self.coordinator.intake.tokenizer.decode(token_ids)

    def says(self, text: str) -> Callable[[object, int], int]:
        """A token function whose answer to everything begins with `text`, followed by end of sequence."""
        token_ids = [*self.encode(text), self.coordinator.intake.tokenizer.facts.eos_token_ids[0]]
        return lambda prompt, index: token_ids[min(index, len(token_ids) - 1)]

    def metric(self, name: str, **labels: str) -> float:
        return self.coordinator.metrics.registry.get_sample_value(name, labels) or 0.0


@functools.cache
def _runner() -> "asyncio.Runner":
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    atexit.register(runner.close)
    return runner


@pytest.fixture(scope="session")
def run() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Runs a coroutine, in one event loop for all tests of the process: gRPC wants no second one."""
    return lambda work: _runner().run(asyncio.wait_for(work, 30))


@contextlib.asynccontextmanager
async def running(*, folder: Path = DEMO_FOLDER, **options: object) -> AsyncIterator[System]:
    coordinator = Coordinator(CoordinatorOptions(**(OPTIONS | options)), ModelOptions(), folder)
    ports = await coordinator.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}")
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(coordinator.stop)
        stack.push_async_callback(channel.close)
        client = await stack.enter_async_context(
            openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{ports.http}/v1", api_key="none", max_retries=0)
        )
        http = await stack.enter_async_context(aiohttp.ClientSession(f"http://127.0.0.1:{ports.http}"))
        system = System(coordinator, ports, client, http, rpc.InferenceStub(channel), channel)
        stack.push_async_callback(_stop_workers, system)
        yield system
        # Whatever a test did, nothing may be left over.
        if not coordinator.dispatcher.draining:
            assert coordinator.dispatcher.num_streams == len(_streams(system)), "streams were not counted back"


def _streams(system: System) -> list[object]:
    return [choice for request in system.coordinator.dispatcher.requests.values() for choice in request.choices]


async def _stop_workers(system: System) -> None:
    for worker in system.workers:
        await worker.stop()
