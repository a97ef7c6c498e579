"""Requests of every kind, what is compared of their answers, and the undisturbed answers."""

import asyncio
import contextlib
import json
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import grpc
import grpc.aio
from google.protobuf.json_format import ParseDict

from baton.v1 import inference_pb2 as api
from baton.v1.inference_pb2_grpc import InferenceStub
from tests.faults.fleet import Fleet

ANSWER_TIMEOUT_S = 180.0
SILENCE_S, SEARCH_S, RETRY_S = 2.0, 6.0, 0.1
"""What a stream is silent for at most, where coordinators give a sign of life every half second; what one takes to find
a request; and the pause before the next try."""
KEEP_S, FORGOTTEN_S = 10.0, 4.0
GO_ON = {
    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}  # fmt: skip
"""The connection broke, or another one has the request; or whoever answers has no workers yet."""
LOGPROB_TOLERANCE = 1e-3
"""Without --deterministic: float32 sums in another order."""


@dataclass(frozen=True)
class Shape:
    name: str
    path: str
    """Of HTTP; empty: gRPC."""
    body: dict[str, Any]
    seeded: bool = False
    """Samples, which only --deterministic promises to repeat exactly."""


@dataclass
class Logprob:
    token: str | int
    logprob: float
    others: dict[str | int, float]


@dataclass
class Choice:
    text: str = ""
    finish: str | None = None
    token_ids: list[int] = field(default_factory=list)
    """By gRPC alone."""
    digest: str = ""
    logprobs: list[Logprob] = field(default_factory=list)


@dataclass
class Answer:
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: tuple[int, int] | None = None
    """Tokens of the prompt, and of all choices."""
    began_s: float = 0.0
    arrivals_s: dict[int, list[float]] = field(default_factory=dict)
    """When parts of a choice came; empty where the answer came whole."""
    breaks_s: list[float] = field(default_factory=list)
    """When its client noticed that a connection was of no use any more."""
    trouble: str = ""

    def gaps_s(self) -> list[list[float]]:
        """Between the parts of each choice; the first is from the request to its first part."""
        return [
            [later - earlier for earlier, later in zip([self.began_s, *times], times, strict=False)]
            for times in self.arrivals_s.values()
        ]


def _prompt(name: str, times: int) -> str:
    return f"The {name} asks: what does this function do, and why does it return early? " * times


GREEDY = {"temperature": 0, "ignore_eos": True}
SHAPES = [
    Shape("greedy", "/v1/completions", {"prompt": _prompt("reader", 16), "max_tokens": 60, **GREEDY}),
    Shape("short", "/v1/completions", {"prompt": _prompt("child", 2), "max_tokens": 80, **GREEDY}),
    Shape("long prompt", "/v1/completions", {"prompt": _prompt("lawyer", 70), "max_tokens": 24, **GREEDY}),
    Shape("logprobs", "/v1/completions", {"prompt": _prompt("editor", 12), "max_tokens": 48, "logprobs": 3, **GREEDY}),
    Shape(
        "penalties",
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": _prompt("pupil", 14)}],
            "max_tokens": 60,
            "temperature": 0,
            "ignore_eos": True,
            "repetition_penalty": 1.2,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.3,
            "logprobs": True,
            "top_logprobs": 2,
        },
    ),
    Shape(
        "min_tokens",
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": _prompt("judge", 10)}],
            "max_tokens": 64,
            "min_tokens": 24,
            "temperature": 0,
        },
    ),
    Shape("two choices", "/v1/completions", {"prompt": _prompt("twin", 15), "max_tokens": 40, "n": 2, **GREEDY}),
    Shape(
        "gRPC",
        "",
        {
            "text": _prompt("caller", 18),
            "sampling": {"temperature": 0, "max_tokens": 56, "ignore_eos": True, "logprobs": 2},
        },
    ),
    Shape(
        "gRPC, two choices and penalties",
        "",
        {
            "chat": {"messages": [{"role": "user", "content": _prompt("writer", 12)}]},
            "n": 2,
            "sampling": {
                "temperature": 0,
                "max_tokens": 44,
                "ignore_eos": True,
                "repetition_penalty": 1.3,
                "min_tokens": 8,
            },
        },
    ),
    Shape(
        "sampled",
        "/v1/completions",
        {
            "prompt": _prompt("poet", 16),
            "max_tokens": 60,
            "temperature": 0.9,
            "top_p": 0.9,
            "seed": 11,
            "ignore_eos": True,
            "logprobs": 2,
        },
        seeded=True,
    ),
    Shape(
        "gRPC, sampled, two choices",
        "",
        {
            "text": _prompt("gambler", 14),
            "n": 2,
            "sampling": {
                "temperature": 1.1,
                "top_k": 40,
                "seed": 5,
                "max_tokens": 50,
                "ignore_eos": True,
                "repetition_penalty": 1.1,
                "logprobs": 1,
            },
        },
        seeded=True,
    ),
]


