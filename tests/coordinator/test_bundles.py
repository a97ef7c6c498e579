"""What is said at once goes over a link as one message, where the other side reads that."""

import asyncio

import grpc
import pytest
from coordinator_harness import running, until
from fake_worker import FakeWorker

from baton.v1 import worker_link_pb2 as wire
from baton.v1 import worker_link_pb2_grpc as rpc


@pytest.mark.parametrize(("bundles", "expected"), [(True, [3]), (False, [1, 1, 1])])
def test_a_worker_that_reads_bundles_gets_them(run, bundles: bool, expected: list[int]) -> None:
    async def main() -> None:
        async with running(heartbeat_interval_s=1.5) as system:
            registration = FakeWorker(0, bundles=bundles).registration
            async with grpc.aio.insecure_channel(f"127.0.0.1:{system.ports.link}") as channel:
                call = rpc.WorkerLinkStub(channel).Connect()
                await call.write(wire.WorkerMessage(registration=registration))
                welcome = (await call.read()).welcome
                assert welcome.bundles
                worker = system.coordinator.registry.workers[registration.worker_id]
                for number in range(3):
                    worker.send(wire.CoordinatorMessage(unpin=wire.Unpin(id=str(number))))
                messages = [await call.read() for _ in expected]
                said = [[each.unpin.id for each in message.bundle or [message]] for message in messages]
                assert [len(each) for each in said] == expected
                assert [id for each in said for id in each] == ["0", "1", "2"]

    run(main())


def test_what_a_worker_says_as_one_is_heard_in_its_order_until_it_is_lost(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker()
            heard = system.coordinator.registry.workers[worker.id]
            beats = [
                wire.WorkerMessage(heartbeat=wire.WorkerHeartbeat(running_requests=count, counters={"steps": 1}))
                for count in (1, 2)
            ]
            wrong = wire.WorkerMessage(bundle=beats)  # a bundle in a bundle is nothing that a worker says
            worker.send_heartbeats = False
            await worker.send(bundle=beats)
            await until(lambda: heard.heartbeat.running_requests == 2)
            await worker.send(bundle=[beats[0], wrong, beats[1]])
            await until(heard.lost.is_set)
            assert heard.heartbeat.running_requests == 1
            await asyncio.wait_for(worker.closed.wait(), 5)

    run(main())
