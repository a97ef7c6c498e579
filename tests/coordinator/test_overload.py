"""Overload of a whole coordinator, with workers that have slots: who is refused, how soon, and what is left after."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator

import grpc
import openai
import pytest
from coordinator_harness import System, running, until
from fake_worker import FakeWorker
from msgspec.structs import replace

from baton.client import AsyncClient, ClientError
from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc as rpc
from baton.v1 import worker_link_pb2 as wire
from coordinator import grpc_api, limits, tokenizer
from coordinator.delivery import Choice
from coordinator.dispatch import Dispatcher
from coordinator.rollout import Rollout
from coordinator.routing import Route
from coordinator.worker_table import Candidates

SLOTS, ANSWER_TOKENS, TOKEN_S = 4, 5, 0.1
CAPACITY = SLOTS / (ANSWER_TOKENS * TOKEN_S)
TTFT_S = 1.5
BODY = {"model": "demo", "prompt": "x", "max_tokens": ANSWER_TOKENS, "stream": True}


async def slotted(system: System, slots: int = SLOTS) -> FakeWorker:
    """A worker that serves so many requests side by side, the others in the order of their arrival."""
    worker, free = await system.worker(), asyncio.Semaphore(slots)
    serve, worker.pace_s = worker._serve, TOKEN_S

    async def served(assignment: wire.Assignment) -> None:
        async with free:
            await serve(assignment)

    worker._serve = served  # type: ignore[method-assign]
    return worker


async def ask(system: System, **fields: object) -> tuple[int, float]:
    """Status, and seconds until the answer began or was refused."""
    started = time.monotonic()
    async with system.http.post("/v1/completions", json=BODY | fields) as response:
        took_s = time.monotonic() - started
        await response.read()
        return response.status, took_s


async def offer(system: System, rate: float, seconds: float) -> list[tuple[int, float]]:
    """Open loop: whoever comes does not look how others fare."""
    tasks, end = [], time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        tasks.append(asyncio.create_task(ask(system)))
        await asyncio.sleep(max(0.0, len(tasks) / rate - (seconds - (end - now))))
    return list(await asyncio.gather(*tasks))


def test_at_ten_times_the_capacity_goodput_stays_refusals_come_at_once_and_afterwards_nobody_waits(run) -> None:
    async def main() -> None:
        async with running(service_classes=f"standard={TTFT_S}/0") as system:
            await slotted(system)
            await offer(system, 10 * CAPACITY, 2.5)  # what a fleet can do shows when it is at its limit
            answers = await offer(system, 10 * CAPACITY, 3.0)
            served = [took_s for status, took_s in answers if status == 200]
            good = sum(took_s <= TTFT_S for took_s in served)
            # As strict as a machine that does other things allows; the figures are those of the fleet in virtual time.
            assert good >= 0.8 * len(served)
            assert good >= 0.5 * CAPACITY * 3.0
            refused = sorted(took_s for status, took_s in answers if status == 429)
            assert len(refused) > 5 * CAPACITY
            assert refused[len(refused) // 2] < 0.2, "while this process does everybody's work"
            started = time.monotonic()
            while (await ask(system))[0] != 200:
                assert time.monotonic() - started < 2 * TTFT_S
            after = await offer(system, 0.5 * CAPACITY, 1.0)
            assert all(status == 200 and took_s < TTFT_S for status, took_s in after)
            assert system.coordinator.dispatcher.num_streams == 0

    run(main())


class Predicts:
    """Routes as the dispatcher does; what is said of the next first token is the test's word."""

    def __init__(self, dispatcher: Dispatcher, ttft_s: float) -> None:
        self.route, self.ttft_s = dispatcher._route, ttft_s
        dispatcher._route = self  # type: ignore[method-assign,assignment]

    def __call__(self, choice: Choice, candidates: Candidates) -> Route | None:
        route = self.route(choice, candidates)
        return None if route is None else replace(route, ttft_s=self.ttft_s)


