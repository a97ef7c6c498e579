"""Logs as JSON: a request can be followed by its id, and no log has a word of what it said."""

import io
import json
import logging
import os
from typing import Any

import pytest
from coordinator_harness import DECODE, System, running

from baton.log_format import LOG_FORMAT_VARIABLE, JsonLines, TextLines, log_format
from baton.v1 import inference_pb2 as api

ID = "a-request-that-is-logged"
SECRET = "xylophone-quokka"


class Captured:
    """What everything logs, as JSON and as text."""

    def __init__(self) -> None:
        self.handlers = [logging.StreamHandler(io.StringIO()) for _ in range(2)]
        self.handlers[0].setFormatter(JsonLines("test"))
        self.handlers[1].setFormatter(logging.Formatter("%(message)s"))

    def __enter__(self) -> "Captured":
        root = logging.getLogger()
        self._level = root.level
        root.setLevel(logging.DEBUG)
        for handler in self.handlers:
            root.addHandler(handler)
        return self

    def __exit__(self, *exc: object) -> None:
        root = logging.getLogger()
        root.setLevel(self._level)
        for handler in self.handlers:
            root.removeHandler(handler)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.handlers[0].stream.getvalue().splitlines()]

    @property
    def everything(self) -> str:
        return "".join(handler.stream.getvalue() for handler in self.handlers)


async def post(system: System, path: str, status: int, body: object, id: str = "") -> None:
    headers = {"X-Request-Id": id} if id else {}
    async with system.http.post(path, json=body, headers=headers) as response:
        await response.read()
        assert response.status == status


def test_a_request_is_followed_by_its_id_and_no_text_is_logged(run) -> None:
    async def check() -> None:
        async with running() as system:
            for id in ("decode-0", "decode-1"):
                worker = await system.worker(id, DECODE)
                worker.fail_at, worker.heals = 2, True
            chat = [{"role": "user", "content": SECRET}]
            await post(system, "/v1/completions", 200, {"model": "demo", "prompt": SECRET, "max_tokens": 5}, ID)
            await post(system, "/v1/chat/completions", 200, {"model": "demo", "messages": chat, "max_tokens": 5})
            await post(system, "/v1/completions", 400, {"model": "demo", "prompt": SECRET, "temperature": SECRET})
            await post(system, "/v1/completions", 400, {"model": "demo", "prompt": SECRET, "max_tokens": 10**6})
            await post(system, "/tokenize", 200, {"model": "demo", "prompt": SECRET})
            await post(system, "/v1/completions", 400, [SECRET])
            calls = system.inference.Generate(api.GenerateRequest(text=SECRET, request_id=f"{ID}-grpc"))
            assert [each async for each in calls]

    with Captured() as captured:
        run(check())
    assert SECRET not in captured.everything
    own = [line for line in captured.lines if line.get("request_id") == ID]
    abandoned = next(line for line in own if "cause" in line)
    assert (abandoned["attempt"], abandoned["cause"], abandoned["level"]) == (1, "ended", "warning")
    assert abandoned["worker"] in ("decode-0", "decode-1")
    access = next(line for line in own if line["part"] == "baton.access")
    assert (access["status"], access["method"], access["path"]) == (200, "POST", "/v1/completions")
    assert access["completion_tokens"] == 5
    assert 0 < access["first_token_s"] <= access["duration_s"]
    assert any(line.get("request_id") == f"{ID}-grpc" and line.get("status") == "OK" for line in captured.lines)
    assert all({"time", "level", "process", "part", "message"} <= line.keys() for line in captured.lines)


def test_the_message_of_an_exception_is_left_out_because_it_may_quote_a_prompt() -> None:
    with Captured() as captured:
        try:
            raise ValueError(SECRET)
        except ValueError:
            logging.getLogger("baton.test").error("something failed", exc_info=True)
    line = next(line for line in captured.lines if line["part"] == "baton.test")
    assert line["exception"] == "ValueError"
    assert "test_logs.py" in line["stack"]
    assert SECRET not in json.dumps(line)


@pytest.mark.parametrize(("value", "kind"), [("json", JsonLines), ("text", TextLines), ("", TextLines)])
def test_the_environment_says_how_lines_look(monkeypatch, value: str, kind: type) -> None:
    monkeypatch.setitem(os.environ, LOG_FORMAT_VARIABLE, value)
    assert type(log_format("worker-7")) is kind


def test_times_of_text_are_written_as_logging_writes_them() -> None:
    ours, theirs = TextLines("%(asctime)s"), logging.Formatter("%(asctime)s")
    for at in (
        1.0,
        1.9999,
        2.0,
        1_763_800_000.1235,
        1_763_800_000.9,
        1_763_800_001.0,
        1.5,
    ):  # back, too
        record = logging.makeLogRecord({"created": at, "msecs": at % 1 * 1e3})
        assert ours.format(record) == theirs.format(record)
