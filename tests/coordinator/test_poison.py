"""A request that kills workers is stopped; those that it took down with it go on as if nothing had been."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from coordinator_harness import PREFILL, System, running, until
from fake_worker import FakeWorker, token_at

from baton.token_ids import count, unpack
from baton.v1 import inference_pb2 as api
from baton.v1 import worker_link_pb2 as wire
from coordinator.breakers import FIRST_BACKOFF_S

POISON = 299
Dies = Callable[[wire.Assignment, int], bool]


def at_once(assignment: wire.Assignment, index: int) -> bool:
    return POISON in unpack(assignment.token_ids)


def at_a_place(assignment: wire.Assignment, index: int) -> bool:
    return POISON in unpack(assignment.token_ids) and index == 7


def ever_further(assignment: wire.Assignment, index: int) -> bool:
    started = count(assignment.token_ids) - assignment.num_prompt_tokens
    return POISON in unpack(assignment.token_ids) and index == started + 30


async def ask(system: System, prompt: list[int], max_tokens: int) -> tuple[int, dict[str, Any], str]:
    """Status, error (or nothing) and text of a completion."""
    body = {"prompt": prompt, "max_tokens": max_tokens}
    async with system.http.post("/v1/completions", json=body) as response:
        answer = await response.json()
        text = answer["choices"][0]["text"] if response.status == 200 else ""
        return response.status, answer.get("error", {}), text


def right(system: System, prompt: list[int], count: int) -> str:
    return system.decode([token_at(prompt, index) for index in range(count)])


async def fleet(system: System, dies_of: Dies, count: int = 6, pace_s: float = 0.005) -> list[FakeWorker]:
    workers = [await system.worker(f"decode-{number}") for number in range(count)]
    for worker in workers:
        worker.dies_of, worker.pace_s = dies_of, pace_s
    return workers


def dead(workers: list[FakeWorker]) -> list[str]:
    return [worker.id for worker in workers if worker.closed.is_set()]


@pytest.mark.parametrize(("dies_of", "most"), [(at_once, 4), (at_a_place, 4), (ever_further, 7)])
def test_poison_among_many_is_stopped_after_few_deaths_and_all_others_end_right(run, dies_of: Dies, most: int) -> None:
    async def main() -> None:
        async with running() as system:
            workers = await fleet(system, dies_of, count=8)
            prompts = [[300 + number, 301, 302] for number in range(50)]
            innocents = [asyncio.create_task(ask(system, prompt, 80)) for prompt in prompts]
            await until(lambda: sum(len(worker.assignments) for worker in workers) == 50)
            code, error, _ = await ask(system, [POISON, 301], 400)
            assert (code, error["code"]) == (422, "poison")
            assert 2 <= len(dead(workers)) <= most
            for prompt, innocent in zip(prompts, innocents, strict=True):
                assert await innocent == (200, {}, right(system, prompt, 80))
            assert system.metric("baton_requests_total", outcome="poisoned") == 1
            assert system.metric("baton_quarantine_total", event="convicted") == 1
            assert system.metric("baton_suspects_total") >= 3
            before = len(dead(workers))
            if most == 4:  # sent again it kills one
                assert (await ask(system, [POISON, 301], 400))[0] == 422
                assert len(dead(workers)) == before + 1

    run(main())


def test_an_idle_fleet_loses_four_workers_to_poison_and_clients_are_not_told_to_try_again(run) -> None:
    async def main() -> None:
        async with running() as system:
            workers = await fleet(system, at_once, count=5)
            call = system.inference.Generate(api.GenerateRequest(token_ids=api.TokenIds(ids=[POISON, 301])))
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call.read()
            assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert len(dead(workers)) == 4

    run(main())


def test_a_stream_that_meets_four_killed_workers_in_a_busy_fleet_goes_on(run) -> None:
    async def main() -> None:
        async with running() as system:
            workers = await fleet(system, lambda assignment, index: False, count=6, pace_s=0.01)
            prompt = [400, 401]
            call = asyncio.create_task(ask(system, prompt, 200))
            for kills in range(4):
                await until(lambda: any(_has(worker, prompt) for worker in workers))
                held = next(worker for worker in workers if _has(worker, prompt))
                at = len(_stream(system))
                await until(lambda at=at: len(_stream(system)) >= at + 20)
                await held.stop()
                await until(lambda held=held: held.id not in system.coordinator.registry.workers)
                assert kills + 1 == len(dead(workers))
            assert await call == (200, {}, right(system, prompt, 200))

    run(main())


def _stream(system: System) -> list[int]:
    (request,) = system.coordinator.dispatcher.requests.values()
    return request.choices[0].stream.tokens


def _has(worker: FakeWorker, prompt: list[int]) -> bool:
    last = worker.assignments[-1].id if worker.assignments else None
    run = worker._runs.get((last.request_id, last.attempt)) if last is not None else None
    return not worker.closed.is_set() and run is not None and not run.done()


def test_what_is_in_the_way_of_an_isolated_request_is_moved_and_ends_right(run) -> None:
    async def main() -> None:
        async with running() as system:
            workers = await fleet(system, lambda assignment, index: False, count=5, pace_s=0)
            dispatcher = system.coordinator.dispatcher
            for worker in workers:
                worker.pause_at = 3
            prompts = [[600 + number, 301] for number in range(10)]
            innocents = [asyncio.create_task(ask(system, prompt, 9)) for prompt in prompts]
            await until(lambda: sum(len(worker.assignments) for worker in workers) == 10)
            for worker in workers:
                worker.dies_of = at_once
            assert (await ask(system, [POISON], 9))[0] == 422
            assert len(dead(workers)) == 4
            assert system.metric("baton_attempts_failed_total", cause="moved") > 0
            for worker in workers:
                worker.go.set()
            for prompt, innocent in zip(prompts, innocents, strict=True):
                assert await innocent == (200, {}, right(system, prompt, 9))
            await until(lambda: not dispatcher.quarantine.busy)

    run(main())


def test_a_prefill_worker_that_poison_kills_counts_too(run) -> None:
    async def main() -> None:
        async with running() as system:
            pools = [await system.worker(f"prefill-{number}", PREFILL) for number in range(2)]
            pools += await fleet(system, at_once, count=5)
            for worker in pools:
                worker.dies_of = at_once
            code, _, _ = await ask(system, [POISON] * 100, 9)
            assert code == 422
            assert len(dead(pools)) <= 6  # both of a pair, twice, and two alone

    run(main())


@pytest.mark.parametrize("knob", [{"fail_at": 2}, {"refuse": "no room"}, {"skip_at": 2}])
def test_the_breaker_of_the_worker_that_fails_opens_and_no_other(run, knob: dict[str, Any]) -> None:
    async def main() -> None:
        async with running() as system:
            bad, good = await system.worker("decode-a"), await system.worker("decode-b")
            vars(bad).update(knob)
            for number in range(12):
                prompt = [700 + number]
                assert (await ask(system, prompt, 5))[0] == 200
            states = {worker["id"]: worker["breaker"] for worker in (await _status(system))["workers"]}
            assert states == {"decode-a": "open", "decode-b": "closed"}
            assert system.metric("baton_worker_breaker_total", worker="decode-a", event="opened") == 1
            assert len(bad.assignments) == 3
            bad.fail_at, bad.refuse, bad.skip_at = None, "", None
            breakers = system.coordinator.dispatcher.breakers
            breakers._clock = lambda: time.monotonic() + FIRST_BACKOFF_S
            assert breakers.state("decode-a") == "half_open"
            good.pause_at = 0
            calls = [asyncio.create_task(ask(system, [800 + number], 5)) for number in range(2)]
            await until(lambda: breakers.state("decode-a") == "closed")
            good.go.set()
            assert [code for code, _, _ in await asyncio.gather(*calls)] == [200, 200]

    run(main())


async def _status(system: System) -> dict[str, Any]:
    async with system.http.get("/status") as response:
        return json.loads(await response.text())


def test_the_death_of_a_prefill_worker_is_not_held_against_decode(run) -> None:
    async def main() -> None:
        async with running() as system:
            decode = await system.worker("decode-0")
            for number in range(4):
                prefill = await system.worker(f"prefill-{number}", PREFILL)
                prefill.pause_at = decode.pause_at = 0
                decode.go.clear()
                call = asyncio.create_task(ask(system, [900 + number] * 100, 3))
                await prefill.wait_for(lambda prefill=prefill: bool(prefill.assignments))
                await prefill.stop()
                await until(lambda number=number: f"prefill-{number}" not in system.coordinator.registry.workers)
                decode.go.set()
                assert (await call)[0] == 200
            assert system.coordinator.dispatcher.breakers.state("decode-0") == "closed"
            assert len(decode.assignments) == 4

    run(main())


def test_a_prefill_worker_that_ends_with_errors_gets_nothing_for_a_while(run) -> None:
    async def main() -> None:
        async with running() as system:
            bad, good = await system.worker("prefill-a", PREFILL), await system.worker("prefill-b", PREFILL)
            await system.worker("decode-0")
            bad.fail_at = 0
            for number in range(12):
                assert (await ask(system, [900 + number] * 100, 3))[0] == 200
                await asyncio.sleep(0.01)
            assert len(bad.assignments) <= 4
            assert len(good.assignments) >= 8
            assert system.coordinator.dispatcher.breakers.state("prefill-a") == "open"
            assert system.coordinator.dispatcher.breakers.state("decode-0") == "closed"

    run(main())


def test_a_prefill_worker_that_computes_and_does_not_hand_over_is_charged_by_what_decode_says(run) -> None:
    async def main() -> None:
        async with running() as system:
            prefill, decode = await system.worker("prefill-0", PREFILL), await system.worker("decode-0")
            decode.complains = True
            for number in range(3):
                assert (await ask(system, [900 + number] * 100, 3))[0] == 200
            assert system.coordinator.dispatcher.breakers.state("prefill-0") == "open"
            assert system.coordinator.dispatcher.breakers.state("decode-0") == "closed"
            assert len(prefill.assignments) == 3

    run(main())


def test_one_worker_whose_breaker_is_open_serves_if_there_is_no_other(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker("decode-0")
            worker.fail_at = 2
            assert (await ask(system, [301], 5))[0] == 503
            assert system.metric("baton_avoided_workers_used_total") == 2
            worker.fail_at = None
            assert (await ask(system, [302], 5))[0] == 200
            assert system.metric("baton_worker_breaker_total", worker="decode-0", event="overridden") == 1

    run(main())


def test_retries_of_a_failing_fleet_wait_and_succeed(run) -> None:
    async def main() -> None:
        async with running(max_attempts=1000) as system:
            workers = [await system.worker("decode-a"), await system.worker("decode-b")]
            for worker in workers:
                worker.fail_at = 2
            calls = [asyncio.create_task(ask(system, [301, number + 400], 5)) for number in range(10)]
            await until(lambda: system.metric("baton_retries_delayed_total") >= 10)
            sent = sum(len(worker.assignments) for worker in workers)
            assert sent < 60
            for worker in workers:
                worker.fail_at = None
            for call in calls:
                assert (await call)[0] == 200

    run(main())


def test_a_client_that_hangs_up_while_its_retry_waits_leaves_nothing(run) -> None:
    async def main() -> None:
        async with running(max_attempts=1000) as system:
            worker = await system.worker("decode-0")
            worker.fail_at = 2
            call = asyncio.create_task(ask(system, [301], 5))
            await until(lambda: system.metric("baton_retries_delayed_total") >= 1)
            call.cancel()
            dispatcher = system.coordinator.dispatcher
            await until(lambda: not dispatcher.requests)
            assert dispatcher._delayed == {}

    run(main())
