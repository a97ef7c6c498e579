"""`baton trace` and the endpoint behind it: who sees what of which request."""

import asyncio
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from coordinator_harness import DECODE, PREFILL, System, running
from tenant_files import KeyFile
from yarl import URL

from cli.main import parse
from cli.trace import run as trace_command
from cli.trace import waterfall

ID = "a-request-that-is-traced"
SECRET_WORD = "aardvark"

TRACE: dict[str, Any] = {
    "id": ID, "outcome": "completed", "model": "demo", "version": "v", "prompt_tokens": 400, "completion_tokens": 9,
    "first_token_s": 0.4, "total_s": 1.0,
    "spans": [
        {"name": "admission", "start_s": 0.0, "end_s": 0.01},
        {"name": "queue", "start_s": 0.01, "end_s": 0.1, "worker": "prefill-0", "choice": 0, "attempt": 1},
        {"name": "prefill", "start_s": 0.1, "end_s": 0.4, "worker": "prefill-0", "choice": 0, "attempt": 1,
         "cached_tokens": 16},
        {"name": "handover", "start_s": 0.2, "end_s": 0.6, "worker": "decode-0", "choice": 0, "attempt": 1,
         "wire_s": 0.1, "wait_s": 0.3, "bytes": 3 << 19, "lane": "shm", "cause": "worker_lost"},
        {"name": "decode", "start_s": 0.7, "end_s": 1.0, "worker": "decode-1", "choice": 0, "attempt": 2},
    ],
}  # fmt: skip


def test_a_waterfall_has_its_bars_where_things_happened() -> None:
    lines = list(waterfall(TRACE, 120, plain=True))
    assert max(len(line) for line in lines if "given up" not in line) <= 120
    assert lines[1] == ("demo v, prompt 400 tokens, completion 9 tokens, first token 400.0 ms, in all 1.00 s")
    rows = {line.split()[0]: line for line in lines[2:] if not line.startswith("choice")}
    begins = [rows[name].index(mark) for name, mark in (
        ("admission", "#"), ("queue", "--"), ("prefill", "##"), ("decode", "##"))]  # fmt: skip
    assert begins == sorted(begins)
    assert rows["prefill"].endswith("300.0 ms  16 tokens cached")
    assert rows["handover"].endswith("wire 100.0 ms, wait 300.0 ms, 1.5 MiB shm, given up: worker lost")
    bar = rows["handover"].split("decode-0")[1].split()[0]
    assert bar == bar.count("-") * "-" + bar.count("#") * "#"
    assert abs(bar.count("#") / len(bar) - 0.25) < 0.1
    assert "choice 0, attempt 2" in lines


def test_a_request_that_has_just_come_has_a_waterfall() -> None:
    bare = TRACE | {"spans": TRACE["spans"][:1], "total_s": 0.0, "first_token_s": None, "completion_tokens": None}
    assert len(list(waterfall(bare, 40))) == 3


async def ask(system: System, id: str, headers: dict[str, str] | None = None) -> None:
    body = {"model": "demo", "prompt": f"{SECRET_WORD} " * 60, "max_tokens": 4}
    headers = {"X-Request-Id": id, **(headers or {})}
    async with system.http.post("/v1/completions", json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        await response.read()


async def trace(system: System, id: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    async with system.http.get(f"/v1/requests/{id}/trace", headers=headers) as response:
        return response.status, await response.text()


def command(url: str, *more: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert trace_command(parse(["trace", ID, "--url", url, *more])) == 0
    return out.getvalue()


def test_the_command_shows_a_request_of_whichever_coordinator_had_it(run) -> None:
    async def check() -> None:
        async with running() as other, running() as system:
            await system.worker("prefill-0", PREFILL)
            await system.worker("decode-0", DECODE)
            await ask(system, ID)
            urls = f"{other.url},{system.url}"
            shown = await asyncio.to_thread(command, urls)
            assert ID in shown
            assert "prefill-0" in shown
            told = json.loads(await asyncio.to_thread(command, urls, "--json"))
            assert told["outcome"] == "completed"
            assert SECRET_WORD not in json.dumps(told)

    run(check())


def test_only_this_machine_sees_traces_where_there_are_no_keys(run) -> None:
    async def check() -> None:
        async with running() as system:
            await system.worker()
            await ask(system, ID)
            assert (await trace(system, ID))[0] == 200
            assert (await trace(system, ID, {"X-Forwarded-For": "10.1.2.3"}))[0] == 403
            status, text = await trace(system, "nobody-ever-asked-this")
            assert status == 404
            assert "request_not_found" in text

    run(check())


def test_tenants_see_their_own_requests_without_names_of_workers_and_operators_see_all(run, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.toml", one="", two="", boss='scopes = ["operate"]')

    async def check() -> None:
        async with running(keys=str(keys.path)) as system:
            await system.worker("decode-0")
            await ask(system, ID, keys.headers("one"))
            status, text = await trace(system, ID, keys.headers("one"))
            assert status == 200
            assert "decode-0" not in text
            assert "worker 1" in text
            assert (await trace(system, ID, keys.headers("two")))[0] == 404
            status, text = await trace(system, ID, keys.headers("boss"))
            assert status == 200
            assert "decode-0" in text
            assert (await trace(system, ID))[0] == 200  # on the machine itself
            assert (await trace(system, ID, {"X-Forwarded-For": "10.1.2.3"}))[0] == 401
            for path in ("/v1/requests/trace", "/v1/requests/a%2Ftrace", f"/v1/requests/{ID}"):
                async with system.http.get(URL(path, encoded=True)) as response:
                    assert response.status == 401, "only traces need no key here"
            async with system.http.delete(f"/v1/requests/{ID}/trace") as response:
                assert response.status in (401, 405)

    run(check())


@pytest.mark.parametrize("id", ["..%2Fstatus", "%00", "a" * 300])
def test_ids_that_cannot_be_are_not_found(run, id: str) -> None:
    async def check() -> None:
        async with running() as system:
            assert (await trace(system, id))[0] == 404

    run(check())
