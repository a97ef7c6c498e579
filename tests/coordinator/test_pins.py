"""Pinned prefixes over HTTP: what clients may ask for, what workers are told, and what is forgotten when."""

import asyncio
import logging
import time
from typing import Any

import pytest
from coordinator_harness import PREFILL, System, running, until
from fake_worker import FakeWorker

from baton.token_ids import unpack
from coordinator.pins import MAX_PINS

PREFIX = "You are a patient teacher of small children. " * 8
PATH = "/v1/cache/pins"


async def post(system: System, status: int = 200, **body: Any) -> dict[str, Any]:
    async with system.http.post(PATH, json=body) as answer:
        result = await answer.json()
        assert answer.status == status, result
        return dict(result if status == 200 else result["error"])


async def ask(system: System, method: str, id: str = "", status: int = 200, **headers: str) -> dict[str, Any]:
    async with system.http.request(method, f"{PATH}/{id}" if id else PATH, headers=headers) as answer:
        assert answer.status == status
        result = await answer.json()
        return dict(result if status == 200 else result["error"])


async def keeper(system: System, id: str = "decode-0", *roles: int, room: int = 1000, **options: Any) -> FakeWorker:
    return await system.worker(id, *roles, pinnable_blocks=room, **options)


def test_a_pin_is_told_to_every_worker_with_tiers_and_to_those_that_come_later(run) -> None:
    async def main() -> None:
        async with running() as system:
            first, without = await keeper(system), await system.worker("decode-1")
            tokens = system.encode(PREFIX)
            pin = await post(system, model="demo", prompt=PREFIX, ttl_s=60, cache_salt="mine")
            assert pin == {
                "id": pin["id"], "object": "cache.pin", "tokens": len(tokens), "blocks": len(tokens) // 16,
                "expires_at": pin["expires_at"],
            }  # fmt: skip
            assert 55 < pin["expires_at"] - time.time() <= 60
            late = await keeper(system, "prefill-0", PREFILL)
            for worker in (first, late):
                await worker.wait_for(lambda worker=worker: bool(worker.pins))
                (told,) = worker.pins.values()
                assert (unpack(told.token_ids), told.cache_salt) == (tokens, "mine")
                assert 50 < told.ttl_s <= 60
            assert await ask(system, "GET", pin["id"]) == pin
            assert await ask(system, "GET") == {"object": "list", "data": [pin]}
            assert await ask(system, "DELETE", pin["id"]) == {"id": pin["id"], "object": "cache.pin", "deleted": True}
            for worker in (first, late):
                await worker.wait_for(lambda worker=worker: not worker.pins)
            assert not without.pins
            assert (await ask(system, "GET"))["data"] == []
            for method in ("GET", "DELETE"):
                assert (await ask(system, method, pin["id"], 404))["code"] == "pin_not_found"
            events = {event: system.metric("baton_cache_pins_total", event=event) for event in ("created", "deleted")}
            assert events == {"created": 1, "deleted": 1}

    run(main())


