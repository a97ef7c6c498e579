"""A worker's link: it registers, hears assignments, notices a dead or silent coordinator, and dials again."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from baton.errors import ConfigurationError
from baton.v1 import worker_link_pb2 as wire
from baton.v1 import worker_link_pb2_grpc as rpc
from worker.link import BUNDLE_BYTES, CoordinatorLink, LinkHandler, Refused
from worker.roles import KvLink, Link

WELCOME = wire.CoordinatorMessage(welcome=wire.Welcome(heartbeat_interval_s=0.05, heartbeat_timeout_s=0.6))
BEAT = wire.CoordinatorMessage(heartbeat=wire.CoordinatorHeartbeat())
REGISTRATION = wire.Registration(worker_id="w", incarnation=7)
Script = Callable[[Any, Any], AsyncIterator[wire.CoordinatorMessage]]


class Recorder(LinkHandler):
    def __init__(self) -> None:
        self.assigned: asyncio.Queue[str] = asyncio.Queue()
        self.aborted: asyncio.Queue[str] = asyncio.Queue()
        self.pins: list[str] = []
        self.reserved: list[int] = []
        self.adopted: list[str] = []
        self.claimed: list[str] = []
        self.cached: dict[str, int] = {}
        self.linked: list[int] = []
        self.kv_wanted = 0
        self.drains = 0
        self.lost = asyncio.Event()

    def on_assignment(self, link: Link, assignment: wire.Assignment) -> None:
        self.assigned.put_nowait(assignment.id.request_id)

    def on_abort(self, link: Link, id: wire.AttemptId) -> None:
        self.aborted.put_nowait(id.request_id)

    def on_pin(self, link: Link, pin: wire.Pin) -> None:
        self.pins.append(pin.id)

    def on_unpin(self, link: Link, id: str) -> None:
        self.pins.remove(id)

    def on_reserve(self, link: Link, token: int) -> None:
        self.reserved.append(token)

    def on_unreserve(self, link: Link, token: int) -> None:
        self.reserved.remove(token)

    def on_drain(self) -> None:
        self.drains += 1

    def on_adopt(self, link: Link, adopt: wire.Adopt) -> None:
        self.adopted.append(adopt.id.request_id)

    def on_claim(self, link: Link, claim: wire.Claim) -> None:
        self.claimed.append(claim.request_id)

    def on_cached_tokens(self, cached: wire.CachedTokens) -> None:
        self.cached[cached.id.request_id] = cached.num_tokens

    def on_linked(self, link: Link) -> None:
        self.linked.append(link.coordinator)

    def on_kv_wanted(self, link: KvLink) -> None:
        self.kv_wanted += 1
        link.kv_sequence += 5

    def on_lost(self, link: Link) -> None:
        self.lost.set()


class FakeCoordinator(rpc.WorkerLinkServicer):
    """Answers each connection with the next script, the last one again and again."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.heard: asyncio.Queue[str | None] = asyncio.Queue()
        self.kv_sequences: list[int] = []
        self.connections = 0

    async def Connect(self, request_iterator: Any, context: Any) -> Any:
        self.connections += 1
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        listening = asyncio.ensure_future(self._listen(request_iterator))
        try:
            async for message in script(request_iterator, context):
                yield message
        finally:
            listening.cancel()

    async def _listen(self, messages: Any) -> None:
        async for message in messages:
            if message.HasField("heartbeat"):
                self.kv_sequences.append(message.heartbeat.kv_sequence)
            self.heard.put_nowait(message.WhichOneof("message"))


@asynccontextmanager
async def linked(coordinator: FakeCoordinator) -> AsyncIterator[tuple[Recorder, Any, Any]]:
    server = grpc.aio.server()
    rpc.add_WorkerLinkServicer_to_server(coordinator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    recorder = Recorder()
    link = CoordinatorLink(f"127.0.0.1:{port}", REGISTRATION, recorder, wire.WorkerHeartbeat)
    running = asyncio.create_task(link.run(lambda: None))
    try:
        async with asyncio.timeout(20):
            yield recorder, link, running
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError, ConfigurationError):
            await running
        await server.stop(None)


async def beating(*messages: wire.CoordinatorMessage) -> AsyncIterator[wire.CoordinatorMessage]:
    yield WELCOME
    for message in messages:
        yield message
    while True:
        yield BEAT
        await asyncio.sleep(0.05)


