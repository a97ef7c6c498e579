"""What is remembered of a request's life, and the figures that are made of it."""

import asyncio
import math
from typing import Any

import pytest
from coordinator_harness import DECODE, PREFILL, System, running, until
from fake_worker import token_at

from baton.v1 import worker_link_pb2 as wire
from coordinator.timelines import MAX_ENDED, Timeline

PROMPT = [5, 6, 7] * 60
ID = "a-request-of-this-test"


async def ask(system: System, id: str = ID, **more: Any) -> int:
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 6, **more}
    async with system.http.post("/v1/completions", json=body, headers={"X-Request-Id": id}) as response:
        await response.read()
        return response.status


def timeline_of(system: System, id: str = ID) -> Timeline:
    timeline = system.coordinator.dispatcher.timelines.get(id)
    assert timeline is not None
    return timeline


def described(system: System, id: str = ID) -> dict[str, Any]:
    return timeline_of(system, id).described(0.0, str)


async def two_workers(system: System) -> None:
    await system.worker("prefill-0", PREFILL)
    await system.worker("decode-0", DECODE)


def test_every_part_of_a_request_has_its_time(run) -> None:
    async def check() -> None:
        async with running() as system:
            await two_workers(system)
            assert await ask(system) == 200
            told = described(system)
            assert (told["outcome"], told["completion_tokens"]) == ("completed", 6)
            names = [(span["name"], span.get("worker")) for span in told["spans"]]
            assert names == [
                ("admission", None), ("queue", "prefill-0"), ("prefill", "prefill-0"), ("queue", "decode-0"),
                ("decode", "decode-0"),
            ]  # fmt: skip
            for span in told["spans"]:
                assert 0 <= span["start_s"] <= span["end_s"] <= told["total_s"]
            prefill = told["spans"][2]
            assert prefill["end_s"] == told["first_token_s"]
            for name in ("queue", "prefill", "decode"):
                assert system.metric(f"baton_{name}_seconds_count") == 1

    run(check())


def test_what_a_worker_tells_after_the_end_is_taken_up_once(run) -> None:
    async def check() -> None:
        async with running() as system:
            await two_workers(system)
            await ask(system)
            decode = system.workers[1]
            times = wire.AttemptTimes(
                total_s=1.0, started_s=0.0, take_s=0.001, taken_s=0.004, wire_s=0.001, handover_bytes=4096, lane="shm"
            )
            ending = wire.Ending(id=wire.AttemptId(request_id=f"{ID}-0", attempt=1), times=times)
            await decode.send(ending=ending)
            await decode.send(ending=ending)
            await until(lambda: system.metric("baton_handover_wire_seconds_count") > 0)
            span = next(span for span in described(system)["spans"] if span["name"] == "handover")
            assert (span["worker"], span["bytes"], span["lane"], span["wire_s"]) == ("decode-0", 4096, "shm", 0.001)
            assert abs(span["wait_s"] - 0.002) < 1e-9
            assert system.metric("baton_handover_bytes_total", lane="shm") == 4096
            ending.id.request_id = "nobody-knows-it-0"
            await decode.send(ending=ending)
            assert await ask(system, "another-request-of-this-test") == 200
            assert system.metric("baton_handover_wire_seconds_count") == 1

    run(check())


def test_a_lane_that_a_worker_never_registered_makes_no_time_series(run) -> None:
    async def check() -> None:
        async with running() as system:
            await two_workers(system)
            await ask(system)
            times = wire.AttemptTimes(total_s=1.0, take_s=0.1, taken_s=0.2, handover_bytes=64, lane="made-up")
            ending = wire.Ending(id=wire.AttemptId(request_id=f"{ID}-0", attempt=1), times=times)
            await system.workers[1].send(ending=ending)
            await until(lambda: system.metric("baton_handover_bytes_total", lane="none") == 64)
            assert not system.metric("baton_handover_bytes_total", lane="made-up")

    run(check())


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0])
def test_times_that_cannot_be_spoil_no_figure(run, seconds: float) -> None:
    async def check() -> None:
        async with running() as system:
            await two_workers(system)
            await ask(system)
            id = wire.AttemptId(request_id=f"{ID}-0", attempt=1)
            worker, timelines = system.coordinator.registry.workers["decode-0"], system.coordinator.dispatcher.timelines
            for name in ("total_s", "started_s", "take_s", "taken_s", "wire_s"):
                times = wire.AttemptTimes(**({"take_s": 0.1, "taken_s": 0.2, name: seconds}))
                timelines.told(worker, wire.Ending(id=id, times=times))
            assert timelines.handover_wire.total() == (0.0, 0)
            late = wire.AttemptTimes(total_s=9.0, take_s=8.0, taken_s=9.0, wire_s=0.5)  # later than the request's end
            timelines.told(worker, wire.Ending(id=id, times=late))
            told = described(system)
            assert all(0 <= span["start_s"] <= span["end_s"] <= told["total_s"] for span in told["spans"])

    run(check())