def test_a_pinned_chat_is_the_beginning_of_every_chat_that_goes_on_from_it(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await keeper(system)
            system_message = {"role": "system", "content": PREFIX}
            await post(system, messages=[system_message])
            await worker.wait_for(lambda: bool(worker.pins))
            pinned = unpack(next(iter(worker.pins.values())).token_ids)
            messages = [system_message, {"role": "user", "content": "Why is the sky blue?"}]
            await system.openai.chat.completions.create(model="demo", messages=messages, max_tokens=1)
            asked = unpack(worker.assignments[0].token_ids)
            assert asked[: len(pinned)] == pinned
            assert len(asked) > len(pinned)

    run(main())


def test_pins_expire_by_themselves(run) -> None:
    async def main() -> None:
        async with running() as system:
            await keeper(system)
            pins, now = system.coordinator.intake.pins, [0.0]
            pins._clock = lambda: now[0]
            short, long = [await post(system, prompt=PREFIX, ttl_s=ttl_s) for ttl_s in (60, 100)]
            now[0] = 70.0
            assert (await ask(system, "GET"))["data"] == [long]
            await ask(system, "GET", short["id"], 404)
            late = await keeper(system, "decode-1")
            await late.wait_for(lambda: bool(late.pins))
            assert [(pin.id, pin.ttl_s) for pin in late.pins.values()] == [(long["id"], 30.0)]
            assert system.metric("baton_cache_pins_total", event="expired") == 1

    run(main())


def test_no_more_is_pinned_than_every_worker_with_tiers_can_keep(run) -> None:
    async def main() -> None:
        async with running() as system:
            num_blocks = len(system.encode(PREFIX)) // 16
            await keeper(system)
            await keeper(system, "decode-1", room=2 * num_blocks - 1)
            first = await post(system, prompt=PREFIX)
            error = await post(system, 422, prompt=PREFIX)
            assert (error["type"], error["code"]) == ("invalid_request_error", "cannot_pin")
            assert f"{num_blocks} blocks of 16 tokens, and pins may keep {num_blocks - 1} more" in error["message"]
            await ask(system, "DELETE", first["id"])
            await post(system, prompt=PREFIX)
            assert system.metric("baton_cache_pins_total", event="refused") == 1

    run(main())


def test_there_are_only_so_many_pins(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await keeper(system, room=1 << 30)
            for _ in range(MAX_PINS):
                await post(system, prompt=PREFIX)
            assert "delete one first" in (await post(system, 422, prompt=PREFIX))["message"]
            await worker.wait_for(lambda: len(worker.pins) == MAX_PINS)

    run(main())


def test_without_tiers_or_workers_there_is_nothing_to_pin_in(run) -> None:
    async def main() -> None:
        async with running() as system:
            await post(system, 503, prompt=PREFIX)
            await system.worker()
            assert "--host-kv-memory" in (await post(system, 422, prompt=PREFIX))["message"]

    run(main())


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": PREFIX, "messages": [{"role": "user", "content": "x"}]}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": "too short"}, 400, None),
        ({"prompt": [5, 1 << 30] * 20}, 400, "prompt"),
        ({"prompt": [5] * 3000}, 400, None),
        ({"prompt": [PREFIX]}, 400, "prompt[0]"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "nobody", "content": PREFIX}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": PREFIX}], "tools": [{}]}, 400, "tools"),
        ({"prompt": PREFIX, "ttl_s": 0}, 400, "ttl_s"),
        ({"prompt": PREFIX, "ttl_s": 1e9}, 400, "ttl_s"),
        ({"prompt": PREFIX, "ttl_s": "long"}, 400, "ttl_s"),
        ({"prompt": PREFIX, "cache_salt": ""}, 400, "cache_salt"),
        ({"prompt": PREFIX, "cache_salt": "x" * 257}, 400, "cache_salt"),
        ({"prompt": PREFIX, "ttl": 5}, 400, "ttl"),
        ({"prompt": PREFIX, "model": "another"}, 404, "model"),
    ],
)
def test_what_cannot_be_pinned_says_what_to_change(run, body: dict[str, Any], status: int, param: str | None) -> None:
    async def main() -> None:
        async with running() as system:
            await keeper(system)
            error = await post(system, status, **body)
            assert error["param"] == param
            assert PREFIX not in error["message"]
            assert not system.coordinator.intake.pins.all()

    run(main())


def test_the_list_of_pins_is_the_operators_alone(run) -> None:
    async def main() -> None:
        async with running() as system:
            await ask(system, "GET", "", 403, **{"X-Forwarded-For": "192.0.2.7"})

    run(main())


def test_neither_prefix_nor_salt_of_a_pin_is_logged(run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await keeper(system)
            await post(system, prompt=PREFIX, cache_salt="tenant-secret")
            await worker.stop()
            await until(lambda: not system.coordinator.registry.workers)
            await asyncio.sleep(0)

    with caplog.at_level(logging.DEBUG):
        run(main())
    assert PREFIX[:20] not in caplog.text
    assert "tenant-secret" not in caplog.text
