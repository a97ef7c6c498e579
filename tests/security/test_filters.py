"""Filters: nothing passes by being split, counted, resumed or asked for in another way."""

import asyncio
import contextlib
import json
import re
import secrets
import sys
import types
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from coordinator_harness import DECODE, System, running, until

from baton.errors import ConfigurationError
from baton.filters import Filter, OutputFilter, Refused, Shown
from baton.token_ids import unpack
from baton.v1 import inference_pb2 as api
from coordinator.delivery import Choice

PROMPT = "the prompt of somebody"
ROOT = Path(__file__).resolve().parents[2]
SAYS = "Write to john.doe@example.com, or to ann+x@mail.example.org. Bye"
SHOWN = "Write to [email], or to [email]. Bye"
EMAIL = "email_filter:EmailFilter"


class Moderator(Filter):
    """Refuses and ends at a word, which may come in pieces."""

    async def input(self, texts: Any) -> list[str]:
        if any("forbidden" in each.text for each in texts):
            raise Refused("this is not talked about here")
        return [each.text for each in texts]

    def output(self) -> OutputFilter:
        async def moderate(text: str, final: bool) -> Shown:
            if (at := text.find("ann+x")) >= 0:
                return Shown(len(text), text[:at], end=True)
            return Shown(len(text) if final else max(0, len(text) - 4), text if final else text[:-4])

        return moderate


class Broken(Filter):
    """On its way in, or out, in the manner of a `kind`."""

    kind, where = "raises", "input"

    async def _work(self, result: Any) -> Any:
        if self.kind == "raises":
            raise ValueError(PROMPT)
        if self.kind == "late":
            await asyncio.sleep(60)
        return None if self.kind == "nonsense" else result

    async def input(self, texts: Any) -> Any:
        return await self._work([]) if self.where == "input" else [each.text for each in texts]

    def output(self) -> OutputFilter | None:
        async def hook(text: str, final: bool) -> Shown:
            if "example" not in text and not final:  # held back until then
                return Shown(0, "")
            return await self._work(Shown(len(text) + 1, ""))  # type: ignore[no-any-return]

        return hook if self.where == "output" else None


@pytest.fixture(autouse=True)
def plugins() -> Iterator[None]:
    """The one of the page, and those above, where --filter finds them."""
    page = (ROOT / "docs" / "security.md").read_text().partition("## Filters")[2]
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    example = types.ModuleType("email_filter")
    exec(compile(source, "docs/security.md", "exec"), example.__dict__)
    own = types.ModuleType("own_filters")
    own.Moderator, own.Broken, own.nothing, own.fails = Moderator, Broken, lambda: 1, lambda: 1 / 0  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "email_filter", example)
        patch.setitem(sys.modules, "own_filters", own)
        yield