def test_answers_are_counted_by_status_and_probes_are_not(run) -> None:
    async def check() -> None:
        async with running() as system:
            await system.worker()
            assert await ask(system) == 200
            assert await ask(system, temperature="warm") == 400
            async with system.http.get("/health") as response:
                assert response.status == 200
            assert system.metric("baton_responses_total", protocol="http", code="200") == 1
            assert system.metric("baton_responses_total", protocol="http", code="400") == 1

    run(check())


def test_a_retry_says_why_and_where(run) -> None:
    async def check() -> None:
        async with running() as system:
            await system.worker("decode-0", DECODE)
            await system.worker("decode-1", DECODE)
            for worker in system.workers:
                worker.fail_at, worker.heals = 3, True
            assert await ask(system) == 200
            spans = described(system)["spans"][1:]
            causes = [(span["attempt"], span["cause"]) for span in spans if "cause" in span]
            assert causes == [(1, "ended")]
            assert {span["attempt"] for span in spans} == {1, 2}
            assert spans[0]["worker"] != spans[-1]["worker"]

    run(check())


def test_a_running_request_is_seen_and_only_the_last_ended_ones_are_kept(run) -> None:
    async def check() -> None:
        async with running() as system:
            worker = await system.worker("decode-0", DECODE)
            worker.pause_at = 2
            asking = asyncio.create_task(ask(system))
            await until(lambda: system.metric("baton_prefill_seconds_count") > 0)
            timeline = timeline_of(system)
            assert timeline.described(timeline.started_s + 1.0, str)["outcome"] == "running"
            worker.go.set()
            assert await asking == 200
            timelines = system.coordinator.dispatcher.timelines
            for number in range(MAX_ENDED - 1):
                timelines._ended[str(number)] = timeline
            assert await ask(system, "the-last-request-of-all") == 200
            assert len(timelines._ended) == MAX_ENDED
            assert timelines.get(ID) is None
            assert not timelines._running

    run(check())


def test_names_of_vllm_say_what_is_running_and_what_waits(run) -> None:
    async def check() -> None:
        async with running() as system:
            worker = await system.worker("decode-0", DECODE)
            model = {"model_name": system.coordinator.intake.model_name}
            worker.pause_at = 2
            asking = asyncio.create_task(ask(system, n=2))
            await until(lambda: system.metric("vllm:num_requests_running", **model) == 2)
            assert system.metric("vllm:num_requests_waiting", **model) == 0
            worker.heartbeat.blocks.CopyFrom(wire.BlockCounts(total=4096, free=1024, cached=1024, held=2048))
            await worker.beat()
            await until(lambda: system.metric("vllm:kv_cache_usage_perc", **model) == 0.5)
            worker.go.set()
            await asking
            assert system.metric("vllm:num_requests_running", **model) == 0
            assert system.metric("vllm:request_success_total", **model, finished_reason="length") == 2
            assert system.metric("vllm:generation_tokens_total", **model) == 12
            assert system.metric("vllm:time_to_first_token_seconds_count", **model) == 1
            config = {**model, "block_size": "16", "num_gpu_blocks": "4096"}
            assert system.metric("vllm:cache_config_info", **config) == 1

    run(check())


def test_an_ended_choice_of_a_request_that_goes_on_neither_runs_nor_waits(run) -> None:
    async def check() -> None:
        async with running() as system:
            worker = await system.worker("decode-0", DECODE)
            model = {"model_name": system.coordinator.intake.model_name}
            worker.pause_at = 2
            body = {"model": "demo", "prompt": [[1, 2, 3], [4, 5, 6]], "stop_token_ids": [token_at([1, 2, 3], 0)]}
            async with system.http.post("/v1/completions", json=body | {"max_tokens": 4, "stream": True}) as answer:
                async for line in answer.content:
                    if b'"finish_reason":"stop"' in line:
                        break
                assert system.metric("vllm:num_requests_running", **model) == 1
                assert system.metric("vllm:num_requests_waiting", **model) == 0
                worker.go.set()
                await answer.read()

    run(check())
