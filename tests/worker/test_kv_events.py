"""What coordinators are told of caches: all of it first, then every change, or a gap that they see and ask about."""

import itertools
import math
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.metrics import WORKER_COUNTERS
from baton.name_changes import Changed, Held, NameChanges
from baton.v1 import worker_link_pb2 as wire
from worker import kv_events as module
from worker.kv_events import BATCH_S, MAX_NAMES, SNAPSHOT_INTERVAL_S, KvReporter

POOL, HOST, DISK = wire.KV_TIER_POOL, wire.KV_TIER_HOST, wire.KV_TIER_DISK
TIERS = {"host": HOST, "disk": DISK}
Told = dict["wire.KvTier.ValueType", set[bytes]]


def name(number: int) -> bytes:
    return number.to_bytes(4, "big") * 2 + b"the rest"


class Clock:
    """An event loop that runs when it is told to, in a time of its own."""

    def __init__(self) -> None:
        self.now = 100.0
        self._ready: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[float, int, Any]] = []
        self._numbers = itertools.count()

    def call_soon_threadsafe(self, function: Callable[..., object], *args: object) -> None:
        self._ready.append(lambda: function(*args))

    def call_later(self, delay_s: float, function: Callable[..., object], *args: object) -> Any:
        handle = SimpleNamespace(run=lambda: function(*args))
        handle.cancel = lambda: setattr(handle, "run", lambda: None)
        self._timers.append((self.now + delay_s, next(self._numbers), handle))
        return handle

    def run(self) -> None:
        """What is due, and what comes of it."""
        while self._ready or any(at <= self.now for at, *_ in self._timers):
            while self._ready:
                self._ready.popleft()()
            due = sorted(each[:2] for each in self._timers if each[0] <= self.now)
            for at, number in due:
                (handle,) = (each[2] for each in self._timers if each[1] == number)
                self._timers = [each for each in self._timers if each[1] != number]
                assert at <= self.now
                handle.run()

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        self.run()
        while next_at := min((at for at, *_ in self._timers if at <= end), default=None):
            self.now = max(self.now, next_at)
            self.run()
        self.now = end


class Cache:
    def __init__(self) -> None:
        self.names: set[bytes] = set()
        self.changes = NameChanges()

    def flip(self, number: int) -> None:
        self.changes.note(name(number), name(number) not in self.names)
        self.names ^= {name(number)}

    def held(self) -> Held:
        return Held(list(self.names), self.changes.take())


class FakeEngine:
    def __init__(self) -> None:
        self.cache = Cache()

    def watch_cache(self) -> Held:
        self.cache.changes.watch()
        return self.cache.held()


class FakeStore:
    def __init__(self) -> None:
        self.caches = {"host": Cache(), "disk": Cache()}

    def watch(self, on_first: Callable[[], None]) -> dict[str, Held]:
        for cache in self.caches.values():
            cache.changes.watch(on_first)
        return {tier: cache.held() for tier, cache in self.caches.items()}

    def take_changes(self) -> dict[str, Changed]:
        taken = {tier: cache.changes.take() for tier, cache in self.caches.items()}
        return {tier: changed for tier, changed in taken.items() if changed is not None}

    def unwatch(self) -> None:
        for cache in self.caches.values():
            cache.changes.unwatch()


class Coordinator:
    """One link, and what its coordinator makes of what it hears there."""

    coordinator = 7

    def __init__(self, world: "World") -> None:
        self.kv_sequence = 0
        self.unsent_bytes = 0
        self.told: Told | None = None
        self.messages: list[wire.KvEvents] = []
        self.num_gaps = 0
        self._world = world
        self._sequence = 0
        self._sent_at = -math.inf

    def send(self, message: wire.WorkerMessage) -> None:
        events = message.kv_events
        self.messages.append(events)
        now = self._world.clock.now
        assert now - self._sent_at > 0.99 * BATCH_S
        self._sent_at = now
        assert self.unsent_bytes < module.MAX_UNSENT_BYTES
        assert 0 <= events.age_s < 1000
        assert sum(len(each.stored) + len(each.removed) for each in events.changes) <= 8 * module.MAX_NAMES
        assert events.snapshot or events.changes
        assert self.kv_sequence == events.sequence > self._sequence
        self._look(events.sequence - 1)
        self._sequence = events.sequence
        if events.snapshot:
            self.told = {POOL: set(), HOST: set(), DISK: set()}
        if self.told is None:
            assert self._sequence > 1, "a snapshot comes first"
            return
        for change in events.changes:
            for short in cut(change.stored):
                assert short not in self.told[change.tier]
                self.told[change.tier].add(short)
            for short in cut(change.removed):
                self.told[change.tier].remove(short)

    def hear_heartbeat(self) -> None:
        self._look(self.kv_sequence)

    def _look(self, sequence: int) -> None:
        if sequence > self._sequence:
            self._sequence = sequence
            self.num_gaps += 1
            self.told = None
            self._world.clock.call_soon_threadsafe(self._world.reporter.wanted, self)


