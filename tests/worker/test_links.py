"""A worker's links to all coordinators: dialled as they are found, and never cut while they work."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from baton.discovery.base import Discovery, Fixed
from baton.errors import ConfigurationError
from baton.v1 import worker_link_pb2 as wire
from tests.worker.fake_coordinator import BEAT, FakeCoordinator, refusing
from tests.worker.test_link import REGISTRATION, Recorder
from worker import links as module
from worker.link import Refused
from worker.links import CoordinatorLinks

pytestmark = pytest.mark.timeout(60)


class Told(Discovery):
    """What the test says."""

    def __init__(self, *addresses: str) -> None:
        self._addresses = frozenset(addresses)
        self._on_change: Callable[[frozenset[str]], None] = lambda addresses: None

    async def announce(self, address: str) -> None:
        raise AssertionError("workers announce nothing")

    async def watch(self, on_change: Callable[[frozenset[str]], None]) -> None:
        self._on_change = on_change
        on_change(self._addresses)
        await asyncio.Event().wait()

    def say(self, *addresses: str) -> None:
        self._on_change(frozenset(addresses))


@asynccontextmanager
async def linked(discovery: Discovery, timeout_s: float = 5.0) -> AsyncIterator[tuple[CoordinatorLinks, Recorder]]:
    recorder = Recorder()
    links = CoordinatorLinks(REGISTRATION, recorder, wire.WorkerHeartbeat)
    running = asyncio.create_task(links.run(discovery, timeout_s))
    try:
        async with asyncio.timeout(20):
            yield links, recorder
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def test_every_coordinator_is_registered_with_and_hears_what_all_are_told() -> None:
    async def run() -> None:
        async with FakeCoordinator().up() as one, FakeCoordinator().up() as two, FakeCoordinator().up() as late:
            told = Told(one.address, two.address)
            async with linked(told) as (links, _):
                for each in (one, two):
                    await each.hears("heartbeat")
                told.say(one.address, two.address, late.address)
                await late.hears("heartbeat")
                links.send_all(wire.WorkerMessage(progress=wire.Progress()))
                for each in (one, two, late):
                    await each.hears("progress")
                    assert each.connections == 1

    asyncio.run(run())


def test_a_worker_is_ready_when_every_coordinator_has_it_that_was_found_lately(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that has only just come may be left with nobody when the next worker of a rolling upgrade goes."""

    async def run() -> None:
        late = FakeCoordinator()
        async with late.up():
            pass  # it has an address, and does not answer
        async with FakeCoordinator().up() as one, linked(Told(one.address, late.address)) as (links, _):
            await one.hears("heartbeat")
            assert links.unready() == "a coordinator that was found lately does not have this worker yet"
            async with late.up():
                await late.hears("heartbeat")
                assert links.unready() == ""
            monkeypatch.setattr(module, "ANSWERS_WITHIN_S", 0.0)
            assert links.unready() == "", "one that has gone, or never comes, is not waited for"

    asyncio.run(run())


def test_a_link_that_works_is_kept_though_its_coordinator_is_announced_no_more() -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            one = await stack.enter_async_context(FakeCoordinator().up())
            told = Told(one.address)
            async with linked(told) as (links, recorder):
                assert links.unready() == "no coordinator has this worker"
                await one.hears("heartbeat")
                told.say()
                for _ in range(10):
                    await one.hears("heartbeat")
                assert not recorder.lost.is_set()
                assert links.unready() == ""
                await stack.aclose()
                await recorder.lost.wait()
                assert links.unready()
                await asyncio.sleep(0.3)
                async with one.up():
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(one.hears("registration"), 1.5)  # it is not dialled again, until
                    told.say(one.address)
                    await one.hears("registration")

    asyncio.run(run())


def test_a_coordinator_that_is_gone_and_still_announced_is_dialled_until_it_is_back() -> None:
    async def run() -> None:
        one = FakeCoordinator()
        async with one.up():
            pass
        async with linked(Told(one.address)):
            await asyncio.sleep(0.3)
            async with one.up():
                await one.hears("heartbeat")

    asyncio.run(run())