async def ask(
    fleet: Fleet, shape: Shape, salt: str = "", stream: bool = True, silence_s: float | None = None
) -> Answer:
    """One request, by a client that does as `baton.client` does: it knows one address, and when its connection breaks,
    or is silent for `silence_s`, it goes on there with the id of its request. What went wrong is in `trouble`."""
    answer = Answer(began_s=time.monotonic())
    call = (_HttpCall if shape.path else _GrpcCall)(fleet, shape, salt, stream, silence_s, answer)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            while not answer.trouble and not await call.go_on():
                answer.breaks_s.append(time.monotonic())
                await asyncio.sleep(RETRY_S)
    except TimeoutError:
        answer.trouble = f"no end within {ANSWER_TIMEOUT_S:g} s; the last error: {call.error}"
    if not answer.trouble and (
        not answer.choices or answer.usage is None or any(choice.finish is None for choice in answer.choices.values())
    ):
        answer.trouble = "the answer broke off"
    return answer


class _Call(ABC):
    """One request over all connections that it takes."""

    def __init__(
        self, fleet: Fleet, shape: Shape, salt: str, stream: bool, silence_s: float | None, answer: Answer
    ) -> None:
        self.fleet, self.shape, self.salt, self.stream, self.answer = fleet, shape, salt, stream, answer
        self.silence_s = silence_s
        """Of streams. An answer that is not streamed shows no sign of life: its client asks for it again and again."""
        self.search_s = None if silence_s is None else SEARCH_S
        self.id = uuid.uuid4().hex
        self.error = ""
        self.known = False
        """A coordinator may have it: it is not asked again, but resumed."""
        self.unknown_since_s: float | None = None

    @abstractmethod
    async def go_on(self) -> bool:
        """Ask, or resume; whether the answer is whole now."""

    def forgotten(self) -> None:
        """Nobody knows it. It is asked again, where something has come of it a while later, and with what has come."""
        self.unknown_since_s = self.unknown_since_s or time.monotonic()
        self.known = bool(self.answer.choices) and time.monotonic() - self.unknown_since_s < FORGOTTEN_S


class _HttpCall(_Call):
    last_event_id = ""

    async def go_on(self) -> bool:
        try:
            if self.stream:
                return await self._read_stream()
            async with asyncio.timeout(self.search_s), self._begin() as response:
                if self._accepted(response.status, await response.text()):
                    _add_http(self.answer, await response.json(), arrived=False)
                    return True
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self.error = repr(error)
        return False

    def _begin(self) -> Any:
        body = dict(self.shape.body) | ({"cache_salt": self.salt} if self.salt else {})
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        headers = {"Last-Event-ID": self.last_event_id} if self.last_event_id else {}
        if not self.known:
            self.known = True
            headers |= {"X-Request-Id": self.id, "X-Baton-Resume-S": f"{KEEP_S:g}"}
            return self.fleet.http.post(self.shape.path, json=body, headers=headers)
        return self.fleet.http.get(f"/v1/{'streams' if self.stream else 'requests'}/{self.id}", headers=headers)

    def _accepted(self, status: int, text: str) -> bool:
        self.error = f"{status} {text[:300]}"
        if status == 404:
            self.forgotten()
        elif status not in (200, 409, 429, 502, 503, 504):
            self.answer.trouble = self.error
        return status == 200

    async def _read_stream(self) -> bool:
        async with contextlib.AsyncExitStack() as stack:
            async with asyncio.timeout(self.search_s if self.known else self.silence_s):
                response = await stack.enter_async_context(self._begin())
            if response.status != 200:
                return self._accepted(response.status, await response.text())
            event_id = ""
            while True:
                async with asyncio.timeout(self.silence_s):
                    line = await response.content.readline()
                if not line.endswith(b"\n"):
                    self.error = "it ended too soon"
                    return False
                name, _, value = line.partition(b": ")
                if name == b"id":
                    event_id = value.strip().decode()
                elif name == b"data" and value.strip() == b"[DONE]":
                    return True
                elif name == b"data" and b'"resumed_elsewhere"' in value:
                    self.error = "taken by somebody else"
                    return False
                elif name == b"data":
                    _add_http(self.answer, json.loads(value), arrived=True)
                    self.last_event_id, self.unknown_since_s = event_id, None


def _add_http(answer: Answer, part: dict[str, Any], arrived: bool) -> None:
    if "error" in part:
        answer.trouble = part["error"]["message"]
        return
    for piece in part["choices"]:
        choice = answer.choices.setdefault(piece["index"], Choice())
        said = piece.get("delta") or piece.get("message") or piece
        choice.text += said.get("text") or said.get("content") or ""
        choice.finish = piece["finish_reason"] or choice.finish
        if logprobs := piece.get("logprobs"):
            choice.logprobs += _http_logprobs(logprobs)
        if arrived:
            answer.arrivals_s.setdefault(piece["index"], []).append(time.monotonic())
    if usage := part.get("usage"):
        answer.usage = usage["prompt_tokens"], usage["completion_tokens"]


def _http_logprobs(logprobs: dict[str, Any]) -> list[Logprob]:
    if "content" in logprobs:
        return [
            Logprob(
                each["token"], each["logprob"], {other["token"]: other["logprob"] for other in each["top_logprobs"]}
            )
            for each in logprobs["content"]
        ]
    rows = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    return [Logprob(*row) for row in rows]


