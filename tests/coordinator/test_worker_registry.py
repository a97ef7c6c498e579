"""What the coordinator believes of a worker between two heartbeats."""

import asyncio
import math
from types import SimpleNamespace

from outbox import Outbox

from baton.v1 import worker_link_pb2 as wire
from coordinator.workers import Leg, Worker, WorkerRegistry

USUAL = {
    "protocol_version": 1, "worker_id": "w", "incarnation": 1, "model": "demo", "roles": [1, 2], "total_blocks": 100,
    "page_size_tokens": 16, "max_model_tokens": 4096,
}  # fmt: skip


def registered(**changes: object) -> Worker:
    return Worker(wire.Registration(**(USUAL | changes)), Outbox(), lambda worker: None)


def leg_on(worker: Worker, handle: int) -> Leg:
    return Leg(SimpleNamespace(stream_id=f"s{handle}"), 1, worker, True, handle)


def test_load_counts_what_was_assigned_since_the_last_heartbeat() -> None:
    worker = registered()
    worker.beat(wire.WorkerHeartbeat(blocks=wire.BlockCounts(total=100, free=60, cached=30), running_requests=1))
    assert (worker.load().requests, worker.load().free_tokens) == (1, 90 * 16)
    for handle in range(3):
        worker.open(leg_on(worker, handle), num_tokens=160, waiting_tokens=100)
    load = worker.load()
    assert (load.requests, load.free_tokens, load.waiting_prefill_tokens) == (1 + 3, (90 - 3 * 11) * 16, 300)
    worker.beat(wire.WorkerHeartbeat(blocks=wire.BlockCounts(total=100, free=50), running_requests=7))
    assert (worker.load().requests, worker.load().free_tokens) == (7, 50 * 16)


def test_what_is_assigned_comes_on_top_of_what_other_coordinators_gave() -> None:
    worker = registered()
    worker.open(leg_on(worker, 1), num_tokens=160, waiting_tokens=100)
    worker.beat(wire.WorkerHeartbeat(running_requests=3, waiting_requests=1, waiting_prefill_tokens=350))
    assert (worker.load().requests, worker.load().waiting_prefill_tokens) == (4, 350)
    worker.open(leg_on(worker, 2), num_tokens=160, waiting_tokens=30)
    assert (worker.load().requests, worker.load().waiting_prefill_tokens) == (5, 380)
    for leg in list(worker.legs.values()):
        worker.close(leg)
    assert worker.load().requests == 3, "what has ended is none, though no heartbeat says so yet"


def test_a_closed_leg_is_no_load_and_is_not_found_any_more() -> None:
    worker = registered()
    leg = leg_on(worker, 5)
    worker.open(leg, 10, 10)
    assert worker.leg(leg.id) is leg
    for _ in range(2):
        worker.close(leg)
    assert worker.leg(leg.id) is None
    assert worker.load().requests == 0


def test_the_context_is_no_longer_than_the_pool() -> None:
    assert registered().context_tokens == 1600
    assert registered(max_model_tokens=512).context_tokens == 512


def test_a_worker_that_names_no_bound_of_what_it_runs_has_none() -> None:
    registry = WorkerRegistry("demo")
    for id, told, runs in (("old", 0, math.inf), ("new", 4, 4.0)):
        told = wire.Registration(**(USUAL | {"worker_id": id, "roles": [2], "max_running_requests": told}))
        assert registry.table.max_running[registry.register(told, Outbox()).row] == runs


def test_a_worker_that_does_not_read_is_lost_once() -> None:
    async def main() -> None:
        lost: list[Worker] = []
        link = Outbox()
        worker = Worker(wire.Registration(worker_id="slow", total_blocks=1, page_size_tokens=1), link, lost.append)
        worker.send(wire.CoordinatorMessage())
        assert worker.accepts
        link.reads = False
        for _ in range(2):
            worker.send(wire.CoordinatorMessage())
        worker.lose("said twice")
        await asyncio.sleep(0)
        assert lost == [worker]
        assert not worker.accepts

    asyncio.run(main())


def test_a_worker_may_die_of_what_was_just_aborted_until_it_was_heard_to_have_nothing() -> None:
    worker = registered()
    leg = leg_on(worker, 5)
    worker.open(leg, 10, 10)
    worker.abort(leg)
    assert worker.aftermath() == [leg]
    worker.beat(wire.WorkerHeartbeat())
    assert worker.aftermath() == [leg], "that heartbeat may be older than the abort"
    assert not worker.empty
    worker.beat(wire.WorkerHeartbeat())
    assert worker.empty
    assert worker.aftermath() == []