def test_assignments_aborts_and_drains_arrive_and_heartbeats_go_up() -> None:
    id = wire.AttemptId(request_id="r", attempt=1)
    messages = [
        wire.CoordinatorMessage(assignment=wire.Assignment(id=id)),
        wire.CoordinatorMessage(abort=wire.AbortAttempt(id=id)),
        wire.CoordinatorMessage(pin=wire.Pin(id="kept")),
        wire.CoordinatorMessage(pin=wire.Pin(id="gone")),
        wire.CoordinatorMessage(unpin=wire.Unpin(id="gone")),
        wire.CoordinatorMessage(reserve=wire.Reserve(token=5)),
        wire.CoordinatorMessage(reserve=wire.Reserve(token=6)),
        wire.CoordinatorMessage(unreserve=wire.Unreserve(token=5)),
        wire.CoordinatorMessage(drain=wire.Drain()),
    ]

    async def run() -> None:
        coordinator = FakeCoordinator(lambda _, __: beating(*messages))
        async with linked(coordinator) as (recorder, _, _):
            assert await recorder.assigned.get() == "r"
            assert await recorder.aborted.get() == "r"
            assert [await coordinator.heard.get() for _ in range(3)] == ["registration", "heartbeat", "heartbeat"]
            assert recorder.drains == 1
            assert recorder.pins == ["kept"]
            assert recorder.reserved == [6]
            assert not recorder.lost.is_set()

    asyncio.run(run())


def test_a_coordinator_that_wants_to_know_of_caches_is_told_how_far_its_link_is() -> None:
    welcome = wire.Welcome(heartbeat_interval_s=0.05, heartbeat_timeout_s=0.6, kv_events=True)
    ask = wire.CoordinatorMessage(send_kv_snapshot=wire.SendKvSnapshot())

    async def asking_twice(_: Any, __: Any) -> AsyncIterator[wire.CoordinatorMessage]:
        yield wire.CoordinatorMessage(welcome=welcome)
        yield ask
        await asyncio.sleep(0.2)

    async def run() -> None:
        coordinator = FakeCoordinator(asking_twice, lambda _, __: beating())
        async with linked(coordinator) as (recorder, link, _):
            await recorder.lost.wait()
            assert recorder.kv_wanted == 2
            assert coordinator.kv_sequences[-1] == 10
            assert set(coordinator.kv_sequences) <= {5, 10}
            await link.connected.wait()
            link.send(wire.WorkerMessage(heartbeat=wire.WorkerHeartbeat(running_requests=3)))
            while coordinator.kv_sequences[-1]:
                await coordinator.heard.get()
            assert recorder.kv_wanted == 2, "this one did not want to know"

    asyncio.run(run())


def test_a_link_ends_though_grpc_has_taken_its_cancellation_for_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        link = CoordinatorLink("127.0.0.1:1", REGISTRATION, Recorder(), wire.WorkerHeartbeat)
        dialling = asyncio.Event()

        async def session(on_connected: Callable[[], None]) -> None:
            dialling.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ConnectionError("no such host") from None

        monkeypatch.setattr(link, "_session", session)
        running = asyncio.create_task(link.run(lambda: None))
        async with asyncio.timeout(5):
            await dialling.wait()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running

    asyncio.run(run())


def test_what_comes_as_one_is_heard_one_after_the_other() -> None:
    id = wire.AttemptId(request_id="r", attempt=1)
    said = [
        wire.CoordinatorMessage(assignment=wire.Assignment(id=id)),
        wire.CoordinatorMessage(reserve=wire.Reserve(token=5)),
        wire.CoordinatorMessage(unreserve=wire.Unreserve(token=5)),
        wire.CoordinatorMessage(abort=wire.AbortAttempt(id=id)),
    ]

    async def run() -> None:
        coordinator = FakeCoordinator(lambda _, __: beating(wire.CoordinatorMessage(bundle=said)))
        async with linked(coordinator) as (recorder, _, _):
            assert await recorder.aborted.get() == "r"
            assert recorder.assigned.get_nowait() == "r"
            assert recorder.reserved == []

    asyncio.run(run())


async def welcome_then_hang_up(_: Any, __: Any) -> AsyncIterator[wire.CoordinatorMessage]:
    yield WELCOME


async def welcome_then_silence(_: Any, __: Any) -> AsyncIterator[wire.CoordinatorMessage]:
    yield WELCOME
    await asyncio.Event().wait()


@pytest.mark.parametrize("script", [welcome_then_hang_up, welcome_then_silence])
def test_a_dead_or_silent_coordinator_is_noticed_and_dialled_again(script: Script) -> None:
    async def run() -> None:
        coordinator = FakeCoordinator(script, lambda _, __: beating())
        async with linked(coordinator) as (recorder, link, _):
            await recorder.lost.wait()
            await link.connected.wait()
            assert coordinator.connections == 2

    asyncio.run(run())