def test_one_coordinator_that_refuses_is_asked_again_later_while_another_has_taken_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "REFUSED_RETRY_S", 0.1)

    async def run() -> None:
        async with AsyncExitStack() as stack:
            refuses = await stack.enter_async_context(FakeCoordinator(refusing("another model")).up())
            takes = await stack.enter_async_context(FakeCoordinator().up())
            await stack.enter_async_context(linked(Told(refuses.address, takes.address)))
            await takes.hears("heartbeat")
            while refuses.connections < 3:
                await asyncio.sleep(0.01)
            assert takes.connections == 1

    asyncio.run(run())


class Jealous(FakeCoordinator):
    """Like a real one: a worker that registers again has no other link any more."""

    def __init__(self) -> None:
        super().__init__(self._newest)
        self._hang_up = asyncio.Event()

    async def _newest(self) -> AsyncIterator[wire.CoordinatorMessage]:
        self._hang_up.set()
        self._hang_up = mine = asyncio.Event()
        welcome = wire.Welcome(coordinator_incarnation=5, heartbeat_interval_s=0.05, heartbeat_timeout_s=0.3)
        yield wire.CoordinatorMessage(welcome=welcome)
        while not mine.is_set():
            yield BEAT
            await asyncio.sleep(0.05)


def test_a_coordinator_with_two_addresses_gets_one_link_that_stays() -> None:
    async def run() -> None:
        async with Jealous().up() as one:
            by_name = one.address.replace("127.0.0.1", "localhost")
            told = Told(one.address, by_name)
            async with linked(told) as (links, _):
                await asyncio.sleep(1.0)
                connections = one.connections
                assert 2 <= connections <= 4
                await asyncio.sleep(2.0)  # longer than the longest pause before a link is dialled again
                assert one.connections == connections
                assert sum(link.connected.is_set() for link in links._links.values()) == 1

    asyncio.run(run())


def test_a_worker_that_every_coordinator_refuses_ends_and_says_why() -> None:
    async def run() -> None:
        async with (
            FakeCoordinator(refusing("another model")).up() as one,
            FakeCoordinator(refusing("another model")).up() as two,
        ):
            links = CoordinatorLinks(REGISTRATION, Recorder(), wire.WorkerHeartbeat)
            with pytest.raises(Refused, match="another model"):
                await links.run(Told(one.address, two.address), 5)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("discovery", "trouble", "hint"),
    [
        (Fixed(frozenset({"127.0.0.1:1"})), "", "check --coordinator"),
        (Told(), "", "start one with the same --discovery"),
        (Told(), "10.0.0.9:2379: silent", r"10\.0\.0\.9:2379: silent.*check --discovery"),
    ],
)
def test_a_worker_without_any_coordinator_gives_up_with_a_hint(discovery: Discovery, trouble: str, hint: str) -> None:
    async def run() -> None:
        discovery.trouble = trouble
        links = CoordinatorLinks(REGISTRATION, Recorder(), wire.WorkerHeartbeat)
        with pytest.raises(ConfigurationError, match=hint):
            await links.run(discovery, connect_timeout_s=0.2)

    asyncio.run(run())


def test_a_link_that_is_closed_ends_when_its_coordinator_has_read_everything() -> None:
    async def run() -> None:
        async with (
            FakeCoordinator().up() as one,
            FakeCoordinator().up() as two,
            linked(Told(one.address, two.address)) as (links, to),
        ):
            for each in (one, two):
                await each.hears("heartbeat")
            for _ in range(100):
                links.send_all(wire.WorkerMessage(progress=wire.Progress()))
            await links.close(10.0)
            assert to.lost.is_set()
            for each in (one, two):
                for _ in range(100):
                    await each.hears("progress")
                assert each.connections == 1, "nobody dials again"

    asyncio.run(run())


def test_closing_waits_for_no_coordinator_that_is_not_there() -> None:
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never says a word
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            async with FakeCoordinator().up() as one, linked(Told(one.address, address)) as (links, _):
                await one.hears("heartbeat")
                async with asyncio.timeout(5):
                    await links.close(60.0)

    asyncio.run(run())