def cut(names: bytes) -> list[bytes]:
    assert len(names) % 8 == 0
    return [names[start : start + 8] for start in range(0, len(names), 8)]


class World:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        patch.setattr(module, "asyncio", SimpleNamespace(get_running_loop=lambda: self.clock))
        patch.setattr("time.monotonic", lambda: self.clock.now)
        self.engine, self.store = FakeEngine(), FakeStore()
        self.commands: deque[Callable[[Any], object]] = deque()
        self.counters = dict.fromkeys(WORKER_COUNTERS, 0.0)
        steps = SimpleNamespace(submit=self.commands.append)
        patch.setattr(FakeEngine, "unwatch_cache", lambda engine: engine.cache.changes.unwatch(), raising=False)
        patch.setattr(module, "Engine", FakeEngine)
        self.reporter = KvReporter(cast(Any, steps), cast(Any, self.store), self.counters)
        self.links: list[Coordinator] = []

    def cache(self, tier: "wire.KvTier.ValueType") -> Cache:
        return {POOL: self.engine.cache, HOST: self.store.caches["host"], DISK: self.store.caches["disk"]}[tier]

    def flip(self, tier: "wire.KvTier.ValueType", *numbers: int) -> None:
        for number in numbers:
            self.cache(tier).flip(number)

    def join(self) -> Coordinator:
        self.links.append(Coordinator(self))
        self.reporter.wanted(self.links[-1])
        return self.links[-1]

    def leave(self, link: Coordinator) -> None:
        self.links.remove(link)
        self.reporter.lost(link)

    def turn(self) -> None:
        """The engine runs its commands and a step."""
        while self.commands:
            self.commands.popleft()(self.engine)
        if (changed := self.engine.cache.changes.take()) is not None:
            self.clock.call_soon_threadsafe(self.reporter.on_cached, changed)

    def settle(self) -> None:
        """Until all that was asked for has been said, also where something was left out."""
        for link in self.links:
            link.unsent_bytes = 0
        for _ in range(4):
            self.turn()
            self.clock.pass_time(SNAPSHOT_INTERVAL_S + 30 * BATCH_S)
            for link in self.links:
                link.hear_heartbeat()
        for tier in (POOL, HOST, DISK):
            assert (self.cache(tier).changes._names is not None) == bool(self.links), "watched while somebody listens"
        for link in self.links:
            assert link.told == {tier: {each[:8] for each in self.cache(tier).names} for tier in (POOL, HOST, DISK)}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def numbers_of(link: Coordinator) -> list[int]:
    return [message.sequence for message in link.messages]


def test_a_snapshot_in_bounded_messages_then_changes(world: World) -> None:
    world.flip(POOL, *range(2 * MAX_NAMES + 10))
    world.flip(DISK, *range(5))
    link = world.join()
    world.settle()
    assert [message.snapshot for message in link.messages] == [True, False, False]
    assert numbers_of(link) == [1, 2, 3]
    world.flip(POOL, 1, 99999)
    world.flip(HOST, 3)
    world.settle()
    assert numbers_of(link) == [1, 2, 3, 4], "what happens at the same time is one message"
    assert {(each.tier, each.stored, each.removed) for each in link.messages[-1].changes} == {
        (POOL, name(99999)[:8], b""),
        (POOL, b"", name(1)[:8]),
        (HOST, name(3)[:8], b""),
    }
    assert world.counters["kv_events_sent"] == 2 * MAX_NAMES + 10 + 5 + 3
    assert (world.counters["kv_snapshots_sent"], world.counters["kv_events_dropped"]) == (1, 0)


def test_empty_caches_are_a_snapshot_too(world: World) -> None:
    link = world.join()
    world.settle()
    (message,) = link.messages
    assert message.snapshot
    assert not message.changes


def test_what_came_and_went_within_a_batch_is_told_to_nobody(world: World) -> None:
    link = world.join()
    world.settle()
    for _ in range(3):
        world.flip(POOL, 1)
        world.flip(HOST, 1)
        world.turn()
        world.clock.run()
    world.flip(POOL, 1)
    world.flip(HOST, 1)
    world.settle()
    assert len(link.messages) == 1