@contextlib.asynccontextmanager
async def full() -> AsyncIterator[tuple[System, FakeWorker, Predicts]]:
    """A coordinator whose next requests are refused: one waits, and the others would do so for 2.5 s, of 2."""
    async with running(service_classes="standard=2/0,patient=60/0") as system:
        worker = await slotted(system)
        worker.pause_at = 0
        policy = Predicts(system.coordinator.dispatcher, 2.5)
        held = asyncio.create_task(ask(system))
        await worker.wait_for(lambda: bool(worker.assignments))
        yield system, worker, policy
        worker.go.set()
        assert (await held)[0] == 200


def relieve(worker: FakeWorker, policy: Predicts) -> None:
    policy.ttft_s = 0.0
    worker.go.set()


def test_a_refusal_says_why_what_to_do_and_when_and_openais_client_comes_back_by_itself(run) -> None:
    async def main() -> None:
        async with full() as (system, worker, policy):
            async with system.http.post("/v1/completions", json=BODY) as response:
                assert response.status == 429
                error = (await response.json())["error"]
                assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
                assert "try again in" in error["message"]
                assert "class standard" in error["message"]
                wait_ms = int(response.headers["Retry-After-Ms"])
                assert 500 <= wait_ms <= 30_000
                assert int(response.headers["Retry-After"]) * 1000 >= wait_ms
            assert system.metric("baton_admission_refused_total", service_class="standard", cause="ttft") > 0
            with pytest.raises(openai.RateLimitError):
                await system.openai.completions.create(model="demo", prompt="x", max_tokens=2)
            patient = system.openai.with_options(max_retries=3)
            asyncio.get_running_loop().call_later(0.1, relieve, worker, policy)
            answer = await patient.completions.create(model="demo", prompt="x", max_tokens=2)
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 2

    run(main())


def test_batons_client_comes_back_when_it_was_told_to_and_not_more_often_than_it_may(run) -> None:
    async def main() -> None:
        async with full() as (system, worker, policy):
            async with AsyncClient(system.url, refusals=0) as client:
                with pytest.raises(ClientError, match="too much is waiting") as refused:
                    await anext(aiter(client.complete("x")))
                assert refused.value.retry_after_s is not None
                assert client.num_refused == 1
            async with AsyncClient(system.url) as client:
                asyncio.get_running_loop().call_later(0.1, relieve, worker, policy)
                assert [delta async for delta in client.complete("x", max_tokens=2)]
                assert client.num_refused >= 1

    run(main())


def test_over_grpc_a_refusal_is_resource_exhausted_with_a_pushback(run) -> None:
    async def main() -> None:
        async with full() as (system, _, _):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                _ = [each async for each in system.inference.Generate(api.GenerateRequest(text="x"))]
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert int(dict(refused.value.trailing_metadata() or ())["grpc-retry-pushback-ms"]) >= 500

    run(main())


def test_a_stream_that_is_computed_again_after_its_worker_died_is_not_refused(run) -> None:
    async def main() -> None:
        async with running(service_classes="standard=0.001/0") as system:
            first, _ = await system.worker(), await system.worker("decode-1")
            first.pause_at = 1
            holds = [asyncio.create_task(ask(system)) for _ in range(2)]
            await first.wait_for(lambda: bool(first.assignments))
            await first.stop()
            assert [status for status, _ in await asyncio.gather(*holds)] == [200, 200]

    run(main())


