"""Clients come back, to their coordinator or to another one: each token once, the same text, ends and usage."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import grpc
import pytest
from coordinator_harness import PREFILL, System, running, until
from fake_worker import FakeWorker, token_at

import baton.client as client_module
from baton.client import AsyncClient, ClientError
from baton.token_ids import pack, unpack
from baton.v1 import inference_pb2 as api
from baton.v1 import worker_link_pb2 as wire
from coordinator.turns import EACH

ID = "a-request-of-this-test"
BODY = {"model": "demo", "prompt": "hello", "max_tokens": 9, "stream": True, "stream_options": {"include_usage": True}}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {}),
    "two choices": ("/v1/completions", {"n": 2}),
    "two prompts": ("/v1/completions", {"prompt": ["hello", "good bye"], "seed": 5}),
    "stop string": ("/v1/completions", {"max_tokens": 50, "stop": ["fourth word", "nowhere"]}),
    "logprobs": ("/v1/completions", {"logprobs": 2}),
    "chat": ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 1}),
}


@dataclass
class Event:
    id: str
    data: str


@dataclass
class State:
    """What a client has, however it was cut into events."""

    text: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    ends: list[tuple[int, str]] = field(default_factory=list)
    roles: list[tuple[int, str]] = field(default_factory=list)
    usages: list[Any] = field(default_factory=list)
    done: int = 0


def body_of(form: str) -> tuple[str, dict[str, Any]]:
    path, more = FORMS[form]
    body: dict[str, Any] = {**BODY, **more}
    if path.endswith("chat/completions"):
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    return path, body


def state_of(events: list[Event]) -> State:
    state = State()
    for event in events:
        if event.data == "[DONE]":
            state.done += 1
            continue
        data = json.loads(event.data)
        assert "error" not in data, data
        if data.get("usage"):
            state.usages.append(data["usage"])
        for choice in data["choices"]:
            number, delta = choice["index"], choice.get("delta", {})
            text = choice["text"] if "text" in choice else delta.get("content") or ""
            state.text[number] = state.text.get(number, "") + text
            if choice["logprobs"]:
                state.logprobs.setdefault(number, []).append(choice["logprobs"])
            if choice["finish_reason"]:
                state.ends.append((number, choice["finish_reason"]))
            if "role" in delta:
                state.roles.append((number, delta["role"]))
    state.ends.sort()
    state.roles.sort()
    for number, pieces in state.logprobs.items():
        names = pieces[0].keys() - {"refusal"}
        state.logprobs[number] = [(name, [x for piece in pieces for x in piece[name]]) for name in sorted(names)]
    return state


def points_of(events: list[Event]) -> dict[tuple[int, str], str]:
    """What had been said so far into each choice, wherever the others were: workers owe them no order."""
    ids = [event.id.removeprefix(f"{ID}:") for event in events if event.id]
    points = {(number, *point.partition("-")) for id in ids for number, point in enumerate(id.split("."))}
    return {(number, had): check for number, had, _, check in points}


def parse(text: str) -> list[Event]:
    events = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line != ":")
        events.append(Event(fields.get("id", ""), fields["data"]))
    return events


async def post(system: System, path: str, body: dict[str, Any], **headers: str) -> list[Event]:
    async with system.http.post(path, json=body, headers={"X-Request-Id": ID, **headers}) as response:
        assert response.status == 200, await response.text()
        return parse(await response.text())


async def go_on(system: System, last_event_id: str = "", query: bool = False) -> list[Event]:
    headers = {} if query or not last_event_id else {"Last-Event-ID": last_event_id}
    params = {"last_event_id": last_event_id} if query else {}
    async with system.http.get(f"/v1/streams/{ID}", headers=headers, params=params) as response:
        assert response.status == 200, await response.text()
        return parse(await response.text())


@contextlib.asynccontextmanager
async def two_coordinators(**options: object) -> AsyncIterator[tuple[System, FakeWorker, System, FakeWorker]]:
    """One that will be lost, and another with a worker that goes on."""
    async with running() as old, running(heartbeat_timeout_s=0.8, **options) as new:
        yield old, await old.worker(), new, await new.worker()


def speak(system: System, *workers: FakeWorker) -> None:
    for worker in workers:
        worker.token_at = system.says("one two three fourth word and so on and on and on")


@pytest.mark.parametrize("form", FORMS)
def test_another_coordinator_goes_on_after_any_event(run, form: str) -> None:
    async def main() -> None:
        async with two_coordinators() as (old, first, new, second):
            path, body = body_of(form)
            if form == "stop string":
                speak(old, first, second)
            events = await post(old, path, body)
            whole = state_of(events)
            assert whole.done == 1
            assert len(whole.usages) == 1
            assert len({number for number, _ in whole.ends}) == len(whole.text)
            assignments = list(first.assignments)
            for at in range(len(events)):
                for assignment in assignments:
                    await second.report(assignment, num_tokens=4)
                resumed = await go_on(new, events[at - 1].id if at else "")
                assert state_of([*events[:at], *resumed]) == whole, f"after event {at} of {len(events)}"
            assert all(event.id.startswith(f"{ID}:") for event in events[:-1])

    run(main())


def test_a_choice_that_nobody_has_any_more_is_generated_again(run) -> None:
    async def main() -> None:
        async with two_coordinators() as (old, first, new, second):
            path, body = body_of("two prompts")
            events = await post(old, path, body)
            lost, kept = first.assignments
            await second.report(kept, num_tokens=4)
            resumed = await go_on(new, events[5].id)
            got, right = state_of([*events[:6], *resumed]), state_of(events)
            # What the first attempt found in a cache went with its worker, and with its coordinator.
            right.usages[0]["prompt_tokens_details"]["cached_tokens"] = 3
            assert got == right
            (again,) = second.assignments
            assert again.token_ids == lost.token_ids
            assert again.sampling == lost.sampling
            assert again.id.request_id == lost.id.request_id
            assert again.id.attempt > 1
            assert again.deadline_s < 15.1, "the deadline is that of the request"

    run(main())


def otherwise(first_differing: int) -> Callable[[Sequence[int], int], int]:
    """Tokens of a worker that comes to other ones from some index on."""
    return lambda prompt, index: token_at(prompt, index) + (index >= first_differing)


@pytest.mark.parametrize(("differs_at", "max_tokens", "had"), [(0, 9, 1), (3, 9, 4), (3, 9, 7)])
def test_a_choice_that_comes_out_otherwise_than_what_the_client_has_ends_with_an_error(
    run, differs_at: int, max_tokens: int, had: int
) -> None:
    async def main() -> None:
        async with two_coordinators() as (old, first, new, second):
            path, body = body_of("two prompts")
            events = await post(old, path, {**body, "max_tokens": max_tokens})
            of_both = max(at for at, event in enumerate(events) if f":{had}-" in event.id or f".{had}-" in event.id)
            second.token_at = otherwise(differs_at)
            await second.report(first.assignments[1], num_tokens=4)
            headers = {"Last-Event-ID": events[of_both].id}
            async with new.http.get(f"/v1/streams/{ID}", headers=headers) as response:
                told = (await response.text()).strip()
                error = json.loads(told if response.status == 409 else parse(told)[-1].data)["error"]
            assert error["code"] == "computed_otherwise"
            assert "[DONE]" not in told
            assert new.metric("baton_requests_resumed_total", how="differs") == 1
            assert new.coordinator.dispatcher.requests == {}

    run(main())


@pytest.mark.parametrize("max_tokens", [5, 9])
def test_an_end_that_the_client_knows_is_compared_too(run, max_tokens: int) -> None:
    """It has a whole choice of 7 tokens; computed again, the choice is shorter or longer."""

    async def main() -> None:
        async with two_coordinators() as (old, first, new, second):
            stop = old.coordinator.intake.tokenizer.facts.eos_token_ids[0]
            first.token_at = lambda prompt, index: stop if index == 6 else token_at(prompt, index)
            second.token_at = lambda prompt, index: stop if index == max_tokens - 1 else token_at(prompt, index)
            events = await post(old, "/v1/completions", {**BODY, "prompt": ["hello", "good bye"], "max_tokens": 20})
            known = next(at for at, event in enumerate(events) if ":7e-" in event.id)
            await second.report(first.assignments[1], num_tokens=4)
            headers = {"Last-Event-ID": events[known].id}
            async with new.http.get(f"/v1/streams/{ID}", headers=headers) as response:
                assert "computed_otherwise" in await response.text()

    run(main())


def test_over_grpc_a_choice_that_comes_out_otherwise_is_data_loss(run) -> None:
    async def main() -> None:
        async with two_coordinators() as (old, first, new, second):
            sampling = api.Sampling(max_tokens=8)
            request = api.GenerateRequest(text="hello", sampling=sampling, n=2, request_id=ID)
            whole = [response async for response in old.inference.Generate(request)]
            second.token_at = otherwise(0)
            await second.report(first.assignments[1])
            digest = next(each.digest for each in whole if each.choice == 0 and len(each.token_ids) == 1)
            for position, code in (
                (api.ChoicePosition(num_tokens=1), grpc.StatusCode.INVALID_ARGUMENT),
                (api.ChoicePosition(num_tokens=1, digest=digest), grpc.StatusCode.DATA_LOSS),
            ):
                call = new.inference.Resume(api.ResumeRequest(request_id=ID, positions=[position]))
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    [response async for response in call]
                assert raised.value.code() is code

    run(main())


def test_a_stream_goes_on_while_it_is_generated_and_when_the_adopted_attempt_is_lost_too(run) -> None:
    async def main() -> None:
        async with two_coordinators() as (old, first, new, second):
            path, body = body_of("completion")
            events = await post(old, path, body)
            (assignment,) = first.assignments
            second.pause_at = 6
            call = asyncio.create_task(go_on(new, events[2].id))
            await asyncio.sleep(0.05)  # the client is there before the worker
            await second.report(assignment, num_tokens=3)
            await second.wait_for(lambda: bool(second.adopted))
            third = await new.worker("decode-1")
            await second.stop()
            assert state_of([*events[:3], *await call]) == state_of(events)
            assert third.assignments[0].id.attempt > 1

    run(main())


def test_of_many_that_come_back_at_once_a_turn_of_the_event_loop_adopts_few(run) -> None:
    async def main() -> None:
        async with two_coordinators() as (old, first, new, second):
            ids = [f"one-of-many-requests-{number}" for number in range(3 * EACH)]
            for id in ids:
                await post(old, "/v1/completions", BODY | {"max_tokens": 1}, **{"X-Request-Id": id})
            resumption, dispatcher = new.coordinator.resumption, new.coordinator.dispatcher
            clients = [asyncio.create_task(resumption.resume(id)) for id in ids]
            await until(lambda: len(resumption._waiters) == len(ids))
            for assignment in first.assignments:  # in one message, as it were
                second.orphans[assignment.id.request_id, assignment.id.attempt] = assignment
                orphan = wire.Orphan(assignment=assignment, remaining_s=15.0, kept_s=5.0)
                dispatcher.on_message(new.coordinator.registry.workers["decode-0"], wire.WorkerMessage(orphan=orphan))
            adopted = [0]
            while len(second.adopted) < len(ids):
                await asyncio.sleep(0)
                adopted.append(int(new.coordinator.metrics.resumed.labels("adopted")._value.get()))
            assert max(later - earlier for earlier, later in pairwise(adopted)) <= EACH
            assert {request.id for request in await asyncio.gather(*clients)} == set(ids)
            assert resumption._waiters == {}
            await until(lambda: all(request.ended for request in dispatcher.requests.values()))

    run(main())


def test_a_worker_that_does_not_keep_it_any_more_costs_an_attempt(run) -> None:
    async def main() -> None:
        async with two_coordinators() as (old, first, new, second):
            path, body = body_of("completion")
            events = await post(old, path, body)
            third = await new.worker("decode-1")
            await second.report(first.assignments[0])
            second.orphans.clear()
            resumed = await go_on(new, events[4].id)
            assert state_of([*events[:5], *resumed]) == state_of(events)
            assert third.assignments[0].id.attempt > 1

    run(main())


def test_of_two_reports_the_newer_attempt_counts_and_the_other_is_aborted(run) -> None:
    async def main() -> None:
        async with two_coordinators() as (old, first, new, second):
            path, body = body_of("completion")
            events = await post(old, path, body)
            third = await new.worker("decode-1")
            newer = wire.Assignment()
            newer.CopyFrom(first.assignments[0])
            newer.id.attempt = 2
            await second.report(first.assignments[0], num_tokens=8)
            await third.report(newer, num_tokens=2)
            await second.wait_for(lambda: bool(second.aborts))
            assert second.aborts[0].attempt == 1
            resumed = await go_on(new, events[4].id)
            assert state_of([*events[:5], *resumed]).text == state_of(events).text
            assert (len(second.adopted), len(third.adopted)) == (0, 1)
            await second.report(first.assignments[0])  # nothing waits any more: as if nobody had come
            second.pause_at = third.pause_at = 3
            call = asyncio.create_task(post(new, path, body, **{"X-Request-Id": "another-request-of-this"}))
            await until(lambda: bool(second.assignments or third.assignments))
            other, has = sorted((second, third), key=lambda worker: len(worker.assignments))
            await other.report(has.assignments[0])  # of a request that is here
            await until(lambda: new.metric("baton_orphans_total", event="late") == 1)
            for worker in (second, third):
                worker.go.set()
            await call

    run(main())


def test_logprobs_that_went_with_the_coordinator_are_computed_again(run) -> None:
    async def main() -> None:
        async with two_coordinators() as (old, first, new, second):
            path, body = body_of("logprobs")
            events = await post(old, path, body)
            later = wire.Assignment()
            later.CopyFrom(first.assignments[0])
            later.id.attempt = 2
            prompt = unpack(later.token_ids)
            later.token_ids += pack([token_at(prompt, index) for index in range(3)])
            for at, adopts in ((1, 0), (2, 0), (3, 1)):  # after it, the client has what the worker lacks
                await second.report(later, num_tokens=5, without_logprobs=3)
                resumed = await go_on(new, events[at - 1].id)
                assert state_of([*events[:at], *resumed]).logprobs == state_of(events).logprobs
                assert len(second.adopted) == adopts
            assert [each.id.attempt > 2 for each in second.assignments] == [True, True]
            await second.wait_for(lambda: len(second.aborts) == 2)

    run(main())


def test_an_answer_that_is_not_streamed_is_had_by_its_id(run) -> None:
    async def main() -> None:
        async with two_coordinators() as (old, first, new, second):
            body = {"model": "demo", "prompt": "hello", "max_tokens": 9, "n": 2, "logprobs": 1}
            async with old.http.post("/v1/completions", json=body, headers={"X-Request-Id": ID}) as response:
                answer = await response.json()
            assert answer["id"] == ID
            for assignment in first.assignments:
                await second.report(assignment)
            async with new.http.get(f"/v1/requests/{ID}") as response:
                assert await response.json() == answer

    run(main())


def test_a_damaged_report_is_refused_and_harms_nobody(run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with two_coordinators() as (old, first, new, second):
            path, body = body_of("completion")
            await post(old, path, body)
            good = first.assignments[0]
            spoilt: list[wire.Assignment] = []
            for field_name, value in (
                ("ticket", b""), ("ticket", good.ticket[:-1]), ("num_prompt_tokens", 0), ("num_prompt_tokens", 999),
            ):  # fmt: skip
                bad = wire.Assignment()
                bad.CopyFrom(good)
                setattr(bad, field_name, value)
                spoilt.append(bad)
            other = wire.Assignment()
            other.CopyFrom(good)
            other.id.request_id = "b" * 20 + "-0"
            outside = wire.Assignment()
            outside.CopyFrom(good)
            outside.token_ids += pack([10**6])
            for bad in (*spoilt, other, outside):
                await second.report(bad)
            await second.wait_for(lambda: len(second.aborts) == 6)
            assert new.metric("baton_orphans_total", event="rejected") == 6
            assert "hello" not in caplog.text
            async with new.http.get(f"/v1/streams/{ID}") as response:
                assert response.status == 404
            assert "decode-0" in new.coordinator.registry.workers

    run(main())


def test_unknown_ids_and_unreadable_ones_are_answered_with_what_to_change(run) -> None:
    async def main() -> None:
        async with running(heartbeat_timeout_s=0.25, heartbeat_interval_s=0.1) as system:
            await system.worker()
            system.coordinator.resumption._wait_s = 0.1
            for path, headers, status, says in (
                (f"/v1/streams/{ID}", {}, 404, "no request with this id"),
                (f"/v1/requests/{ID}", {}, 404, "no request with this id"),
                (f"/v1/streams/{ID}", {"Last-Event-ID": "other:1"}, 400, "last event id"),
                (f"/v1/streams/{ID}", {"Last-Event-ID": f"{ID}:1.x"}, 400, "last event id"),
                (f"/v1/streams/{ID}", {"Last-Event-ID": f"{ID}:17"}, 400, "last event id"),
                (f"/v1/streams/{ID}", {"Last-Event-ID": f"{ID}:0-00000000"}, 400, "last event id"),
            ):
                async with system.http.get(path, headers=headers) as response:
                    assert response.status == status
                    assert says in (await response.json())["error"]["message"]
            for headers, says in (
                ({"X-Request-Id": "short"}, "16 to 64"),
                ({"X-Request-Id": "x" * 65}, "16 to 64"),
                ({"X-Request-Id": "no spaces are possible"}, "16 to 64"),
                ({"X-Baton-Resume-S": "soon"}, "seconds"),
                ({"X-Baton-Resume-S": "-1"}, "seconds"),
                ({"X-Baton-Resume-S": "inf"}, "seconds"),
            ):
                async with system.http.post("/v1/completions", json=BODY, headers=headers) as response:
                    assert response.status == 400
                    assert says in (await response.json())["error"]["message"]

    run(main())


async def start(system: System, worker: FakeWorker, events: int, **headers: str) -> tuple[Any, list[Event]]:
    """A stream that stands still after so many events; the response, for its client to drop."""
    worker.pause_at = events
    sent = {"X-Request-Id": ID, **headers}
    response = await system.http.post("/v1/completions", json=BODY, headers=sent)
    assert response.status == 200
    had: list[Event] = []
    while sum(len(json.loads(event.data)["choices"][0]["text"]) > 0 for event in had) < 1 or not had[-1].id.startswith(
        f"{ID}:{events}-"
    ):
        had += parse((await response.content.readuntil(b"\n\n")).decode())
    return response, had


def test_a_client_that_asked_for_it_may_hang_up_and_come_back(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker()
            response, had = await start(system, worker, 4, **{"X-Baton-Resume-S": "5"})
            response.close()
            await until(lambda: bool(system.coordinator.resumption._left))
            worker.go.set()
            for _ in range(2):  # it may come back when all is over, and again
                resumed = await go_on(system, had[-1].id, query=True)
                state = state_of([*had, *resumed])
                prompt = system.encode("hello")
                assert state.text[0] == system.decode([token_at(prompt, index) for index in range(9)])
                assert state.usages[0]["completion_tokens"] == 9
            assert worker.aborts == []
            assert state_of(await go_on(system, f"{ID}:end")) == State(done=1)
            async with system.http.post("/v1/completions", json=BODY, headers={"X-Request-Id": ID}) as response:
                assert response.status == 409
            async with system.http.delete(f"/v1/requests/{ID}") as response:
                assert response.status == 200
            assert system.coordinator.resumption._left == {}

    run(main())


def test_a_client_that_stays_away_is_given_up(run) -> None:
    async def main() -> None:
        async with running(max_resume_s=0.1) as system:
            worker = await system.worker()
            response, _ = await start(system, worker, 4, **{"X-Baton-Resume-S": "1000"})
            response.close()
            await worker.wait_for(lambda: bool(worker.aborts), 2)
            assert system.metric("baton_requests_resumed_total", how="given_up") == 1
            assert system.coordinator.dispatcher.requests == {}

    run(main())


def test_whoever_comes_last_has_the_stream(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker()
            response, had = await start(system, worker, 4)
            call = asyncio.create_task(go_on(system, had[-1].id))
            rest = (await response.content.read()).decode()
            assert json.loads(parse(rest)[-1].data)["error"]["code"] == "resumed_elsewhere"
            worker.go.set()
            assert state_of([*had, *await call]).done == 1
            assert worker.aborts == []

    run(main())


def test_the_decode_worker_learns_what_the_prefill_worker_found_in_its_cache(run) -> None:
    async def main() -> None:
        async with running() as system:
            prefill, decode = await system.worker("prefill-0", PREFILL), await system.worker()
            decode.pause_at = 1
            body = {**BODY, "prompt": "count the words of this " * 40}
            call = asyncio.create_task(post(system, "/v1/completions", body))
            await decode.wait_for(lambda: decode.cached_tokens == [3])
            decode.go.set()
            assert state_of(await call).usages[0]["prompt_tokens_details"]["cached_tokens"] == 3
            assert not prefill.assignments[0].ticket, "a prefill needs no coordinator"
            assert decode.assignments[0].ticket

    run(main())


def test_grpc_resumes_by_offset(run) -> None:
    async def main() -> None:
        async with two_coordinators() as (old, first, new, second):
            speak(old, first, second)
            request = api.GenerateRequest(
                text="hello", sampling=api.Sampling(max_tokens=30), n=2, request_id=ID, stop=["fourth word"]
            )
            whole = [response async for response in old.inference.Generate(request)]

            def state(responses: list[api.GenerateResponse]) -> dict[int, tuple[list[int], str, int]]:
                found = {}
                for number in range(2):
                    own = [each for each in responses if each.choice == number]
                    tokens = [token for each in own for token in each.token_ids]
                    found[number] = (tokens, "".join(each.text for each in own), own[-1].finish_reason if own else 0)
                return found

            for at in range(len(whole) + 1):
                had = whole[:at]
                positions = [api.ChoicePosition(), api.ChoicePosition()]
                for each in had:
                    positions[each.choice].num_tokens = each.first_index + len(each.token_ids)
                    positions[each.choice].ended = each.finish_reason != 0
                    positions[each.choice].digest = each.digest
                for assignment in first.assignments:
                    await second.report(assignment)
                resume = api.ResumeRequest(request_id=ID, positions=positions)
                rest = [response async for response in new.inference.Resume(resume)]
                assert state(had + rest) == state(whole)
                if rest:
                    assert rest[-1].usage == whole[-1].usage
                again = api.GenerateRequest()
                again.CopyFrom(request)
                again.positions.extend(positions)
                assert state(had + [each async for each in old.inference.Generate(again)]) == state(whole)
            new.coordinator.resumption._wait_s = 0.05
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await anext(aiter(new.inference.Resume(api.ResumeRequest(request_id="x" * 20))))
            assert raised.value.code() is grpc.StatusCode.NOT_FOUND

    run(main())


class Cut:
    """A TCP proxy that breaks each connection after so many bytes of answers, the last number for ever."""

    def __init__(self, port: int, *after: int) -> None:
        self._port, self._after = port, list(after)
        self.connections = 0

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = self._after[min(self.connections, len(self._after) - 1)]
        self.connections += 1
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port)

        async def upwards() -> None:
            while data := await reader.read(65536):
                up_writer.write(data)

        async def downwards() -> None:
            nonlocal left
            while left > 0 and (data := await up_reader.read(65536)):
                writer.write(data[:left])
                left -= len(data)
                await writer.drain()

        tasks = [asyncio.create_task(work) for work in (upwards(), downwards())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            writer.close()
            up_writer.transport.abort()


@pytest.mark.parametrize("form", ["completion", "chat"])
def test_our_own_client_goes_on_by_itself_wherever_the_connection_breaks(run, form: str) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker()
            body = body_of(form)[1]
            options = {name: body[name] for name in ("max_tokens",)}

            async def ask(url: str) -> list[tuple[str, str | None]]:
                async with AsyncClient(url) as client:
                    call = client.complete("hello", **options) if form == "completion" else client.chat(
                        body["messages"], **options
                    )  # fmt: skip
                    deltas = [delta async for delta in call]
                    return [("".join(delta.text for delta in deltas), deltas[-1].finish_reason)]

            whole = await ask(system.url)
            for first in (1, 150, 300, 420, 555, 690, 801, 999):
                cut = Cut(system.ports.http, first, first + 97, 10**6)
                async with cut as url:
                    assert await ask(url) == whole, f"cut after {first} bytes"
                    assert cut.connections >= 2

    run(main())


@pytest.mark.parametrize("same", [True, False])
def test_our_own_client_asks_again_for_what_nobody_knows_any_more(run, same: bool, monkeypatch) -> None:
    """As when its worker and its coordinator died at the same time."""
    monkeypatch.setattr(client_module, "_LOST_AFTER_S", 0.3)

    async def main() -> None:
        async with running(max_resume_s=0.0) as system:
            worker = await system.worker()
            system.coordinator.resumption._wait_s = 0.1
            async with AsyncClient(system.url) as client:
                whole = [delta.text async for delta in client.complete("hello", max_tokens=9)]
            worker.pause_at = 3
            texts = []

            async def read(client: AsyncClient) -> None:
                async for delta in client.complete("hello", max_tokens=9):
                    texts.append(delta.text)
                    worker.token_at = token_at if same else otherwise(0)
                    worker.go.set()

            async with Cut(system.ports.http, 900, 10**6) as url, AsyncClient(url) as client:
                if same:
                    await read(client)
                    assert "".join(texts) == "".join(whole)
                else:
                    with pytest.raises(ClientError, match="came out otherwise"):
                        await read(client)
                    assert "".join(whole).startswith("".join(texts))

    run(main())


@pytest.mark.parametrize("form", FORMS)
def test_a_client_that_has_some_of_it_may_ask_for_all_of_it_again(run, form: str) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker()
            path, body = body_of(form)
            if form == "stop string":
                speak(system, worker)
            events = await post(system, path, body)
            whole = state_of(events)
            for at in range(1, len(events)):
                again = await post(system, path, body, **{"Last-Event-ID": events[at - 1].id})
                got = state_of([*events[:at], *again])
                assert (got.text, got.ends, got.done) == (whole.text, whole.ends, whole.done)
                assert not {event.id for event in again} & {event.id for event in events[:at]}
                assert points_of(again) | points_of(events) == points_of(events) | points_of(again), "said otherwise"
            had = sum(not event.id.endswith((":end", ":0e")) and event.id != "" for event in events[:-1])
            assert system.metric("baton_requests_resumed_total", how="asked_again") == had
            async with system.http.post(path, json=body, headers={"Last-Event-ID": events[0].id}) as response:
                assert response.status == 400, "without its id"

    run(main())


def test_a_client_of_ours_that_stops_early_leaves_nothing_running(run) -> None:
    async def main() -> None:
        async with running() as system, AsyncClient(system.url) as client:
            worker = await system.worker()
            worker.pause_at = 3
            deltas = client.complete("hello", max_tokens=9)
            await anext(deltas)
            await deltas.aclose()  # type: ignore[attr-defined]
            await until(lambda: not system.coordinator.dispatcher.requests)
            assert system.coordinator.resumption._left == {}

    run(main())


def test_a_request_is_claimed_from_a_coordinator_that_hangs_or_cannot_be_reached(run) -> None:
    async def main() -> None:
        async with two_coordinators() as (old, first, new, second):
            response, had = await start(old, first, 4, **{"X-Baton-Resume-S": "5"})
            call = asyncio.create_task(go_on(new, had[-1].id))
            await second.wait_for(lambda: second.claims == [ID])
            # What a worker does that both are linked to.
            (taken,) = first.assignments
            await first.send(ending=wire.Ending(id=taken.id, reason=wire.END_REASON_TAKEN, num_tokens=4))
            await second.report(taken, num_tokens=4)
            state = state_of([*had, *await call])
            assert (state.done, state.usages[0]["completion_tokens"]) == (1, 9)
            assert state.text[0] == new.decode([token_at(new.encode("hello"), index) for index in range(9)])
            # Whoever had it is told, says so to a client that still listens, and aborts nothing.
            rest = parse((await response.content.read()).decode())
            assert json.loads(rest[-1].data)["error"]["code"] == "resumed_elsewhere"
            assert old.metric("baton_requests_total", outcome="moved") == 1
            assert first.aborts == []
            assert len(first.assignments) == 1, "it begins no other attempt"
            # The client may even come back there.
            first.go.set()
            await first.report(taken, num_tokens=9)
            assert state_of([*had, *await go_on(old, had[-1].id)]) == state

    run(main())


def test_what_was_taken_while_its_client_was_gone_is_not_kept(run) -> None:
    async def main() -> None:
        async with running(heartbeat_timeout_s=0.3) as system:
            worker = await system.worker()
            response, _ = await start(system, worker, 4, **{"X-Baton-Resume-S": "5"})
            response.close()
            await until(lambda: bool(system.coordinator.resumption._left))
            (taken,) = worker.assignments
            await worker.send(ending=wire.Ending(id=taken.id, reason=wire.END_REASON_TAKEN, num_tokens=4))
            await worker.report(taken, num_tokens=4)
            await until(lambda: system.metric("baton_orphans_total", event="reported") == 1)
            assert system.coordinator.resumption._left == {}
            assert worker.aborts == []

    run(main())


@pytest.mark.parametrize("resumes", [True, False])
def test_a_stream_without_news_gives_signs_of_life(run, resumes: bool) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker(token_at=system.says("one two three"))
            worker.pause_at = 0 if resumes else 2
            headers = {"X-Baton-Resume-S": "5"} if resumes else {}
            stream = await asyncio.wait_for(
                system.openai.completions.create(
                    model="demo", prompt="x", max_tokens=9, stream=True, extra_headers=headers
                ),
                5,
            )
            loop = asyncio.get_running_loop()
            loop.call_later(0.35, worker.go.set)
            assert "".join([event.choices[0].text async for event in stream]) == "one two three"
            worker.go.clear()
            async with system.http.post("/v1/completions", json=BODY, headers=headers) as response:
                comments = 0
                async for line in response.content:
                    comments += line == b":\n"
                    if comments == 2:
                        worker.go.set()
                assert comments >= 2

    run(main())


class BlackHole:
    """An address of a coordinator that, from one moment on, takes everything and answers nothing."""

    def __init__(self, port: int) -> None:
        self.swallows = False
        self._port = port

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        their_reader, their_writer = await asyncio.open_connection("127.0.0.1", self._port)
        back = asyncio.create_task(self._pump(their_reader, writer))
        await self._pump(reader, their_writer)
        back.cancel()
        for each in (writer, their_writer):
            each.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if not self.swallows:
                writer.write(data)


def test_our_client_goes_on_at_its_next_address_when_the_first_falls_silent(run) -> None:
    async def main() -> None:
        async with two_coordinators() as (old, first, new, second):
            hole = BlackHole(old.ports.http)
            url = await hole.start()
            first.pause_at, text = 4, ""
            async with AsyncClient(f"{url},{new.url}", silence_s=0.5) as client:
                async for delta in client.complete("hello", max_tokens=9):
                    text += delta.text
                    if len(first.assignments) and not hole.swallows:
                        hole.swallows = True
                        second.on_claim = lambda: second.report(first.assignments[0], num_tokens=4)
                assert client.url == new.url
            assert text == new.decode([token_at(new.encode("hello"), index) for index in range(9)])
            assert new.metric("baton_requests_resumed_total", how="adopted") == 1
            first.go.set()

    run(main())


def test_our_client_asks_again_where_its_request_never_arrived(run) -> None:
    async def main() -> None:
        async with two_coordinators() as (old, _, new, second):
            hole = BlackHole(old.ports.http)
            hole.swallows = True
            async with AsyncClient(f"{await hole.start()},{new.url}", silence_s=0.4) as client:
                text = "".join([delta.text async for delta in client.complete("hello", max_tokens=9)])
            assert text == new.decode([token_at(new.encode("hello"), index) for index in range(9)])
            assert len(second.assignments) == 1

    run(main())


async def read_all(call: Any) -> None:
    while await call.read():
        pass


def test_a_coordinator_without_any_worker_sends_clients_that_can_resume_elsewhere(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker()
            response, had = await start(system, worker, 4, **{"X-Baton-Resume-S": "5"})
            sampling = api.Sampling(temperature=0, max_tokens=9)
            call = system.inference.Generate(
                api.GenerateRequest(text="hello", sampling=sampling, request_id="a-gRPC-request-here", resume_s=5)
            )
            assert (await call.read()).token_ids
            await worker.stop()
            rest = await asyncio.wait_for(response.content.read(), 5)
            assert b"[DONE]" not in rest
            assert b"error" not in rest
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await read_all(call)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            async with system.http.get(f"/v1/streams/{ID}") as refusal:
                assert refusal.status == 503
            again = await system.worker("decode-1")  # nobody else was there: it goes on here
            assert state_of([*had, *await go_on(system, had[-1].id)]).usages[0]["completion_tokens"] == 9
            assert again.assignments

    run(main())


def test_an_orphan_that_is_reported_twice_and_adopted_in_between_goes_on(run) -> None:
    async def main() -> None:
        async with two_coordinators() as (old, first, new, second):
            path, body = body_of("completion")
            events = await post(old, path, body)
            (assignment,) = first.assignments
            second.pause_at = 6
            await second.report(assignment, num_tokens=3)
            call = asyncio.create_task(go_on(new, events[2].id))
            await second.wait_for(lambda: bool(second.adopted))
            await second.report(assignment, num_tokens=3)  # the answer to the claim
            second.go.set()
            assert state_of([*events[:3], *await call]) == state_of(events)
            assert second.aborts == []
            assert second.assignments == []

    run(main())