def test_the_age_is_that_of_the_oldest_change(world: World) -> None:
    link = world.join()
    world.settle()
    world.flip(POOL, 1)
    world.clock.pass_time(0.5)  # a long step
    world.flip(POOL, 2)
    world.turn()
    world.clock.pass_time(BATCH_S)
    assert link.messages[-1].age_s == pytest.approx(0.5 + BATCH_S)


def test_a_coordinator_that_does_not_read_gets_little_and_then_a_snapshot(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 20)
    slow, quick = world.join(), world.join()
    world.settle()
    slow.unsent_bytes = module.MAX_UNSENT_BYTES
    for number in range(21):
        world.flip(POOL, number)
        world.turn()
        world.clock.pass_time(1.0)
        assert len(slow.messages) == 1
    assert len(quick.messages) == 22
    assert (slow.kv_sequence, quick.kv_sequence) == (2, 22)
    assert world.counters["kv_events_dropped"] == 21
    world.settle()
    assert (slow.num_gaps, quick.num_gaps) == (1, 0)
    assert numbers_of(slow) == [1, 3]
    assert slow.messages[-1].snapshot


def test_a_coordinator_that_asks_in_a_loop_is_answered_now_and_then(world: World) -> None:
    link = world.join()
    for _ in range(100):
        world.reporter.wanted(link)
        world.turn()
        world.clock.pass_time(0.1)
    assert 10 <= world.counters["kv_snapshots_sent"] <= 11


def test_nobody_who_listens_costs_nothing(world: World) -> None:
    world.flip(POOL, 1)
    assert not world.engine.cache.changes
    first, second = world.join(), world.join()
    world.settle()
    world.leave(first)
    world.turn()
    world.flip(POOL, 2)
    world.flip(DISK, 2)
    assert world.engine.cache.changes
    assert world.store.caches["disk"].changes
    world.leave(second)
    world.turn()
    world.flip(POOL, 3)
    world.flip(DISK, 3)
    assert not world.engine.cache.changes
    assert not world.store.caches["disk"].changes
    world.clock.pass_time(1.0)
    assert not world.clock._timers


def test_a_link_that_is_lost_before_its_snapshot_is_told_nothing(world: World) -> None:
    lost, stays = world.join(), world.join()
    world.settle()
    world.reporter.wanted(lost)
    world.clock.pass_time(SNAPSHOT_INTERVAL_S)
    world.flip(POOL, 1)
    world.leave(lost)
    world.turn()
    world.settle()
    assert len(lost.messages) == 1
    assert len(stays.messages) == 2, "what had changed before that snapshot was not lost for others"


class Machine(RuleBasedStateMachine):
    """Changes, steps, links and time in any order, within bounds so small that all of them are met."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        for bound, value in {"MAX_NAMES": 5, "MAX_WAITING": 12, "MAX_UNSENT_BYTES": 3}.items():
            self.patch.setattr(module, bound, value)
        self.world = World(self.patch)

    @rule(
        tier=st.sampled_from([POOL, HOST, DISK]),
        numbers=st.lists(st.integers(0, 20), max_size=12),
        turn=st.booleans(),
        seconds=st.sampled_from([0.0, 0.005, 0.1, 1.0, 5.0]),
    )
    def change(self, tier: "wire.KvTier.ValueType", numbers: list[int], turn: bool, seconds: float) -> None:
        self.world.flip(tier, *numbers)
        if turn:
            self.world.turn()
        self.world.clock.pass_time(seconds)

    @precondition(lambda self: len(self.world.links) < 3)
    @rule()
    def join(self) -> None:
        self.world.join()

    @precondition(lambda self: self.world.links)
    @rule(data=st.data(), what=st.sampled_from(["leave", "stop reading", "read", "heartbeat", "ask"]))
    def at_a_link(self, data: st.DataObject, what: str) -> None:
        link = self.world.links[data.draw(st.integers(0, len(self.world.links) - 1))]
        match what:
            case "leave":
                self.world.leave(link)
            case "stop reading":
                link.unsent_bytes = 3
            case "read":
                link.unsent_bytes = 0
            case "heartbeat":
                link.hear_heartbeat()
            case _:
                self.world.reporter.wanted(link)

    @rule()
    def settle(self) -> None:
        self.world.settle()

    @invariant()
    def bounded(self) -> None:
        for listener in self.world.reporter._listeners.values():
            assert listener.num_waiting <= 12

    def teardown(self) -> None:
        try:
            self.world.settle()
        finally:
            self.patch.undo()


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
TestMachine = Machine.TestCase
