"""When a process notices that another has fallen silent, on a clock of the test's own."""

import asyncio
import itertools
from types import SimpleNamespace

import pytest

from baton.pulse import Pulse

INTERVAL_S, TIMEOUT_S = 0.5, 2.0


class Clock:
    """Stands still but for sleeps; `stall_s` makes the next one that much longer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.stall_s = 0.0
        monkeypatch.setattr("baton.pulse.time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr("baton.pulse.asyncio", SimpleNamespace(sleep=self._sleep))

    async def _sleep(self, seconds: float) -> None:
        self.now += seconds + self.stall_s + 1e-6
        self.stall_s = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("phase_s", [0.0, 0.01, 0.2, 0.499])
def test_silence_is_noticed_when_it_is_over_whenever_it_began(clock: Clock, phase_s: float) -> None:
    async def run() -> None:
        pulse = Pulse(INTERVAL_S, TIMEOUT_S)
        heard = clock.now + phase_s
        beats = []
        while not pulse.silent(heard):
            if await pulse.rest([clock.now, heard]):
                beats.append(clock.now)
        assert clock.now - heard == pytest.approx(TIMEOUT_S, abs=1e-3)
        assert [b - a for a, b in itertools.pairwise(beats)] == pytest.approx([INTERVAL_S] * (len(beats) - 1), abs=1e-3)

    asyncio.run(run())


def test_a_process_that_stood_still_gives_others_time_to_be_heard(clock: Clock) -> None:
    async def run() -> None:
        pulse = Pulse(INTERVAL_S, TIMEOUT_S)
        heard = clock.now
        await pulse.rest([heard])
        clock.stall_s = 60.0
        assert await pulse.rest([heard]), "the first thing is a sign of life of its own"
        woke = clock.now
        assert not pulse.silent(heard)
        assert not pulse.judges
        while not pulse.silent(heard):
            await pulse.rest([heard])
        assert clock.now - woke == pytest.approx(TIMEOUT_S / 2, abs=1e-3), "but not for ever"

    asyncio.run(run())


def test_who_hangs_up_on_a_process_that_stood_still_is_excused_only_while_it_reads_what_came(clock: Clock) -> None:
    """For longer, and poison would kill whoever is there unpunished."""

    async def run() -> None:
        pulse = Pulse(INTERVAL_S, TIMEOUT_S)
        await pulse.rest([clock.now])
        assert not pulse.stood_still
        clock.now += TIMEOUT_S
        assert pulse.stood_still, "before it looked at the clock itself"
        await pulse.rest([clock.now])
        woke = clock.now
        while pulse.stood_still:
            await pulse.rest([clock.now])
        assert clock.now - woke == pytest.approx(2 * INTERVAL_S, abs=INTERVAL_S)

    asyncio.run(run())


def test_with_nobody_to_listen_to_there_are_only_heartbeats(clock: Clock) -> None:
    async def run() -> None:
        pulse = Pulse(INTERVAL_S, TIMEOUT_S)
        start = clock.now
        assert all([await pulse.rest([]) for _ in range(5)])
        assert clock.now - start == pytest.approx(4 * INTERVAL_S, abs=1e-3)

    asyncio.run(run())