Parts = AsyncIterable[api.GenerateResponse]


class _GrpcCall(_Call):
    async def go_on(self) -> bool:
        if not self.answer.breaks_s:
            return await self._read(InferenceStub(self.fleet.channel))
        async with self.fleet.new_channel() as channel:  # the old one may lead to a coordinator without workers
            return await self._read(InferenceStub(channel))

    async def _read(self, stub: Any) -> bool:
        positions = []
        if self.answer.choices:
            choices = [self.answer.choices.get(number, Choice()) for number in range(self.shape.body.get("n", 1))]
            positions = [
                api.ChoicePosition(
                    num_tokens=len(choice.token_ids), ended=choice.finish is not None, digest=choice.digest
                )
                for choice in choices
            ]
        if self.known:
            parts: Parts = stub.Resume(api.ResumeRequest(request_id=self.id, positions=positions))
        else:
            asked = api.GenerateRequest(request_id=self.id, resume_s=KEEP_S, positions=positions)
            request = ParseDict(self.shape.body, asked)
            if self.salt:
                request.cache_salt = self.salt
            parts = stub.Generate(request)
        self.known = True
        try:
            async for part in parts:
                self.unknown_since_s = None
                _add_grpc(self.answer, part)
        except grpc.aio.AioRpcError as error:
            self.error = f"{error.code().name} {error.details()}"
            if error.code() is grpc.StatusCode.NOT_FOUND:
                self.forgotten()
            elif error.code() not in GO_ON:
                self.answer.trouble = self.error
            return False
        return True


def _add_grpc(answer: Answer, part: api.GenerateResponse) -> None:
    choice = answer.choices.setdefault(part.choice, Choice())
    if part.token_ids and part.first_index != len(choice.token_ids):
        answer.trouble = f"tokens from {part.first_index} on after {len(choice.token_ids)}"
    choice.token_ids += part.token_ids
    choice.text += part.text
    choice.digest = part.digest
    choice.logprobs += [
        Logprob(each.token_id, each.logprob, {other.token_id: other.logprob for other in each.alternatives})
        for each in part.logprobs
    ]
    if part.finish_reason:
        choice.finish = api.FinishReason.Name(part.finish_reason)
    if part.HasField("usage"):
        answer.usage = part.usage.prompt_tokens, part.usage.completion_tokens
    answer.arrivals_s.setdefault(part.choice, []).append(time.monotonic())


def differences(expected: Answer, answer: Answer, exact: bool) -> str:
    """What of an answer is not as in the undisturbed run; empty if nothing. `exact`: to the last bit of a logprob."""
    if answer.usage != expected.usage:
        return f"usage {answer.usage}, not {expected.usage}"
    if answer.choices.keys() != expected.choices.keys():
        return f"choices {sorted(answer.choices)}"
    for index, choice in answer.choices.items():
        other = expected.choices[index]
        for name in ("token_ids", "text", "finish"):
            if getattr(choice, name) != getattr(other, name):
                return f"choice {index}: {name} {getattr(choice, name)!r}, not {getattr(other, name)!r}"
        if len(choice.logprobs) != len(other.logprobs):
            return f"choice {index}: {len(choice.logprobs)} logprobs, not {len(other.logprobs)}"
        for at, (mine, theirs) in enumerate(zip(choice.logprobs, other.logprobs, strict=True)):
            near = math.isclose(mine.logprob, theirs.logprob, abs_tol=LOGPROB_TOLERANCE)
            if mine != theirs if exact else mine.token != theirs.token or not near:
                return f"choice {index}, token {at}: {mine}, not {theirs}"
    return ""


@dataclass(frozen=True)
class Undisturbed:
    """The shapes of a fleet with the answers that nothing has disturbed."""

    shapes: tuple[Shape, ...]
    answers: dict[str, Answer]
    exact: bool

    @classmethod
    async def of(cls, fleet: Fleet, deterministic: bool) -> "Undisturbed":
        """Ask everything once, one after the other."""
        shapes = [shape for shape in SHAPES if deterministic or not shape.seeded]
        answers = {shape.name: await ask(fleet, shape) for shape in shapes}
        stopping = _with_stop_string(shapes[0], answers[shapes[0].name])
        answers[stopping.name] = await ask(fleet, stopping)
        for name, answer in answers.items():
            assert not answer.trouble, f"{name}: {answer.trouble}"
        assert answers[stopping.name].choices[0].finish == "stop"
        return cls((*shapes, stopping), answers, deterministic)

    def judge(self, shape: Shape, answer: Answer) -> str:
        return differences(self.answers[shape.name], answer, self.exact)


def _with_stop_string(shape: Shape, answer: Answer) -> Shape:
    """The same request, to end in the middle of its answer at a string that does not come before."""
    text = answer.choices[0].text
    stop = next(text[at : at + 7] for at in range(len(text) // 2, len(text) - 7) if text.find(text[at : at + 7]) == at)
    return replace(shape, name="stop string", body={**shape.body, "stop": [stop]})
