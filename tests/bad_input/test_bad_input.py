"""Whatever a client gets wrong, it is told what, nothing of its prompt is repeated, and the next request is served."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc
import pytest
from coordinator_harness import System, running

from baton.v1 import inference_pb2 as api

SECRET = "SECRETPROMPT"
JSON = "application/json"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": SECRET}
NAN, INFINITY = float("nan"), float("inf")


class Row(NamedTuple):
    name: str
    path: str
    body: Any
    """Bytes as they are; anything else as JSON, with a good prompt added if there is none."""
    says: str
    status: int = 400
    content_type: str = JSON
    method: str = "POST"
    param: str | None = None


def completion(name: str, says: str, param: str | None = None, **fields: Any) -> Row:
    return Row(name, COMPLETIONS, {"prompt": SECRET, "max_tokens": 4} | fields, says, param=param)


def chat(name: str, says: str, param: str | None = None, **fields: Any) -> Row:
    return Row(name, CHAT, {"messages": [USER], "max_tokens": 4} | fields, says, param=param)


ROWS = [
    # Not what HTTP and JSON are
    Row("broken JSON", COMPLETIONS, b'{"prompt": "SECRETPROMPT', "not valid JSON"),
    Row("empty body", COMPLETIONS, b"", "not valid JSON"),
    Row("a list", COMPLETIONS, b"[]", "Expected `object`"),
    Row("two values", COMPLETIONS, b'{"prompt": "SECRETPROMPT"} {}', "not valid JSON"),
    Row("NaN literal", COMPLETIONS, b'{"prompt": "SECRETPROMPT", "temperature": NaN}', "not valid JSON"),
    Row("number too large for a float", COMPLETIONS, b'{"prompt": "a", "temperature": 1e999}', "out of range"),
    Row("invalid UTF-8", COMPLETIONS, b'{"prompt": "SECRETPROMPT \xff\xfe"}', "not UTF-8"),
    Row("half a surrogate pair", COMPLETIONS, b'{"prompt": "SECRETPROMPT \\ud800"}', "not valid JSON"),
    Row("nested without end", CHAT, b'{"messages": [], "metadata": {"a": ' + b"[" * 200_000, "nested too deeply"),
    Row("wrong content type", COMPLETIONS, b"prompt=SECRETPROMPT", "application/json", 415, "text/plain"),
    Row("curl's default content type", CHAT, b"{}", "application/json", 415, "application/x-www-form-urlencoded"),
    Row("2 MB body", COMPLETIONS, b'{"prompt": "' + b"x" * (2 << 20) + b'"}', "too large", 413),
    Row("unknown path", "/v1/completion", {}, "nothing at this path", 404),
    Row("wrong method", COMPLETIONS, None, "use POST", 405, method="GET"),
    Row("wrong method on models", "/v1/models", {}, "use GET", 405),
    Row("unknown model by path", "/v1/models/gpt-4", None, "'demo' is served", 404, method="GET", param="model"),
    # Fields that both kinds share
    completion("unknown model", "'demo' is served", "model", model="gpt-4")._replace(status=404),
    chat("unknown model in chat", "'demo' is served", "model", model="gpt-4")._replace(status=404),
    completion("model of the wrong type", "Expected `str | null`, got `int`", "model", model=3),
    completion("misspelt field", "unknown field `max_token`", "max_token", max_token=3),
    completion("max_tokens 0", "max_tokens must be from 1", "max_tokens", max_tokens=0),
    completion("max_tokens negative", "max_tokens must be from 1", "max_tokens", max_tokens=-5),
    completion("max_tokens huge", "context length", "max_tokens", max_tokens=2_000_000_000),
    completion("max_tokens beyond 64 bits", "max_tokens must be", "max_tokens", max_tokens=10**30),
    completion("max_tokens a text", "got `str`", "max_tokens", max_tokens="4"),
    completion("max_tokens a float", "got `float`", "max_tokens", max_tokens=4.5),
    completion("bool for a number", "got `bool`", "max_tokens", max_tokens=True),
    completion("temperature negative", "temperature must be from 0", "temperature", temperature=-0.1),
    completion("temperature huge", "temperature must be from 0", "temperature", temperature=1e30),
    completion("temperature a text", "got `str`", "temperature", temperature="hot"),
    completion("top_p 0", "top_p must be greater than 0", "top_p", top_p=0),
    completion("top_p above 1", "top_p must be", "top_p", top_p=1.01),
    completion("top_k below -1", "top_k must be", "top_k", top_k=-2),
    completion("min_p negative", "min_p must be", "min_p", min_p=-1),
    completion("repetition_penalty 0", "repetition_penalty must be", "repetition_penalty", repetition_penalty=0),
    completion("presence_penalty 3", "presence_penalty must be", "presence_penalty", presence_penalty=3),
    completion("frequency_penalty -3", "frequency_penalty must be", "frequency_penalty", frequency_penalty=-3),
    completion("seed beyond 64 bits", "seed must be", "seed", seed=2**64),
    completion("n 0", "n must be from 1 to 16", "n", n=0),
    completion("n 17", "n must be from 1 to 16", "n", n=17),
    completion("min_tokens above max_tokens", "min_tokens must not be greater", "min_tokens", min_tokens=5),
    completion("stop empty string", "stop holds an empty string", "stop", stop=""),
    completion("stop too many", "more than 16", "stop", stop=["a"] * 17),
    completion("stop too long", "longer than 1000", "stop", stop=["a" * 1001]),
    completion("stop of the wrong type", "got `int`", "stop[0]", stop=[1]),
    completion("stop null inside", "got `null`", "stop[0]", stop=[None]),
    completion("stop_token_ids outside", "vocabulary", "stop_token_ids", stop_token_ids=[4096]),
    completion("stop_token_ids too many", "more than 64", "stop_token_ids", stop_token_ids=[1] * 65),
    completion("logit_bias key a word", "strings of digits", "logit_bias", logit_bias={"word": 1}),
    completion("logit_bias key negative", "strings of digits", "logit_bias", logit_bias={"-1": 1}),
    completion("logit_bias outside", "vocabulary", "logit_bias", logit_bias={"4096": 1}),
    completion("logit_bias too strong", "-100 to 100", "logit_bias", logit_bias={"5": 101}),
    completion("logit_bias value a text", "got `str`", "logit_bias[...]", logit_bias={"5": "x"}),
    completion("logit_bias too many", "more than 1024", "logit_bias", logit_bias={str(id): 1 for id in range(1025)}),
    completion("logit_bias a list", "got `array`", "logit_bias", logit_bias=[1]),
    completion("stream a text", "got `str`", "stream", stream="yes"),
    completion("stream_options without stream", "needs stream", "stream_options", stream_options={}),
    completion("stream_options unknown", "unknown field `x`", "stream_options.x", stream=True, stream_options={"x": 1}),
    # Completions
    Row("no prompt", COMPLETIONS, {"max_tokens": 4}, "missing required field `prompt`", param="prompt"),
    completion("prompt null", "got `null`", "prompt", prompt=None),
    completion("prompt a number", "got `int`", "prompt", prompt=3),
    completion("prompt an object", "got `object`", "prompt", prompt={"text": SECRET}),
    completion("prompt empty text", "prompt is empty", "prompt", prompt=""),
    completion("prompt empty list", "prompt is empty", "prompt", prompt=[]),
    completion("prompt with an empty text", "prompt is empty", "prompt", prompt=[SECRET, ""]),
    completion("prompt with empty tokens", "prompt is empty", "prompt", prompt=[[]]),
    completion("prompt mixes kinds", "mixes", "prompt", prompt=[SECRET, 5]),
    completion("prompt of bools", "got `bool`", "prompt[0]", prompt=[True]),
    completion("prompt nested too deep", "got `array`", "prompt[0][0]", prompt=[[[1]]]),
    completion("token id outside the vocabulary", "outside the vocabulary of 4096", "prompt", prompt=[1, 4096]),
    completion("token id negative", "outside the vocabulary", "prompt", prompt=[-1]),
    completion("token id enormous", "outside the vocabulary", "prompt", prompt=[10**40]),
    completion("65 prompts", "1 to 64 prompts", "prompt", prompt=["a"] * 65),
    completion("more choices than fit at all", "choices", "n", prompt=["a"] * 64, n=16),
    completion("prompt too long", "context length is 2048; shorten it", "prompt", prompt=[7] * 2048),
    completion("prompt and answer too long", "context length of 2048", "max_tokens", prompt=[7] * 2000, max_tokens=49),
    completion("logprobs 21", "logprobs must be from 0 to 20", "logprobs", logprobs=21),
    completion("echo", "echo is not supported", "echo", echo=True),
    completion("suffix", "suffix is not supported", "suffix", suffix="end"),
    completion("best_of", "best_of is not supported", "best_of", best_of=4),
    # Chats
    Row("no messages", CHAT, {"model": "demo"}, "missing required field `messages`", param="messages"),
    chat("messages null", "got `null`", "messages", messages=None),
    chat("messages empty", "messages is empty", "messages", messages=[]),
    chat("messages a text", "got `str`", "messages", messages=SECRET),
    chat("unknown role", "role must be one of", "messages[1].role", messages=[USER, {"role": "robot", "content": "x"}]),
    chat("role null", "got `null`", "messages[0].role", messages=[{"role": None, "content": "x"}]),
    chat("no role", "missing required field `role`", "messages[0].role", messages=[{"content": SECRET}]),
    chat("tool role", "role must be one of", "messages[0].role", messages=[{"role": "tool", "content": "x"}]),
    chat("no content", "missing required field `content`", "messages[0].content", messages=[{"role": "user"}]),
    chat("content null", "got `null`", "messages[0].content", messages=[{"role": "user", "content": None}]),
    chat("content a number", "got `int`", "messages[0].content", messages=[{"role": "user", "content": 5}]),
    chat(
        "an image",
        "Unsupported value",
        "messages[0].content[0].type",
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": SECRET}}]}],
    ),
    chat("message with an unknown field", "unknown field `mood`", "messages[0].mood", messages=[USER | {"mood": 1}]),
    chat("message with tool calls", "Expected `null`", "messages[0].tool_calls", messages=[USER | {"tool_calls": []}]),
    chat("tools", "tools are not supported", "tools", tools=[{"type": "function"}]),
    chat("forced tool", "tools are not supported", "tools", tool_choice="required"),
    chat("response_format", "response_format", "response_format", response_format={"type": "json_object"}),
    chat("logprobs a number", "got `int`", "logprobs", logprobs=3),
    chat("top_logprobs alone", "needs logprobs", "top_logprobs", top_logprobs=3),
    chat("top_logprobs 21", "from 0 to 20", "logprobs", logprobs=True, top_logprobs=21),
    chat("both maxima", "not both", "max_tokens", max_completion_tokens=3),
    chat("template variable reserved", "must not set", "chat_template_kwargs", chat_template_kwargs={"messages": []}),
    chat("chat too long", "context length", "messages", messages=[{"role": "user", "content": "word " * 9000}]),
    # How soon
    chat("class unknown", "must be one of standard", "service_class", service_class="gold"),
    chat("class number", "got `int`", "service_class", service_class=1),
    chat("max_ttft_s 0", "above 0", "max_ttft_s", max_ttft_s=0),
    chat("deadline_s negative", "above 0", "deadline_s", deadline_s=-1),
    # Tokens
    Row("tokenize nothing", "/tokenize", {}, "either prompt or messages", param="prompt"),
    Row("tokenize both", "/tokenize", {"prompt": SECRET, "messages": [USER]}, "either prompt or messages"),
    Row("detokenize outside", "/detokenize", {"tokens": [4096]}, "outside the vocabulary", param="tokens"),
    Row("detokenize texts", "/detokenize", {"tokens": [SECRET]}, "got `str`", param="tokens[0]"),
]


@pytest.fixture(scope="module")
def system(run) -> Iterator[System]:
    stack = contextlib.AsyncExitStack()

    async def start() -> System:
        system = await stack.enter_async_context(running(max_requests=100))
        await system.worker()
        return system

    yield run(start())
    run(stack.aclose())


async def good_http(system: System) -> None:
    async with system.http.post(COMPLETIONS, json={"prompt": "hello", "max_tokens": 2}) as response:
        assert response.status == 200
        assert (await response.json())["usage"]["completion_tokens"] == 2


def test_the_table_is_as_long_as_promised() -> None:
    assert len(ROWS) + len(GRPC_ROWS) >= 50
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))
def test_http(run, system: System, row: Row, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        data = row.body if isinstance(row.body, bytes) else json.dumps(row.body).encode()
        headers = {"Content-Type": row.content_type}
        async with system.http.request(row.method, row.path, data=data, headers=headers) as response:
            text = await response.text()
            assert response.status == row.status, text
            assert response.headers["X-Request-Id"]
            error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert row.says in error["message"]
        assert len(error["message"]) < 500
        assert error["type"] == "invalid_request_error"
        if row.param is not None:
            assert error["param"] == row.param
        assert SECRET not in text
        await good_http(system)

    with caplog.at_level("DEBUG", logger="baton"):
        run(main())
    assert not any(SECRET in record.getMessage() for record in caplog.records)
    assert system.coordinator.dispatcher.num_streams == 0


INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


def text(**sampling: Any) -> api.GenerateRequest:
    return api.GenerateRequest(text=SECRET, sampling=api.Sampling(**{"max_tokens": 4} | sampling))


def messages(*pairs: tuple[str, str]) -> api.GenerateRequest:
    return api.GenerateRequest(chat=api.Chat(messages=[api.ChatMessage(role=r, content=c) for r, c in pairs]))


GRPC_ROWS = [
    ("no prompt", api.GenerateRequest(), "prompt is missing", INVALID),
    ("empty text", api.GenerateRequest(text=""), "prompt is empty", INVALID),
    ("no tokens", api.GenerateRequest(token_ids=api.TokenIds()), "prompt is empty", INVALID),
    ("token id outside", api.GenerateRequest(token_ids=api.TokenIds(ids=[4096])), "vocabulary", INVALID),
    ("prompt too long", api.GenerateRequest(token_ids=api.TokenIds(ids=[7] * 2048)), "context length", INVALID),
    ("unknown model", api.GenerateRequest(text=SECRET, model="gpt-4"), "'demo' is served", NOT_FOUND),
    ("no messages", api.GenerateRequest(chat=api.Chat()), "messages is empty", INVALID),
    ("unknown role", messages(("robot", SECRET)), "role must be one of", INVALID),
    ("empty role", messages(("", SECRET)), "role must be one of", INVALID),
    ("n 17", api.GenerateRequest(text=SECRET, n=17), "n must be", INVALID),
    ("n enormous", api.GenerateRequest(text=SECRET, n=2**32 - 1), "n must be", INVALID),
    ("empty stop", api.GenerateRequest(text=SECRET, stop=[""]), "empty string", INVALID),
    ("17 stops", api.GenerateRequest(text=SECRET, stop=["a"] * 17), "more than 16", INVALID),
    ("temperature NaN", text(temperature=NAN), "temperature must be", INVALID),
    ("temperature infinite", text(temperature=INFINITY), "temperature must be", INVALID),
    ("temperature negative", text(temperature=-1), "temperature must be", INVALID),
    ("top_p NaN", text(top_p=NAN), "top_p must be", INVALID),
    ("top_p 0", text(top_p=0), "top_p must be", INVALID),
    ("min_p 2", text(min_p=2), "min_p must be", INVALID),
    ("top_k -2", text(top_k=-2), "top_k must be", INVALID),
    ("repetition_penalty 0", text(repetition_penalty=0), "repetition_penalty must be", INVALID),
    ("presence_penalty NaN", text(presence_penalty=NAN), "presence_penalty must be", INVALID),
    ("logit_bias NaN", text(logit_bias={5: NAN}), "-100 to 100", INVALID),
    ("logit_bias outside", text(logit_bias={2**31: 1}), "vocabulary", INVALID),
    ("max_tokens 0", text(max_tokens=0), "max_tokens must be", INVALID),
    ("max_tokens huge", text(max_tokens=2**31), "max_tokens must be", INVALID),
    ("max_tokens beyond context", text(max_tokens=2048), "context length", INVALID),
    ("min_tokens above max_tokens", text(min_tokens=5), "min_tokens must not", INVALID),
    ("logprobs 21", text(logprobs=21), "logprobs must be", INVALID),
    ("stop token outside", text(stop_token_ids=[4096]), "vocabulary", INVALID),
    ("unknown class", api.GenerateRequest(text=SECRET, service_class="gold"), "must be one of standard", INVALID),
    ("max_ttft_s 0", api.GenerateRequest(text=SECRET, max_ttft_s=0), "above 0", INVALID),
    ("deadline_s NaN", api.GenerateRequest(text=SECRET, deadline_s=NAN), "above 0", INVALID),
]


@pytest.mark.parametrize("row", GRPC_ROWS, ids=lambda row: row[0].replace(" ", "-"))
def test_grpc(run, system: System, row: tuple[str, api.GenerateRequest, str, grpc.StatusCode]) -> None:
    async def main() -> None:
        _, request, says, code = row
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(aiter(system.inference.Generate(request)))
        assert raised.value.code() is code
        assert says in (raised.value.details() or "")
        assert SECRET not in str(raised.value)
        good = api.GenerateRequest(text="hello", sampling=api.Sampling(max_tokens=2))
        tokens = [token async for answer in system.inference.Generate(good) for token in answer.token_ids]
        assert len(tokens) == 2

    run(main())
    assert system.coordinator.dispatcher.num_streams == 0


def test_grpc_other_calls(run, system: System) -> None:
    async def main() -> None:
        calls = [
            (system.inference.Tokenize(api.TokenizeRequest()), "input is missing", INVALID),
            (system.inference.Tokenize(api.TokenizeRequest(model="gpt-4", text=SECRET)), "is served", NOT_FOUND),
            (system.inference.Detokenize(api.DetokenizeRequest(token_ids=[4096])), "vocabulary", INVALID),
        ]
        for call, says, code in calls:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call
            assert (raised.value.code(), says in (raised.value.details() or "")) == (code, True)

    run(main())


def test_bytes_that_are_no_message_and_messages_too_large_are_refused_and_the_server_lives(run, system: System) -> None:
    async def main() -> None:
        raw = system.channel.unary_stream("/baton.v1.Inference/Generate")
        for data in (b"\xff" * 100, b"\x12\xff"):
            with pytest.raises(grpc.aio.AioRpcError):
                await anext(aiter(raw(data)))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(aiter(system.inference.Generate(api.GenerateRequest(text="x" * (2 << 20)))))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await good_http(system)

    run(main())


def test_rubbish_on_the_http_port_does_not_disturb_others(run, system: System) -> None:
    async def main() -> None:
        for rubbish in (b"\x16\x03\x01\x02\x00" * 50, b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", system.ports.http)
            writer.write(rubbish)
            await writer.drain()
            if rubbish.endswith(b"\r\n\r\n"):
                assert await asyncio.wait_for(reader.read(100), 5)
            await good_http(system)
            writer.close()

    run(main())