def test_a_request_whose_deadline_passed_while_it_waited_is_aborted_and_not_computed(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker()
            worker.pause_at = 0
            status, took_s = await ask(system, max_ttft_s=0.2)
            assert (status, took_s < 3.0) == (504, True)
            await worker.wait_for(lambda: len(worker.aborts) == 1)
            assert (await ask(system, deadline_s=0.3))[0] == 504
            assert worker.assignments[1].deadline_s <= 0.3
            await worker.wait_for(lambda: len(worker.aborts) == 2)
            request = api.GenerateRequest(text="x", max_ttft_s=0.2)
            with pytest.raises(grpc.aio.AioRpcError):
                _ = [each async for each in system.inference.Generate(request)]
            await worker.wait_for(lambda: len(worker.aborts) == 3)
            with pytest.raises(grpc.aio.AioRpcError):
                _ = [each async for each in system.inference.Generate(api.GenerateRequest(text="x"), timeout=0.4)]
            await worker.wait_for(lambda: len(worker.aborts) == 4)
            assert worker.assignments[3].deadline_s <= 0.41  # by its own clock, which is not that of the client

    run(main())


def test_a_first_token_in_time_leaves_the_rest_of_the_answer_its_time(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker()
            worker.pace_s = 0.05
            status, _ = await ask(system, max_ttft_s=0.15, max_tokens=6)
            assert status == 200
            assert system.metric("baton_requests_total", outcome="completed") == 1

    run(main())


def test_copies_for_shadow_versions_have_no_place_in_an_overload(run) -> None:
    async def main() -> None:
        async with full() as (system, _, _):
            assert (await ask(system))[0] == 429
            system.coordinator.dispatcher.versions.rollout = Rollout({"v": 1.0}, {"w": 1.0})
            patient = asyncio.create_task(ask(system, service_class="patient"))
            await until(lambda: system.metric("baton_shadows_total", event="dropped_load") == 1)
            patient.cancel()

    run(main())


def test_more_long_prompts_than_may_wait_for_the_tokenizer_are_refused(run, monkeypatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(tokenizer, "MAX_ENCODING", 2)
        async with running() as system:
            await system.worker()
            long = "word " * 20_000
            asked = [system.http.post("/tokenize", json={"prompt": long}) for _ in range(8)]
            answers = await asyncio.gather(*asked)
            assert {answer.status for answer in answers} == {200, 429}
            async with system.http.post("/tokenize", json={"prompt": long}) as response:
                assert response.status == 200

    run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_its_answer_is_hung_up_on_and_its_request_ends(run, monkeypatch, stream) -> None:
    async def main() -> None:
        monkeypatch.setattr(limits, "READ_TIMEOUT_S", 0.3)
        async with running(max_body_bytes=8 << 20) as system:
            worker = await system.worker()
            worker.token_at = lambda prompt, index: 300 + index % 3000
            narrow = socket.socket()
            narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
            narrow.connect(("127.0.0.1", system.ports.http))
            narrow.setblocking(False)
            _, writer = await asyncio.open_connection(sock=narrow, limit=1 << 12)
            body = (
                b'{"model": "demo", "prompt": [' + b",".join([b"5"] * 64) + b'], "max_tokens": 500, "logprobs": 20, '
                b'"ignore_eos": true, "n": 16, "stream": ' + (b"true" if stream else b"false") + b"}"
            )
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            writer.transport.pause_reading()
            await until(lambda: system.metric("baton_slow_readers_total") == 1, 25)
            await until(lambda: not system.coordinator.dispatcher.requests)
            writer.close()

    run(main())


def test_a_grpc_client_that_does_not_read_its_answer_loses_its_request(run, monkeypatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(grpc_api, "_READ_TIMEOUT_S", 0.3)
        async with running() as system:
            worker = await system.worker()
            worker.token_at = lambda prompt, index: 300 + index % 3000
            sampling = api.Sampling(max_tokens=500, ignore_eos=True, logprobs=20)
            small = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 10)]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{system.ports.grpc}", options=small) as channel:
                stub = rpc.InferenceStub(channel)
                call = stub.Generate(api.GenerateRequest(text="x", n=16, sampling=sampling))
                await until(lambda: system.metric("baton_slow_readers_total") == 1, 25)
                await until(lambda: not system.coordinator.dispatcher.requests)
                call.cancel()

    run(main())
