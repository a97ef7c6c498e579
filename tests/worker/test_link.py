"""A worker's link: it registers, hears assignments, notices a dead or silent coordinator, and dials again."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from baton import framed
from baton.errors import ConfigurationError
from baton.v1 import worker_link_pb2 as wire
from tests.worker.fake_coordinator import BEAT, WELCOME, FakeCoordinator, Script, beating, refusing
from worker.link import CoordinatorLink, LinkHandler, Refused
from worker.roles import KvLink, Link

REGISTRATION = wire.Registration(worker_id="w", incarnation=7)


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


@asynccontextmanager
async def linked(
    coordinator: FakeCoordinator,
) -> AsyncIterator[tuple[Recorder, CoordinatorLink, "asyncio.Task[None]"]]:
    async with coordinator.up():
        recorder = Recorder()
        link = CoordinatorLink(coordinator.address, REGISTRATION, recorder, wire.WorkerHeartbeat)
        running = asyncio.create_task(link.run(lambda: None))
        try:
            async with asyncio.timeout(20):
                yield recorder, link, running
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError, ConfigurationError):
                await running


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
        coordinator = FakeCoordinator(lambda: beating(*messages))
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

    async def asking_twice() -> AsyncIterator[wire.CoordinatorMessage]:
        yield wire.CoordinatorMessage(welcome=welcome)
        yield ask
        await asyncio.sleep(0.2)

    async def run() -> None:
        coordinator = FakeCoordinator(asking_twice, beating)
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


async def welcome_then_hang_up() -> AsyncIterator[wire.CoordinatorMessage]:
    yield WELCOME


async def welcome_then_silence() -> AsyncIterator[wire.CoordinatorMessage]:
    yield WELCOME
    await asyncio.Event().wait()


@pytest.mark.parametrize("script", [welcome_then_hang_up, welcome_then_silence])
def test_a_dead_or_silent_coordinator_is_noticed_and_dialled_again(script: Script) -> None:
    async def run() -> None:
        coordinator = FakeCoordinator(script, beating)
        async with linked(coordinator) as (recorder, link, _):
            await recorder.lost.wait()
            await link.connected.wait()
            assert coordinator.connections == 2

    asyncio.run(run())


def test_a_silent_coordinator_is_left_when_the_stated_time_is_over() -> None:
    welcome = wire.CoordinatorMessage(welcome=wire.Welcome(heartbeat_interval_s=0.4, heartbeat_timeout_s=0.8))

    async def last_word() -> AsyncIterator[wire.CoordinatorMessage]:
        yield welcome
        await asyncio.sleep(0.45)
        yield BEAT
        said.append(time.monotonic())
        await asyncio.Event().wait()

    said: list[float] = []

    async def run() -> None:
        async with linked(FakeCoordinator(last_word, beating)) as (recorder, _, _):
            await recorder.lost.wait()
            assert 0.7 < time.monotonic() - said[0] < 1.1

    asyncio.run(run())


def test_a_worker_that_stood_still_does_not_leave_a_coordinator_that_spoke_meanwhile() -> None:
    async def run() -> None:
        coordinator = FakeCoordinator(beating)
        async with linked(coordinator) as (recorder, link, _):
            await link.connected.wait()
            time.sleep(1.2)  # noqa: ASYNC251 - as if the process had been stopped
            await asyncio.sleep(0.3)
            assert not recorder.lost.is_set()

    asyncio.run(run())


def test_a_refused_worker_stops_and_says_why() -> None:
    async def run() -> None:
        refuses = FakeCoordinator(refusing("page_size_tokens is 8, that of the others 16"))
        async with linked(refuses) as (_, _, running):
            with pytest.raises(Refused, match="page_size_tokens is 8"):
                await running

    asyncio.run(run())


@pytest.mark.parametrize("address", ["nowhere", "host:port", "." * 70 + ":1", "127.0.0.1:1"])
def test_whatever_was_announced_is_dialled_again_and_again_until_it_is_not_wanted(address: str) -> None:
    async def run() -> None:
        link = CoordinatorLink(address, REGISTRATION, Recorder(), wire.WorkerHeartbeat)
        running = asyncio.create_task(link.run(lambda: None))
        done, _ = await asyncio.wait({running}, timeout=0.3)
        assert not done
        link.close()
        await asyncio.wait_for(running, 10)

    asyncio.run(run())


def test_messages_without_a_link_are_dropped_not_kept() -> None:
    async def run() -> None:
        link = CoordinatorLink("127.0.0.1:1", REGISTRATION, Recorder(), wire.WorkerHeartbeat)
        for _ in range(100):
            link.send(wire.WorkerMessage())
        assert link.unsent_bytes == 0

    asyncio.run(run())


def test_a_coordinator_that_does_not_read_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framed, "MAX_UNSENT_BYTES", 1 << 20)

    async def run() -> None:
        coordinator = FakeCoordinator()
        async with linked(coordinator) as (recorder, link, _):
            await coordinator.hears("heartbeat")
            coordinator.links[0]._transport.pause_reading()
            big = wire.WorkerMessage(ending=wire.Ending(detail="x" * (1 << 20)))
            while not recorder.lost.is_set():
                link.send(big)
                await asyncio.sleep(0.001)
            while coordinator.connections < 2:  # and dialled again
                await coordinator.heard.get()

    asyncio.run(run())


def test_what_this_worker_cannot_handle_ends_it() -> None:
    class Mistaken(Recorder):
        def on_drain(self) -> None:
            raise ZeroDivisionError

    async def run() -> None:
        async with FakeCoordinator(lambda: beating(wire.CoordinatorMessage(drain=wire.Drain()))).up() as coordinator:
            link = CoordinatorLink(coordinator.address, REGISTRATION, Mistaken(), wire.WorkerHeartbeat)
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(link.run(lambda: None), 10)

    asyncio.run(run())


def test_a_link_ends_in_whatever_moment_it_is_cancelled() -> None:
    async def run() -> None:
        async with FakeCoordinator().up() as coordinator:
            for turns in range(40):
                link = CoordinatorLink(coordinator.address, REGISTRATION, Recorder(), wire.WorkerHeartbeat)
                running = asyncio.create_task(link.run(lambda: None))
                for _ in range(turns):
                    await asyncio.sleep(0)
                running.cancel()
                await asyncio.wait({running}, timeout=5)
                assert running.cancelled(), turns

    asyncio.run(run())