@contextlib.asynccontextmanager
async def filtering(filter: str = EMAIL, **options: object) -> AsyncIterator[System]:
    async with running(filter=filter, **options) as system:
        worker = await system.worker("decode-0", DECODE)
        worker.token_at = system.says(SAYS)
        yield system


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(id, data) of each event but the last."""
    blocks = [block for block in text.split("\n\n") if "data: " in block and "[DONE]" not in block]
    fields = [dict(line.split(": ", 1) for line in block.split("\n") if line != ":") for block in blocks]
    return [(each.get("id", ""), json.loads(each["data"])) for each in fields]


def text_of(events: list[tuple[str, dict[str, Any]]], choice: int = 0) -> str:
    found = [each for _, data in events for each in data.get("choices", ()) if each["index"] == choice]
    return "".join(each.get("text") or each.get("delta", {}).get("content") or "" for each in found)


async def stream(system: System, path: str = "/v1/completions", **body: Any) -> tuple[str, list[Any]]:
    asked = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    headers = body.pop("headers", {})
    asked |= {"stream": True, "max_tokens": 100, **body}
    async with system.http.post(path, json=asked, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        raw = await answer.text()
        return raw, events_of(raw)


# What comes in


def test_the_model_reads_no_address_in_whatever_form_it_comes(run) -> None:
    async def scenario() -> None:
        async with filtering() as system:
            secret = "Mail me@home.example now"
            headers = {"Content-Type": "application/json"}
            bodies: list[tuple[str, dict[str, Any]]] = [
                ("/v1/completions", {"prompt": secret}),
                ("/v1/completions", {"prompt": [secret, secret]}),
                ("/v1/completions", {"prompt": system.encode(secret)}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": secret}]}),
                ("/v1/chat/completions", {"messages": [
                    {"role": "system", "content": [{"type": "text", "text": secret}]}, {"role": "user", "content": "x"}
                ]}),
            ]  # fmt: skip
            for path, body in bodies:
                async with system.http.post(path, json=body | {"max_tokens": 1}, headers=headers) as answer:
                    assert answer.status == 200, await answer.text()
            requests = [api.GenerateRequest(text=secret), api.GenerateRequest(token_ids={"ids": system.encode(secret)}),
                        api.GenerateRequest(chat={"messages": [{"role": "user", "content": secret}]})]  # fmt: skip
            for request in requests:
                request.sampling.max_tokens = 1
                _ = [each async for each in system.inference.Generate(request)]
            read = [system.decode(unpack(each.token_ids)) for each in system.workers[0].assignments]
            assert len(read) == len(bodies) + 1 + len(requests)
            assert all("[email]" in each and "home.example" not in each for each in read), read
            assert system.metric("baton_filter_total", filter=EMAIL, event="changed_input") == len(bodies) + len(
                requests
            )

    run(scenario())


def test_variables_of_the_chat_template_pass_at_any_depth(run) -> None:
    from coordinator.requests import ChatPrompt

    variables = {"a": "1", "b": {"k": ["2", {"l": "3"}], "n": 4}, "c": None, "d": True}
    chat = ChatPrompt([{"role": "user", "content": "0"}], variables)
    texts = [each.text for each in chat.texts()]
    assert texts == ["0", "1", "k", "2", "l", "3", "n"]
    assert chat.with_texts(texts) == chat
    other = chat.with_texts([each + "!" for each in texts])
    assert other.template_variables == {"a": "1!", "b": {"k!": ["2!", {"l!": "3!"}], "n!": 4}, "c": None, "d": True}
    assert other.messages == [{"role": "user", "content": "0!"}]


def test_a_prompt_that_nothing_is_changed_in_keeps_its_tokens(run) -> None:
    async def scenario() -> None:
        async with filtering() as system:
            ids = [*system.encode("never mind")[:1], *system.encode("x y")]
            await system.openai.completions.create(model="demo", prompt=ids, max_tokens=1)
            assert unpack(system.workers[0].assignments[0].token_ids) == ids

    run(scenario())


def test_a_refused_prompt_reaches_no_worker_and_its_client_hears_why(run) -> None:
    async def scenario() -> None:
        async with filtering("own_filters:Moderator") as system:
            for path, body in (
                ("/v1/completions", {"prompt": "forbidden"}),
                ("/v1/cache/pins", {"prompt": "forbidden"}),
            ):
                async with system.http.post(path, json=body) as answer:
                    error = (await answer.json())["error"]
                    assert (answer.status, error["code"]) == (400, "filtered")
                    assert error["message"] == "this is not talked about here"
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                _ = [each async for each in system.inference.Generate(api.GenerateRequest(text="forbidden"))]
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert system.workers[0].assignments == []
            assert system.metric("baton_filter_total", filter="own_filters:Moderator", event="refused") == 3
            assert system.metric("baton_requests_refused_total", reason="filtered") == 2

    run(scenario())


# What goes out


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("pace_s", [0.0, 0.002], ids=["in big deltas", "token by token"])
def test_no_address_is_shown_whole_or_in_pieces(run, path: str, pace_s: float) -> None:
    async def scenario() -> None:
        async with filtering() as system:
            system.workers[0].pace_s = pace_s
            raw, events = await stream(system, path, n=3, stream_options={"include_usage": True})
            assert len(events) > 10 if pace_s else len(events) >= 4
            for choice in range(3):
                assert text_of(events, choice) == SHOWN
            assert not re.search(r"john|doe|example|ann|mail\.", raw)
            assert {end["finish_reason"] for _, data in events for end in data["choices"]} == {None, "stop"}
            usage = events[-1][1]["usage"]
            assert usage["completion_tokens"] == 3 * (len(system.encode(SAYS)) + 1), "as without filters"
            body = {"prompt": "x", "max_tokens": 100} if path == "/v1/completions" else {
                "messages": [{"role": "user", "content": "x"}], "max_tokens": 100}  # fmt: skip
            async with system.http.post(path, json=body) as answer:
                (whole,) = (await answer.json())["choices"]
                assert (whole.get("text") or whole["message"]["content"]) == SHOWN

    run(scenario())


def test_grpc_shows_the_same_and_no_token_ids(run) -> None:
    async def scenario() -> None:
        async with filtering() as system:
            request = api.GenerateRequest(text="x", n=2, sampling={"max_tokens": 100})
            answers = [each async for each in system.inference.Generate(request)]
            for choice in (0, 1):
                own = [each for each in answers if each.choice == choice]
                assert "".join(each.text for each in own) == SHOWN
                assert own[-1].finish_reason == api.FINISH_REASON_STOP
                assert sum(len(each.token_ids) for each in own) == len(system.encode(SAYS)) + 1
            assert {id for each in answers for id in each.token_ids} == {0}
            assert answers[-1].usage.completion_tokens == 2 * (len(system.encode(SAYS)) + 1)

    run(scenario())


def test_stop_strings_are_found_in_what_the_model_wrote_and_cut_before_filters_see_it(run) -> None:
    async def scenario() -> None:
        async with filtering() as system:
            _, events = await stream(system, stop=[".com, or"])
            assert text_of(events) == "Write to john.doe@example"[:9] + "john.doe@example", "what is left is no address"
            _, events = await stream(system, stop=[", or"])
            assert text_of(events) == "Write to [email]"

    run(scenario())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_comes_back_goes_on_in_the_same_text_from_every_event(run, path: str) -> None:
    async def scenario() -> None:
        async with filtering() as system, filtering() as other:
            for each in (system, other):
                each.workers[0].pace_s = 0.001
            id = f"chosen-{secrets.token_hex(16)}"
            headers = {"X-Request-Id": id, "X-Baton-Resume-S": "20"}
            _, events = await stream(system, path, n=2, seed=1, headers=headers)
            for at, (last, _) in enumerate(events):
                had = [text_of(events[: at + 1], choice) for choice in (0, 1)]
                async with system.http.get(f"/v1/streams/{id}", headers={"Last-Event-ID": last}) as answer:
                    assert answer.status == 200, await answer.text()
                    rest = events_of(await answer.text())
                assert [had[choice] + text_of(rest, choice) for choice in (0, 1)] == [SHOWN, SHOWN]
            for at in (0, len(events) // 2, len(events) - 1):  # nobody knows it any more: all is computed again
                last = events[at][0]
                had = [text_of(events[: at + 1], choice) for choice in (0, 1)]
                _, rest = await stream(other, path, n=2, seed=1, headers={"X-Request-Id": id, "Last-Event-ID": last})
                assert [had[choice] + text_of(rest, choice) for choice in (0, 1)] == [SHOWN, SHOWN]
                assert not [data for _, data in rest if "error" in data]

    run(scenario())


def test_an_answer_that_comes_out_otherwise_is_told_from_the_one_that_a_client_has(run) -> None:
    async def scenario() -> None:
        async with filtering() as system, filtering() as other:
            id = f"chosen-{secrets.token_hex(16)}"
            _, events = await stream(system, headers={"X-Request-Id": id})
            other.workers[0].token_at = other.says("Right to you, and more than that follows after it")
            last = next(each for each, data in events if data["choices"][0]["text"])
            body = {"prompt": "x", "stream": True, "max_tokens": 100}
            headers = {"X-Request-Id": id, "Last-Event-ID": last}
            async with other.http.post("/v1/completions", json=body, headers=headers) as answer:
                assert answer.status == 409
                assert (await answer.json())["error"]["code"] == "computed_otherwise"

    run(scenario())


def test_a_filter_ends_an_answer_and_its_work_and_the_other_choices_go_on(run) -> None:
    async def scenario() -> None:
        async with filtering("own_filters:Moderator") as system:
            worker = system.workers[0]
            ends, worker.pace_s = system.says(SAYS), 0.002
            fine = system.says("All is well and nothing happens, and so on and on and on and on until the end")
            first = worker.assignments
            worker.token_at = ends
            raw, events = await stream(system)
            assert text_of(events) == SAYS.partition("ann+x")[0]
            assert "ann" not in raw
            assert events[-1][1]["choices"][0]["finish_reason"] == "content_filter"
            await worker.wait_for(lambda: len(worker.aborts) == 1)
            assert first[0].id == worker.aborts[0]
            answers = [each async for each in system.inference.Generate(api.GenerateRequest(text="x"))]
            assert answers[-1].finish_reason == api.FINISH_REASON_CONTENT_FILTER

            worker.token_at = lambda prompt, index: (fine if prompt == system.encode("fine") else ends)(prompt, index)
            _, events = await stream(system, prompt=["x", "fine"])
            reasons = {each["index"]: each["finish_reason"] for _, data in events for each in data["choices"]}
            assert reasons == {0: "content_filter", 1: "stop"}
            assert text_of(events, 1).endswith("until the end")
            assert system.metric("baton_requests_total", outcome="completed") == 3

    run(scenario())


def test_filters_pass_on_to_each_other_what_they_made(run) -> None:
    async def scenario() -> None:
        async with filtering(f"{EMAIL},own_filters:Moderator") as system:
            _, events = await stream(system)
            assert text_of(events) == SHOWN, "the second one sees no name to end at"
        async with filtering(f"own_filters:Moderator,{EMAIL}") as system:
            _, events = await stream(system)
            assert text_of(events) == SHOWN.rpartition("[email]")[0]

    run(scenario())


def test_logprobs_which_name_tokens_are_refused(run) -> None:
    async def scenario() -> None:
        body = {"prompt": "x", "logprobs": 1}
        async with filtering() as system, system.http.post("/v1/completions", json=body) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["param"] == "logprobs"

    run(scenario())


def test_an_aborted_answer_is_filtered_no_further_and_ends_at_once(run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    async def slow(text: str, final: bool) -> Shown:
        calls.append(text)
        await asyncio.sleep(0.1)
        return Shown(len(text), text)

    monkeypatch.setattr(Moderator, "output", lambda self: slow)

    async def scenario() -> None:
        async with filtering("own_filters:Moderator") as system:
            worker = system.workers[0]
            worker.pause_at = 8
            answers = aiter(system.inference.Generate(api.GenerateRequest(text="x")))
            first = await anext(answers)
            await system.inference.Abort(api.AbortRequest(request_id=first.request_id))
            rest = [each async for each in answers]
            assert SAYS.startswith(first.text + "".join(each.text for each in rest))
            assert rest[-1].finish_reason == api.FINISH_REASON_ABORTED
            worker.pause_at = None
            for at in (1, 2):  # all of the second is here, and its client hangs up while it is filtered
                call = system.inference.Generate(api.GenerateRequest(text="x"))
                await anext(aiter(call))
                if at == 2:
                    await until(lambda: not system.coordinator.dispatcher.requests)
                call.cancel()
                await asyncio.sleep(0.2)
                done = len(calls)
                await asyncio.sleep(0.3)
                assert len(calls) == done, "nobody reads it"

    run(scenario())


# What goes wrong


@pytest.mark.parametrize("kind", ["raises", "late", "nonsense"])
@pytest.mark.parametrize("where", ["input", "output"])
def test_what_a_broken_filter_saw_is_not_served_unless_somebody_said_so(
    run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str, where: str
) -> None:
    monkeypatch.setattr(Broken, "kind", kind)
    monkeypatch.setattr(Broken, "where", where)
    name = "own_filters:Broken"

    async def scenario() -> None:
        async with filtering(name, filter_timeout_s=0.05) as system:
            async with system.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 100}) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (503, "filter_failed")
                assert "Retry-After" in answer.headers
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                _ = [each async for each in system.inference.Generate(api.GenerateRequest(text="x"))]
            assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
            assert system.metric("baton_filter_total", filter=name, event="late" if kind == "late" else "failed") == 2
        async with filtering(name, filter_timeout_s=0.05, filter_fails="open") as system:
            _, events = await stream(system)
            assert text_of(events) == SAYS, "nothing is lost, whatever was held back"

    run(scenario())
    assert PROMPT not in caplog.text


@pytest.mark.parametrize(
    ("filter", "says"),
    [
        ("email_filter", "write MODULE:FACTORY"),
        ("no_such_module:Filter", "cannot be loaded.*PYTHONPATH"),
        ("own_filters:Missing", "cannot be loaded"),
        ("own_filters:nothing", "made a int; it must be a baton.filters.Filter"),
        ("own_filters:fails", "ZeroDivisionError"),
    ],
)
def test_what_is_no_filter_stops_the_coordinator_at_its_start(run, filter: str, says: str) -> None:
    async def scenario() -> None:
        with pytest.raises(ConfigurationError, match=says):
            async with running(filter=filter):
                pass

    run(scenario())


def test_without_filters_choices_are_those_that_know_of_none(run) -> None:
    async def scenario() -> None:
        async with running() as system:
            worker = await system.worker("decode-0", DECODE)
            worker.pause_at = 1
            asked = asyncio.create_task(stream(system, max_tokens=3))
            await worker.wait_for(lambda: bool(worker.assignments))
            (request,) = system.coordinator.dispatcher.requests.values()
            assert {type(choice) for choice in request.choices} == {Choice}
            worker.go.set()
            await asked

    run(scenario())
