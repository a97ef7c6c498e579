"""Workers die, hang, refuse, repeat themselves and lie; clients get each token once, or a clear error."""

import asyncio
import json
import time
from typing import Any

import pytest
from coordinator_harness import PREFILL, System, running, until
from fake_worker import FakeWorker, Refused, token_at

from baton.token_ids import unpack
from coordinator.workers import work_together

LONG = "count the words of this " * 40


async def collect(system: System, prompt: str, max_tokens: int, **options: Any) -> list[str]:
    """Events of a streamed completion, without their frame."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, **options}
    async with system.http.post("/v1/completions", json=body) as response:
        assert response.status == 200
        lines = (await response.text()).split("\n")
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def text_of(events: list[str]) -> str:
    assert events[-1] == "[DONE]", events[-1]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def right(system: System, prompt: str, count: int) -> str:
    ids = system.encode(prompt)
    return system.decode([token_at(ids, index) for index in range(count)])


async def pair(system: System) -> tuple[FakeWorker, FakeWorker]:
    return await system.worker("decode-a"), await system.worker("decode-b")


def busy(workers: tuple[FakeWorker, FakeWorker]) -> tuple[FakeWorker, FakeWorker]:
    """The one that has the request first."""
    return workers if workers[0].assignments else workers[::-1]


@pytest.mark.parametrize("seed", [None, 77])
def test_a_dead_decode_workers_stream_goes_on_elsewhere_without_a_lost_or_doubled_token(run, seed: int | None) -> None:
    async def main() -> None:
        async with running() as system:
            workers = await pair(system)
            for worker in workers:
                worker.pause_at = 7
            call = asyncio.create_task(collect(system, "hello", 20, seed=seed, temperature=1.0))
            await until(lambda: sum(len(request.choices[0].stream.tokens) for request in _requests(system)) == 7)
            dying, other = busy(workers)
            other.pause_at = None
            await dying.stop()
            assert text_of(await call) == right(system, "hello", 20)
            first, second = dying.assignments[0], other.assignments[0]
            assert (first.id.attempt, second.id.attempt) == (1, 2)
            assert first.id.request_id == second.id.request_id
            prompt = system.encode("hello")
            assert unpack(second.token_ids) == prompt + [token_at(prompt, index) for index in range(7)]
            assert second.num_prompt_tokens == len(prompt)
            assert second.sampling == first.sampling
            assert system.metric("baton_attempts_failed_total", cause="worker_lost") == 1
            assert system.metric("baton_completion_tokens_total") == 20

    run(main())


def _requests(system: System) -> list[Any]:
    return list(system.coordinator.dispatcher.requests.values())


def test_a_silent_worker_is_lost_in_the_stated_time_and_its_stream_goes_on_elsewhere(run) -> None:
    async def main() -> None:
        async with running(heartbeat_timeout_s=0.5) as system:
            workers = await pair(system)
            for worker in workers:
                worker.pause_at = 3
            call = asyncio.create_task(collect(system, "hello", 9))
            await asyncio.wait(
                [asyncio.create_task(worker.wait_for(lambda w=worker: bool(w.assignments))) for worker in workers],
                return_when=asyncio.FIRST_COMPLETED,
            )
            hanging, other = busy(workers)
            other.pause_at = None
            hanging.send_heartbeats = False
            started = asyncio.get_running_loop().time()
            assert text_of(await call) == right(system, "hello", 9)
            assert 0.2 < asyncio.get_running_loop().time() - started < 2
            assert hanging.id not in system.coordinator.registry.workers
            await asyncio.wait_for(hanging.closed.wait(), 2)

    run(main())


def test_a_silent_worker_is_lost_when_the_stated_time_is_over_and_no_interval_later(run) -> None:
    async def main() -> None:
        async with running(heartbeat_interval_s=0.4, heartbeat_timeout_s=0.8) as system:
            worker = await system.worker()
            worker.send_heartbeats = False
            async with worker.heard:
                await worker.heard.wait()  # the coordinator has just looked: its next looks are 0.4, 0.8, 1.2 s away
            await asyncio.sleep(0.05)
            await worker.beat()
            started = time.monotonic()
            await asyncio.wait_for(worker.closed.wait(), 5)
            assert 0.7 < time.monotonic() - started < 1.1

    run(main())


def test_a_coordinator_that_stood_still_does_not_hold_that_time_against_its_workers(run) -> None:
    async def main() -> None:
        async with running(heartbeat_timeout_s=0.3) as system:
            await system.worker()
            time.sleep(1.0)  # noqa: ASYNC251 - as if the process had been stopped
            await asyncio.sleep(0.25)
            assert "decode-0" in system.coordinator.registry.workers

    run(main())


def test_a_worker_that_comes_back_is_a_new_one_and_the_old_ones_streams_go_on(run) -> None:
    async def main() -> None:
        async with running() as system:
            old = await system.worker("decode-0")
            old.pause_at = 3
            call = asyncio.create_task(collect(system, "hello", 9))
            await old.wait_for(lambda: bool(old.assignments))
            new = await system.worker("decode-0")
            assert text_of(await call) == right(system, "hello", 9)
            assert new.assignments[0].id.attempt == 2
            await asyncio.wait_for(old.closed.wait(), 2)
            assert system.coordinator.registry.workers["decode-0"].registration == new.registration

    run(main())


@pytest.mark.parametrize(
    ("knob", "cause"),
    [
        ({"fail_at": 4}, "ended"),
        ({"refuse": "no room"}, "refused"),
        ({"skip_at": 4}, "gap"),
        ({"skip_at": 3, "end_early_at": 4}, "ended"),
    ],
)
def test_whatever_is_wrong_with_one_worker_another_finishes_the_stream(run, knob: dict[str, Any], cause: str) -> None:
    async def main() -> None:
        async with running() as system:
            workers = await pair(system)
            for worker in workers:
                vars(worker).update(knob, heals=True)
            assert text_of(await collect(system, "hello", 9)) == right(system, "hello", 9)
            assert system.metric("baton_attempts_failed_total", cause=cause) == 1
            assert sorted(worker.assignments[0].id.attempt for worker in workers) == [1, 2]

    run(main())


def test_a_worker_that_refuses_because_it_drains_is_asked_once(run) -> None:
    async def main() -> None:
        async with running() as system:
            workers = await pair(system)
            vars(workers[0]).update(refuse="draining", refuses_as_draining=True, send_heartbeats=False)
            for _ in range(4):
                assert text_of(await collect(system, "hello", 5)) == right(system, "hello", 5)
            assert len(workers[0].assignments) == 1

    run(main())


def test_a_worker_that_repeats_everything_changes_nothing(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker()
            worker.repeat, worker.resend_all = 3, True
            assert text_of(await collect(system, "hello", 9)) == right(system, "hello", 9)
            assert system.metric("baton_attempts_total", kind="again") == 0

    run(main())


def test_prefill_and_decode_that_disagree_about_a_token_start_a_new_attempt(run) -> None:
    async def main() -> None:
        async with running() as system:
            prefill = await system.worker("prefill-0", PREFILL)
            first, second = await pair(system)
            for worker in (first, second):
                worker.pause_at = 0
            call = asyncio.create_task(collect(system, LONG, 6))
            await until(lambda: any(request.choices[0].stream.tokens for request in _requests(system)))
            liar, honest = busy((first, second))
            liar.lie_at, honest.pause_at = 0, None
            liar.go.set()
            assert text_of(await call) == right(system, LONG, 6)
            assert system.metric("baton_attempts_failed_total", cause="diverged") == 1
            await liar.wait_for(lambda: bool(liar.aborts))
            assert honest.assignments[0].id.attempt == 2
            assert len(prefill.assignments) == 2

    run(main())


def test_the_loss_of_the_prefill_worker_alone_is_left_to_decode(run) -> None:
    async def main() -> None:
        async with running() as system:
            prefill, decode = await system.worker("prefill-0", PREFILL), await system.worker()
            prefill.pause_at = decode.pause_at = 0
            call = asyncio.create_task(collect(system, LONG, 6))
            await prefill.wait_for(lambda: bool(prefill.assignments))
            await decode.wait_for(lambda: bool(decode.assignments))
            await prefill.stop()
            await until(lambda: "prefill-0" not in system.coordinator.registry.workers)
            decode.go.set()
            assert text_of(await call) == right(system, LONG, 6)
            assert len(decode.assignments) == 1
            events = await collect(system, LONG, 3)
            assert text_of(events) == right(system, LONG, 3)
            assert not decode.assignments[1].HasField("prefill")

    run(main())


def test_another_model_never_continues_a_stream(run) -> None:
    async def main() -> None:
        async with running() as system:
            old = await system.worker()
            old.pause_at = 2
            call = asyncio.create_task(collect(system, "hello", 9))
            await until(lambda: any(len(request.choices[0].stream.tokens) == 2 for request in _requests(system)))
            new = await system.worker(model_fingerprint="other weights")
            assert json.loads((await call)[-1])["error"]["code"] == "unavailable"
            assert text_of(await collect(system, "hello", 3)) == right(system, "hello", 3)
            assert [assignment.id.attempt for assignment in new.assignments] == [1]

    run(main())


def test_workers_of_another_dtype_join_only_where_those_that_decode_convert(run) -> None:
    async def main() -> None:
        async with running() as system:
            taker = {"weights_fingerprint": "w", "converts_kv_dtype": True}
            await system.worker("decode-a", **taker)
            other = {"model_fingerprint": "g", "weights_fingerprint": "w"}
            for misfit in (
                {**other, "roles": [PREFILL], "weights_fingerprint": "v"},
                {**other, "roles": [PREFILL], "weights_fingerprint": ""},  # a deterministic one
                other,  # it decodes, and does not convert
            ):
                with pytest.raises(Refused, match="decode workers with --convert-kv-dtype convert"):
                    await FakeWorker(system.ports.link, "misfit", **misfit).start()
            await system.worker("prefill-a", PREFILL, **other)
            await system.worker("decode-b", converts_kv_dtype=True, **other)
            assert sorted(system.coordinator.registry.workers) == ["decode-a", "decode-b", "prefill-a"]
            with pytest.raises(Refused, match="model_fingerprint is f"):
                await FakeWorker(system.ports.link, "decode-c", weights_fingerprint="w").start()
            unnamed = FakeWorker(0, converts_kv_dtype=True).registration
            assert not work_together(unnamed, FakeWorker(0, "p", [PREFILL], model_fingerprint="g").registration)

    run(main())


def test_a_worker_of_another_dtype_continues_a_stream_where_that_is_allowed(run) -> None:
    async def main() -> None:
        async with running() as system:
            taker = {"weights_fingerprint": "w", "converts_kv_dtype": True}
            old = await system.worker("decode-a", **taker)
            old.pause_at = 2
            call = asyncio.create_task(collect(system, "hello", 9))
            await until(lambda: any(len(request.choices[0].stream.tokens) == 2 for request in _requests(system)))
            new = await system.worker("decode-b", model_fingerprint="g", **taker)
            await old.stop()
            assert text_of(await call) == right(system, "hello", 9)
            assert [assignment.id.attempt for assignment in new.assignments] == [2]

    run(main())


def test_a_stream_whose_only_worker_died_goes_on_when_one_is_back(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker()
            worker.pause_at = 2
            call = asyncio.create_task(collect(system, "hello", 9))
            await until(lambda: any(len(request.choices[0].stream.tokens) == 2 for request in _requests(system)))
            await worker.stop()
            await until(lambda: not system.coordinator.registry.workers)
            async with system.http.post("/v1/completions", json={"prompt": "x"}) as response:
                assert response.status == 503, "what is new is told at once"
            await system.worker()
            assert text_of(await call) == right(system, "hello", 9)
            assert system.metric("baton_waits_for_worker_total") == 1

    run(main())


def test_a_stream_that_waits_to_begin_outlives_the_last_worker(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker()
            await worker.reservation.reserve(worker, 7)  # another coordinator has it to itself
            await until(lambda: bool(system.coordinator.dispatcher.quarantine.closed))
            call = asyncio.create_task(collect(system, "hello", 9))
            await until(lambda: system.metric("baton_quarantine_total", event="stranded_others") == 1)
            await worker.stop()
            await until(lambda: system.metric("baton_waits_for_worker_total") == 1)
            await system.worker()
            assert text_of(await call) == right(system, "hello", 9)

    run(main())


def test_when_no_decode_worker_comes_back_the_client_is_told_in_the_stream(run) -> None:
    async def main() -> None:
        async with running(worker_return_s=0.2) as system:
            worker = await system.worker()
            worker.pause_at = 2
            call = asyncio.create_task(collect(system, "hello", 9))
            await until(lambda: any(len(request.choices[0].stream.tokens) == 2 for request in _requests(system)))
            await worker.stop()
            events = await call
            error = json.loads(events[-1])["error"]
            assert error["code"] == "unavailable"
            assert "decode" in error["message"]
            assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == right(
                system, "hello", 2
            )
            async with system.http.post("/v1/completions", json={"prompt": "x"}) as response:
                assert response.status == 503

    run(main())


def test_tries_are_bounded_and_then_the_client_gets_503_and_never_a_short_answer(run) -> None:
    async def main() -> None:
        async with running(max_attempts=3) as system:
            workers = await pair(system)
            for worker in workers:
                worker.fail_at = 2
            async with system.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 5}) as response:
                assert response.status == 503
                assert "3 attempts" in (await response.json())["error"]["message"]
            assert sum(len(worker.assignments) for worker in workers) == 3
            assert {worker.assignments[0].id.attempt for worker in workers} <= {1, 2, 3}
            assert system.coordinator.dispatcher.num_streams == 0

    run(main())


def test_requests_are_spread_over_workers_and_a_draining_one_gets_none(run) -> None:
    async def main() -> None:
        async with running() as system:
            workers = await pair(system)
            for worker in workers:
                worker.pause_at = 0
            calls = [asyncio.create_task(collect(system, "hello", 2)) for _ in range(6)]
            await until(lambda: sum(len(worker.assignments) for worker in workers) == 6)
            assert [len(worker.assignments) for worker in workers] == [3, 3]
            workers[0].heartbeat.draining = True
            await workers[0].beat()
            await until(lambda: not system.coordinator.registry.workers["decode-a"].accepts)
            calls += [asyncio.create_task(collect(system, "hello", 2)) for _ in range(4)]
            await workers[1].wait_for(lambda: len(workers[1].assignments) == 7)
            for worker in workers:
                worker.go.set()
            for call in calls:
                assert text_of(await call) == right(system, "hello", 2)
            assert len(workers[0].assignments) == 3

    run(main())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"protocol_version": 99}, "protocol_version"),
        ({"model": "other"}, "model is 'other'"),
        ({"model_fingerprint": "g"}, "model_fingerprint"),
        ({"page_size_tokens": 0}, "page_size_tokens"),
        ({"total_blocks": 0}, "total_blocks"),
        ({"roles": []}, "roles"),
        ({"roles": [7]}, "roles"),
        ({"incarnation": 0}, "incarnation"),
        ({"handover_address": ""}, "handover_address"),
    ],
)
def test_a_worker_that_does_not_fit_is_refused_with_the_reason(run, changes: dict[str, Any], says: str) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker()
            with pytest.raises(Refused, match=says):
                await FakeWorker(system.ports.link, "other", **{"roles": [PREFILL], **changes}).start()
            assert list(system.coordinator.registry.workers) == ["decode-0"]

    run(main())


def test_a_worker_that_breaks_the_protocol_is_lost_and_the_stream_goes_on(run) -> None:
    async def main() -> None:
        async with running() as system:
            workers = await pair(system)
            for worker in workers:
                worker.pause_at = 2
            call = asyncio.create_task(collect(system, "hello", 5))
            await until(lambda: any(worker.assignments for worker in workers))
            bad, good = busy(workers)
            good.pause_at = None
            await bad.send(registration=bad.registration)
            assert text_of(await call) == right(system, "hello", 5)
            assert bad.id not in system.coordinator.registry.workers

    run(main())


@pytest.mark.parametrize("silent", ["one of two", "all", "all, because this process stood still"])
def test_nobody_is_suspected_of_what_a_coordinator_that_is_cut_off_or_hangs_did_itself(run, silent: str) -> None:
    async def main() -> None:
        async with running(heartbeat_interval_s=0.2, heartbeat_timeout_s=1.0) as system:
            workers = [await system.worker(f"decode-{number}") for number in range(2)]
            for worker in workers:
                worker.pause_at = 2
            calls = [asyncio.create_task(collect(system, "hello", 5)) for _ in range(4)]
            await until(lambda: all(len(worker.assignments) == 2 for worker in workers))
            stood_still = "stood still" in silent
            if stood_still:
                time.sleep(1.6)  # noqa: ASYNC251 - the whole process
            for worker in workers if silent.startswith("all") else workers[:1]:
                if stood_still:
                    await worker.stop()
                worker.send_heartbeats = False
                worker.takes_up.clear()  # what the other one had: an answer would be a sign of life
            left = 1 if silent == "one of two" else 0
            await until(lambda: len(system.coordinator.registry.workers) == left)
            last = await system.worker("decode-2")
            for worker in workers:
                worker.go.set()
            expected = text_of(await collect(system, "hello", 5))
            assert [text_of(await call) for call in calls] == [expected] * 4
            assert left or last.assignments
            assert (system.metric("baton_suspects_total") > 0) == (silent == "one of two")

    run(main())