def test_a_silent_coordinator_is_left_when_the_stated_time_is_over() -> None:
    welcome = wire.CoordinatorMessage(welcome=wire.Welcome(heartbeat_interval_s=0.4, heartbeat_timeout_s=0.8))

    async def last_word(_: Any, __: Any) -> AsyncIterator[wire.CoordinatorMessage]:
        yield welcome
        await asyncio.sleep(0.45)
        yield BEAT
        said.append(time.monotonic())
        await asyncio.Event().wait()

    said: list[float] = []

    async def run() -> None:
        async with linked(FakeCoordinator(last_word, lambda _, __: beating())) as (recorder, _, _):
            await recorder.lost.wait()
            assert 0.7 < time.monotonic() - said[0] < 1.1

    asyncio.run(run())


def test_a_worker_that_stood_still_does_not_leave_a_coordinator_that_spoke_meanwhile() -> None:
    async def run() -> None:
        coordinator = FakeCoordinator(lambda _, __: beating())
        async with linked(coordinator) as (recorder, link, _):
            await link.connected.wait()
            time.sleep(1.2)  # noqa: ASYNC251 - as if the process had been stopped
            await asyncio.sleep(0.3)
            assert not recorder.lost.is_set()

    asyncio.run(run())


def test_a_refused_worker_stops_and_says_why() -> None:
    async def refuse(_: Any, context: Any) -> AsyncIterator[wire.CoordinatorMessage]:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "page_size_tokens is 8, that of the others 16")
        yield BEAT

    async def run() -> None:
        async with linked(FakeCoordinator(refuse)) as (_, _, running):
            with pytest.raises(Refused, match="page_size_tokens is 8"):
                await running

    asyncio.run(run())


def test_messages_without_a_link_are_dropped_not_kept() -> None:
    async def run() -> None:
        link = CoordinatorLink("127.0.0.1:1", REGISTRATION, Recorder(), wire.WorkerHeartbeat)
        for _ in range(100):
            link.send(wire.WorkerMessage())
        assert link._outgoing is None

    asyncio.run(run())


@pytest.mark.parametrize(("bundles", "expected"), [(True, [2, 3, 1]), (False, [1] * 6)])
def test_what_is_said_at_once_goes_as_one_where_the_coordinator_reads_that(bundles: bool, expected: list[int]) -> None:
    heard: asyncio.Queue[wire.WorkerMessage] = asyncio.Queue()

    async def listen(messages: Any, _: Any) -> AsyncIterator[wire.CoordinatorMessage]:
        yield wire.CoordinatorMessage(
            welcome=wire.Welcome(heartbeat_interval_s=0.5, heartbeat_timeout_s=5.0, bundles=bundles)
        )
        async for message in messages:
            if message.WhichOneof("message") not in ("registration", "heartbeat"):
                heard.put_nowait(message)

    async def run() -> None:
        coordinator = FakeCoordinator(listen)
        coordinator._listen = lambda messages: asyncio.sleep(0)  # type: ignore[method-assign]
        async with linked(coordinator) as (_, link, _):
            await link.connected.wait()
            # The second one fills a bundle, and the last one ends the stream.
            details = ["", "x" * BUNDLE_BYTES, "", "", "", ""]
            for index, detail in enumerate(details):
                link.send(wire.WorkerMessage(ending=wire.Ending(num_tokens=index, detail=detail)))
                if index == 4:
                    while heard.qsize() < len(expected) - 1:
                        await asyncio.sleep(0.01)
            link.close()
            messages = [await heard.get() for _ in expected]
            said = [
                [each.ending.num_tokens for each in message.bundle or [message] if each.HasField("ending")]
                for message in messages
            ]
            assert [len(each) for each in said] == expected
            assert [number for each in said for number in each] == list(range(6))

    asyncio.run(run())


def test_a_link_ends_although_its_welcome_comes_in_the_same_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    class Call:
        def __init__(self) -> None:
            self.answer: asyncio.Future[wire.CoordinatorMessage] = asyncio.get_running_loop().create_future()
            self.reads = asyncio.Event()

        async def read(self) -> wire.CoordinatorMessage:
            self.reads.set()
            return await asyncio.shield(self.answer)

        def cancel(self) -> None:
            pass

    async def run() -> None:
        call = Call()
        stub = SimpleNamespace(Connect=lambda messages: call)
        monkeypatch.setattr("worker.link.WorkerLinkStub", lambda channel: stub)
        recorder = Recorder()
        link = asyncio.create_task(
            CoordinatorLink("127.0.0.1:1", REGISTRATION, recorder, wire.WorkerHeartbeat).run(lambda: None)
        )
        await asyncio.wait_for(call.reads.wait(), 5)
        call.answer.set_result(WELCOME)
        await asyncio.sleep(0)
        link.cancel()
        call.answer = asyncio.get_running_loop().create_future()
        await asyncio.wait({link}, timeout=5)
        assert link.cancelled()

    asyncio.run(run())
