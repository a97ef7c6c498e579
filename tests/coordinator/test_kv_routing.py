"""Prompts go to workers that say, over a real link, that they hold their beginnings."""

import asyncio

from coordinator_harness import DECODE, PREFILL, System, running, until
from fake_worker import FakeWorker

MIXED = (PREFILL, DECODE)
TEXT = "count the words of this " * 60


async def ask(system: System, prompt: str = TEXT, **body: object) -> None:
    answer = await system.openai.completions.create(model="demo", prompt=prompt, max_tokens=2, **body)  # type: ignore[call-overload]
    assert answer.choices[0].finish_reason == "length"


def told(system: System) -> bool:
    """Everything that the workers sent is known."""
    known = {id: caches.sequence for id, caches in system.coordinator.dispatcher.knowledge.workers()}
    return known == {worker.id: worker.heartbeat.kv_sequence for worker in system.workers}


async def measured(system: System, worker: FakeWorker, **figures: float) -> None:
    """The worker says in a heartbeat that it computes 1,000 tokens a second, and what else it measured."""
    worker.heartbeat.prefill_tokens_per_s = 1000.0
    for figure, value in figures.items():
        setattr(worker.heartbeat, figure, value)
    await worker.beat()
    await until(lambda: system.coordinator.registry.workers[worker.id].heartbeat.prefill_tokens_per_s == 1000.0)


def test_a_prompt_goes_to_the_worker_that_holds_it_and_others_are_told_of_that_one(run) -> None:
    async def main() -> None:
        async with running() as system:
            workers = [await system.worker(f"w{at}", *MIXED) for at in range(4)]
            for worker in workers:
                assert worker.welcome is not None
                assert worker.welcome.kv_events
                await worker.hold([])
                await measured(system, worker)
            await workers[2].hold(system.encode(TEXT))
            await until(lambda: told(system))
            for _ in range(5):
                await ask(system)
            assert [len(worker.assignments) for worker in workers] == [0, 0, 5, 0]
            num_tokens = len(system.encode(TEXT))
            expected = min(num_tokens // 16 * 16, num_tokens - 1)
            assert system.metric("baton_routed_tokens_total") == 5 * num_tokens
            assert system.metric("baton_routed_cached_tokens_total", who="coordinator") == 5 * expected
            assert system.metric("baton_routed_cached_tokens_total", who="worker") == 5 * 3  # says every fake worker
            await measured(system, workers[2], waiting_prefill_tokens=50_000)
            await until(lambda: system.coordinator.registry.table.waiting_prefill_tokens.max() > 1000)
            await ask(system)
            (assignment,) = (each for at in (0, 1, 3) for each in workers[at].assignments)
            (holder,) = assignment.holders
            assert holder.worker.worker_id == "w2"
            assert holder.num_tokens == len(system.encode(TEXT)) // 16 * 16

    run(main())


def test_a_tenant_does_not_profit_from_another_tenant(run) -> None:
    async def main() -> None:
        async with running() as system:
            one, two = [await system.worker(name, *MIXED) for name in ("one", "two")]
            for worker in (one, two):
                await worker.hold([])
                await measured(system, worker)
            await one.hold(system.encode(TEXT), "salt of a")
            await two.hold(system.encode(TEXT), "salt of b")
            await until(lambda: told(system))
            for _ in range(3):
                await ask(system, extra_body={"cache_salt": "salt of a"})
            assert (len(one.assignments), len(two.assignments)) == (3, 0)
            for _ in range(4):
                await ask(system)
            assert (len(one.assignments), len(two.assignments)) == (5, 2), "it is nobody's, so they take turns"
            assert not any(each.holders for each in (*one.assignments, *two.assignments))

    run(main())


def test_after_a_lost_message_the_coordinator_asks_for_a_snapshot_once(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker("w", *MIXED)
            await worker.hold(system.encode(TEXT))
            await worker.hold([1] * 32, is_lost=True)
            await worker.hold([2] * 32)
            await worker.hold([3] * 32, is_lost=True)
            await worker.hold([4] * 32)
            await worker.wait_for(lambda: worker.snapshots_wanted > 0)
            await until(lambda: system.metric("baton_kv_index_gaps_total") == 2)
            before = system.metric("baton_kv_index_blocks")
            assert before == len(system.encode(TEXT)) // 16 + 2 + 2, "what was known stays"
            await worker.hold([5] * 32, snapshot=True)
            await until(lambda: system.metric("baton_kv_index_blocks") < before)
            await ask(system)
            assert system.metric("baton_kv_index_worker_known", worker="w") == 1
            assert system.metric("baton_kv_index_lag_messages", worker="w") == 0
            assert worker.snapshots_wanted == 1
            assert system.metric("baton_kv_index_snapshots_total") == 2

    run(main())


def test_what_a_worker_held_is_forgotten_when_it_dies(run) -> None:
    async def main() -> None:
        async with running() as system:
            first = await system.worker("one", *MIXED)
            await first.hold(system.encode(TEXT))
            await until(lambda: told(system))
            await first.stop()
            await until(lambda: "one" not in system.coordinator.registry.workers)
            again = await system.worker("one", *MIXED)
            other = await system.worker("two", *MIXED)
            for worker in (again, other):
                await measured(system, worker)
            for _ in range(4):
                await ask(system)
            assert (len(again.assignments), len(other.assignments)) == (2, 2)
            assert not any(each.holders for each in (*again.assignments, *other.assignments))
            async with system.http.get("/status") as response:
                kv = (await response.json())["routing"]["kv"]
            assert (kv["mode"], kv["blocks"], kv["entries"]) == ("exact", 0, 0)

    run(main())


def test_what_is_no_list_of_blocks_costs_a_worker_its_link(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker("w", *MIXED)
            await worker.send(kv_events={"sequence": 1, "snapshot": True, "changes": [{"tier": 1, "stored": b"123"}]})
            async with asyncio.timeout(5):
                await worker.closed.wait()

    run(main())


def test_guessing_is_a_choice_that_shows(run) -> None:
    async def main() -> None:
        async with running(kv_routing="approximate", routing="prefix_aware") as system:
            one, two = [await system.worker(name, *MIXED) for name in ("one", "two")]
            assert one.welcome is not None
            assert not one.welcome.kv_events
            for _ in range(4):
                await ask(system)
            assert sorted((len(one.assignments), len(two.assignments))) == [0, 4]
            assert system.metric("baton_routing_info", policy="prefix_aware", kv="approximate") == 1
            async with system.http.get("/status") as response:
                routing = (await response.json())["routing"]
            assert (routing["policy"], routing["kv"]["mode"]) == ("prefix_aware", "approximate")
            assert routing["kv"]["strides"] > 0

    run(main())
