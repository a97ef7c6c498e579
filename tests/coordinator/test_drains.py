"""Workers that are told to finish and go."""

import asyncio
from typing import Any

from coordinator_harness import PREFILL, System, running, until
from fake_worker import token_at

from baton.token_ids import unpack


async def drain(system: System, **asked: Any) -> tuple[int, dict[str, Any]]:
    async with system.http.post("/drain", json=asked) as response:
        return response.status, await response.json()


async def ask(system: System, max_tokens: int = 4, prompt: str = "hello") -> str:
    async with system.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": max_tokens}) as response:
        return str((await response.json())["choices"][0]["text"])


def right(system: System, count: int = 4, prompt: str = "hello") -> str:
    ids = system.encode(prompt)
    return system.decode([token_at(ids, index) for index in range(count)])


def test_a_drained_worker_finishes_what_it_has_and_gets_nothing_new(run) -> None:
    async def main() -> None:
        async with running() as system:
            one = await system.worker("one")
            one.pause_at = 2
            call = asyncio.create_task(ask(system))
            await one.wait_for(lambda: len(one.assignments) == 1)
            two = await system.worker("two")
            status, told = await drain(system, workers=["one"])
            assert (status, list(told["draining"]), told["left"]) == (200, ["one"], 1)
            await until(lambda: not system.coordinator.registry.workers["one"].accepts)
            for _ in range(4):
                assert await ask(system) == right(system)
            one.go.set()
            assert await call == right(system)
            assert (len(one.assignments), len(two.assignments)) == (1, 4)
            assert system.metric("baton_attempts_failed_total", cause="moved") == 0

    run(main())


def test_streams_that_take_too_long_are_moved_whoever_had_the_worker_drain(run) -> None:
    async def main() -> None:
        async with running(drain_timeout_s=0.2) as system:
            one = await system.worker("one")
            one.pause_at = 2
            calls = [asyncio.create_task(ask(system)) for _ in range(3)]
            await until(lambda: _tokens(system) == [2, 2, 2])
            two = await system.worker("two")
            one.heartbeat.draining = True  # as by a signal, or another coordinator
            await one.beat()
            for call in calls:
                assert await call == right(system)
            assert [unpack(each.token_ids)[-2:] for each in two.assignments] == [_head(system)] * 3
            assert len(one.aborts) == 3
            assert system.metric("baton_drains_total", event="moved") == 3

    run(main())


def test_a_moved_stream_may_have_its_kv_from_the_worker_that_drains(run) -> None:
    async def main() -> None:
        async with running(drain_timeout_s=0.1) as system:
            one = await system.worker("one")
            one.pause_at = 2
            prompt = "count the words of this " * 60
            call = asyncio.create_task(ask(system, prompt=prompt))
            await until(lambda: _tokens(system) == [2])
            await one.hold(system.encode(prompt))
            two = await system.worker("two")
            await drain(system, workers=["one"])
            assert await call == right(system, prompt=prompt)
            (holder,) = two.assignments[0].holders
            assert holder.worker.worker_id == "one"
            assert holder.num_tokens > 0.8 * len(system.encode(prompt))

    run(main())


def test_what_nobody_else_can_take_stays_until_somebody_comes(run) -> None:
    async def main() -> None:
        async with running(drain_timeout_s=0.1) as system:
            one = await system.worker("one")
            one.pause_at = 2
            call = asyncio.create_task(ask(system))
            await until(lambda: _tokens(system) == [2])
            _, told = await drain(system, workers=["one"])
            assert told["left"] == 0
            await until(lambda: system.metric("baton_drains_total", event="stayed") == 1)
            assert not one.aborts
            await system.worker("of-another-model", model_version="new", model_fingerprint="g")
            await asyncio.sleep(0.6)
            assert not one.aborts
            two = await system.worker("two")
            assert await call == right(system)
            assert len(two.assignments) == 1

    run(main())


def test_the_last_decode_worker_leaves_its_work_to_prefill_workers(run) -> None:
    async def main() -> None:
        async with running(drain_timeout_s=0.1) as system:
            prefill = await system.worker("prefill-0", PREFILL, standby_roles=[2])
            decode = await system.worker("decode-0")
            decode.pause_at = 2
            call = asyncio.create_task(ask(system))
            await until(lambda: _tokens(system) == [2])
            _, told = await drain(system, workers=["decode-0"])
            assert told["left"] == 1
            assert await call == right(system)
            assert await ask(system) == right(system)
            assert len(prefill.assignments) == 2

    run(main())


def test_a_whole_version_is_drained_and_mistakes_are_told(run) -> None:
    async def main() -> None:
        async with running() as system:
            new = {"model_version": "new", "model_fingerprint": "g"}
            for id, options in (("a", {}), ("b", new), ("c", new)):
                await system.worker(id, **options)
            for wrong, says in (
                ({}, "give workers"),
                ({"workers": ["a"], "version": "v"}, "give workers"),
                ({"workers": ["a", "x"]}, "worker x is not here; there are ['a', 'b', 'c']"),
                ({"version": "x"}, "there are ['new', 'v']"),
            ):
                status, told = await drain(system, **wrong)
                assert (status, says in told["error"]["message"]) == (400, True), told
            assert all(worker.accepts for worker in system.coordinator.registry.workers.values())
            _, told = await drain(system, version="new")
            assert list(told["draining"]) == ["b", "c"]
            workers = system.coordinator.registry.workers
            await until(lambda: [workers[id].accepts for id in "abc"] == [True, False, False])
            headers = {"X-Forwarded-For": "10.0.0.1"}
            async with system.http.post("/drain", json={"version": "v"}, headers=headers) as response:
                assert response.status == 403

    run(main())


def _tokens(system: System) -> list[int]:
    requests = system.coordinator.dispatcher.requests.values()
    return [len(choice.stream.tokens) for request in requests for choice in request.choices]


def _head(system: System) -> list[int]:
    ids = system.encode("hello")
    return [token_at(ids, index) for index in range(2)]
