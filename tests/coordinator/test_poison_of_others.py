"""Two coordinators over the same workers, poison at one of them: it is found, and innocents of both end right."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from coordinator_harness import System, running, until
from fake_worker import FakeWorker, Reservation
from test_poison import POISON, Dies, ask, at_a_place, at_once, ever_further, right

from baton.token_ids import pack
from baton.v1 import worker_link_pb2 as wire
from coordinator import quarantine


class Shared:
    """One worker that both coordinators have: it dies to both."""

    def __init__(self, one: FakeWorker, two: FakeWorker, dies_of: Dies) -> None:
        self.links = [one, two]
        reservation = Reservation(self.links)
        for link in self.links:
            link.reservation, link.pace_s, link.dies_of = reservation, 0.005, dies_of
            link.on_death = self.die

    async def die(self) -> None:
        for link in self.links:
            await link.stop()

    @property
    def reserved_by_b(self) -> bool:
        return self.links[0].reservation.holder is self.links[1]

    @property
    def dead(self) -> bool:
        return self.links[0].closed.is_set()


@contextlib.asynccontextmanager
async def two(dies_of: Dies, count: int) -> AsyncIterator[tuple[System, System, list[Shared]]]:
    async with running() as a, running() as b:
        workers = []
        for number in range(count):
            links = [await system.worker(f"decode-{number}") for system in (a, b)]
            workers.append(Shared(*links, dies_of))
        yield a, b, workers


@pytest.mark.parametrize(("dies_of", "most"), [(at_once, 4), (at_a_place, 4), (ever_further, 8)])
def test_poison_of_one_is_found_while_the_other_has_streams_everywhere_and_none_of_these_is_ended(
    run, dies_of: Dies, most: int
) -> None:
    async def main() -> None:
        async with two(dies_of, 9) as (a, b, workers):
            prompts = [[300 + number, 301, 302] for number in range(25)]
            innocents = [
                (system, prompt, asyncio.create_task(ask(system, prompt, 200)))
                for system in (a, b)
                for prompt in prompts
            ]
            await until(lambda: all(link.num_running for worker in workers for link in worker.links))
            code, error, _ = await ask(a, [POISON, 301], 400)
            assert (code, error["code"]) == (422, "poison")
            assert 2 <= sum(worker.dead for worker in workers) <= most
            for system, prompt, innocent in innocents:
                assert await innocent == (200, {}, right(system, prompt, 200))
            assert b.metric("baton_suspects_total") > 0, "its streams were there"
            for system in (a, b):
                await until(lambda system=system: not system.coordinator.dispatcher.quarantine.busy)
            living = [worker.links[0].reservation for worker in workers if not worker.dead]
            await until(lambda: not any(reservation.token for reservation in living))

    run(main())


def test_an_isolated_innocent_on_whose_worker_the_other_lets_poison_loose_is_not_blamed(run) -> None:
    """Heartbeats are as old as they may be: what the other has sent since then shows in none of them."""

    async def main() -> None:
        async with two(at_once, 5) as (a, b, workers):
            call = asyncio.create_task(ask(b, [400], 300))
            for _ in range(4):
                await until(lambda: any(worker.links[1].num_running and not worker.dead for worker in workers))
                held = next(worker for worker in workers if worker.links[1].num_running and not worker.dead)
                assignment = wire.Assignment(
                    id=wire.AttemptId(request_id=f"poison-{held.links[0].id}", attempt=1), handle=99,
                    token_ids=pack([POISON]), num_prompt_tokens=1, sampling=wire.EngineSampling(max_tokens=5),
                )  # fmt: skip
                a.coordinator.registry.workers[held.links[0].id].send(wire.CoordinatorMessage(assignment=assignment))
                await held.links[0].wait_for(lambda held=held: bool(held.links[0].assignments))
                await asyncio.sleep(0.02)
                if held.reserved_by_b:
                    assert not held.dead, "it was refused"
                    break
                await until(lambda held=held: held.dead)
            else:
                raise AssertionError("the innocent was never isolated")
            assert await call == (200, {}, right(b, [400], 300))

    run(main())


def test_a_worker_that_one_has_to_itself_is_given_back_when_the_other_has_no_other(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "MAX_CLOSED_S", 0.3)
    monkeypatch.setattr(quarantine, "PATIENCE_S", 0.1)

    async def main() -> None:
        async with two(lambda assignment, index: False, 1) as (a, b, workers):
            (only,) = workers
            theirs = asyncio.create_task(ask(b, [400], 200))
            await until(lambda: only.links[1].num_running == 1)
            a.coordinator.dispatcher._suspects.isolated = lambda request: True
            only.links[0].pause_at = 3  # alone, it gets no further
            mine = asyncio.create_task(ask(a, [500], 60))
            await until(lambda: only.links[0].num_running == 1)
            assert only.links[0].reservation.cleared
            assert b.metric("baton_attempts_failed_total", cause="moved") == 1
            assert await theirs == (200, {}, right(b, [400], 200)), "although that one is still there"
            only.links[0].go.set()
            assert await mine == (200, {}, right(a, [500], 60))

    run(main())
