"""API keys at a whole coordinator: who gets in, how much, what others cannot see of it, and what is counted."""

import asyncio
import json
import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import openai
import pytest
from coordinator_harness import System, running, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tenant_files import SECRET, KeyFile, entry

from baton.client import AsyncClient, ClientError
from baton.v1 import inference_pb2 as api
from baton.v1 import worker_link_pb2 as wire
from coordinator.failures import RequestFailed
from coordinator.tenants.audit import verify
from coordinator.tenants.keys import new_key, parse_keys
from coordinator.tenants.tenants import POLL_S

ID = "a-request-of-this-test"
BODY = {"model": "demo", "prompt": "hello world", "max_tokens": 5}


async def ask(system: System, headers: dict[str, str], status: int = 200, **body: Any) -> dict[str, Any]:
    """A completion, or the error that came instead; with the headers of the answer."""
    async with system.http.post("/v1/completions", json=BODY | body, headers=headers) as answer:
        told = await answer.json()
        assert answer.status == status, told
        return dict(told if status == 200 else told["error"], headers=answer.headers)


async def get(system: System, path: str, headers: dict[str, str], method: str = "GET") -> tuple[int, dict[str, Any]]:
    async with system.http.request(method, path, headers=headers) as answer:
        text = await answer.text()
        return answer.status, json.loads(text) if text.startswith("{") else {}


async def raw(system: System, authorization: bytes) -> int:
    """The status of an answer to a header that no client's library would send."""
    reader, writer = await asyncio.open_connection("127.0.0.1", system.ports.http)
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: " + authorization + b"\r\n\r\n")
    line = await reader.readline()
    writer.close()
    return int(line.split()[1])


async def refused(call: Any) -> tuple[grpc.StatusCode, dict[str, str]]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call if not hasattr(call, "__aiter__") else [response async for response in call]
    return raised.value.code(), dict(raised.value.trailing_metadata() or ())


async def usage(system: System, headers: dict[str, str]) -> dict[str, Any]:
    _, told = await get(system, "/v1/usage", headers)
    (mine,) = told["data"]
    return dict(mine)


def test_without_a_good_key_nothing_but_health_answers(run, tmp_path: Path) -> None:
    async def main() -> None:
        keys = KeyFile(tmp_path / "keys.toml", acme="")
        old = new_key()
        with keys.path.open("a") as file:
            file.write(entry("acme", old, "expires = 2020-01-01T00:00:00Z"))
        async with running(keys=str(keys.path)) as system:
            await system.worker()
            for headers, says in (
                ({}, "Authorization: Bearer"),
                ({"Authorization": "Bearer"}, "Bearer, a space"),
                ({"Authorization": f"Basic {keys.keys['acme']}"}, "Bearer, a space"),
                ({"x-api-key": keys.keys["acme"]}, "Authorization: Bearer"),
                ({"Authorization": f"Bearer {new_key()}"}, "not known here"),
                ({"Authorization": "Bearer " + "x" * 5000}, "Bearer, a space"),
                ({"Authorization": f"Bearer {old}"}, "has expired"),
            ):
                error = await ask(system, headers, 401)
                assert says in error["message"]
                assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
                assert error["headers"]["WWW-Authenticate"] == "Bearer"
            assert await raw(system, b"Bearer \xe9\xff") == 401
            for path in ("/v1/models", "/version", "/v1/nothing", "/v1/cache/pins/pin-1"):
                assert (await get(system, path, {}))[0] == 401
            for path in ("/health", "/ready"):
                assert (await get(system, path, {}))[0] == 200
            request = api.GenerateRequest(text="hello", sampling=api.Sampling(max_tokens=2))
            for metadata in ((), (("authorization", "Bearer nothing"),)):
                for call in (
                    system.inference.Generate(request, metadata=metadata),
                    system.inference.ListModels(api.ListModelsRequest(), metadata=metadata),
                    system.inference.Abort(api.AbortRequest(request_id=ID), metadata=metadata),
                ):
                    assert (await refused(call))[0] is grpc.StatusCode.UNAUTHENTICATED
            health = health_pb2_grpc.HealthStub(system.channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status
            reflection = reflection_pb2_grpc.ServerReflectionStub(system.channel).ServerReflectionInfo()
            await reflection.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            assert (await reflection.read()).list_services_response.service
            await reflection.done_writing()
            unknown = system.channel.unary_unary("/baton.v1.Other/Method")(b"")
            assert (await refused(unknown))[0] is grpc.StatusCode.UNAUTHENTICATED, "closed until it is opened"
            assert not system.workers[0].assignments
            assert system.metric("baton_keys_denied_total", reason="missing") == 10
            with pytest.raises(openai.AuthenticationError):
                await system.openai.completions.create(**BODY)

            assert (await ask(system, keys.headers("acme")))["usage"]["completion_tokens"] == 5
            responses = [each async for each in system.inference.Generate(request, metadata=keys.metadata("acme"))]
            assert sum(len(each.token_ids) for each in responses) == 2
            with pytest.raises(RequestFailed, match="needed here"):
                system.coordinator.intake.check_model("")
            client = system.openai.with_options(api_key=keys.keys["acme"])
            assert (await client.models.list()).data[0].id == "demo"

    run(main())


def test_a_key_does_what_its_scopes_say(run, tmp_path: Path) -> None:
    async def main() -> None:
        keys = KeyFile(
            tmp_path / "keys.toml", plain="", pinner='scopes = ["pins"]', boss='scopes = ["operate"]',
            other='models = ["other"]',
        )  # fmt: skip
        async with running(keys=str(keys.path)) as system:
            await system.worker(pinnable_blocks=100)
            elsewhere = {"X-Forwarded-For": "192.0.2.1"}
            for path in ("/metrics", "/status"):
                assert (await get(system, path, {}))[0] == 200, "on this machine no key is needed"
                assert (await get(system, path, elsewhere))[0] == 401
                assert (await get(system, path, keys.headers("boss") | elsewhere))[0] == 200
                assert (await get(system, path, keys.headers("plain") | elsewhere))[0] == 403
            error = await ask(system, keys.headers("boss"), 403)
            assert "scope 'infer'" in error["message"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "insufficient_permissions")
            with pytest.raises(openai.PermissionDeniedError):
                await system.openai.with_options(api_key=keys.keys["boss"]).completions.create(**BODY)
            assert "may not use the model" in (await ask(system, keys.headers("other"), 403))["message"]
            pin = {"prompt": "word " * 40}
            async with system.http.post("/v1/cache/pins", json=pin, headers=keys.headers("plain")) as answer:
                assert answer.status == 403
            async with system.http.post("/v1/cache/pins", json=pin, headers=keys.headers("pinner")) as answer:
                assert answer.status == 200
            call = system.inference.GetPin(api.PinId(id="pin"), metadata=keys.metadata("plain"))
            assert (await refused(call))[0] is grpc.StatusCode.PERMISSION_DENIED
            tokenize = system.inference.Tokenize(api.TokenizeRequest(text="a"), metadata=keys.metadata("pinner"))
            assert (await refused(tokenize))[0] is grpc.StatusCode.PERMISSION_DENIED
            assert system.metric("baton_tenant_refused_total", tenant="boss", reason="forbidden") == 2

    run(main())


def test_limits_refuse_with_what_to_wait_and_are_paid_back(run, tmp_path: Path) -> None:
    async def main() -> None:
        keys = KeyFile(
            tmp_path / "keys.toml", few="requests_per_minute = 2", short="tokens_per_minute = 10",
            narrow="max_streams = 1", free="",
        )  # fmt: skip
        async with running(keys=str(keys.path)) as system:
            worker = await system.worker()
            few = keys.headers("few")
            first = (await ask(system, few))["headers"]
            assert first["x-ratelimit-limit-requests"] == "2"
            assert first["x-ratelimit-remaining-requests"] == "1"
            assert 20 < float(first["x-ratelimit-reset-requests"].rstrip("s")) <= 30
            assert "x-ratelimit-limit-tokens" not in first
            async with system.http.post("/v1/completions", json=BODY | {"stream": True}, headers=few) as answer:
                assert answer.headers["x-ratelimit-remaining-requests"] == "0"
                await answer.read()
            error = await ask(system, few, 429)
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            assert "2 requests a minute" in error["message"]
            assert 15 < int(error["headers"]["Retry-After"]) <= 30
            assert error["headers"]["x-ratelimit-remaining-requests"] == "0"
            async with system.http.post("/tokenize", json={"prompt": "a"}, headers=few) as answer:
                assert answer.status == 429, "work is counted, whatever it is"
            call = system.inference.Generate(api.GenerateRequest(text="a"), metadata=keys.metadata("few"))
            code, trailing = await refused(call)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert 15_000 < int(trailing["grpc-retry-pushback-ms"]) <= 30_000
            assert system.metric("baton_tenant_refused_total", tenant="few", reason="rate_limited") == 3
            with pytest.raises(openai.RateLimitError) as raised:
                await system.openai.with_options(api_key=keys.keys["few"]).completions.create(**BODY)
            assert raised.value.code == "rate_limit_exceeded"

            # An answer may go beyond what is left, and the next request waits until that is paid.
            short = keys.headers("short")
            prompt = len(system.encode("hello world"))
            await ask(system, short, max_tokens=20)
            error = await ask(system, short, 429)
            owed = prompt + 20 - 10
            assert (owed + 1) * 6 - 15 < int(error["headers"]["Retry-After"]) <= (owed + 1) * 6
            assert error["headers"]["x-ratelimit-remaining-tokens"] == "0"

            # While it runs, too.
            account = system.coordinator.tenants.accounts["narrow"]
            worker.pause_at = 2
            narrow = keys.headers("narrow")
            call = asyncio.create_task(ask(system, narrow))
            await until(lambda: account.num_streams == 1)
            error = await ask(system, narrow, 429)
            assert "may have 1 answers on their way" in error["message"]
            assert error["headers"]["Retry-After"] == "1"
            assert "1 may run at once" in (await ask(system, narrow, 400, n=2))["message"]
            worker.go.set()
            await call
            await ask(system, narrow)
            assert account.num_streams == 0

            for _ in range(5):
                assert not [
                    name for name in (await ask(system, keys.headers("free")))["headers"] if "ratelimit" in name
                ]

    run(main())


def test_on_one_connection_nobody_passes_for_who_asked_before(run, tmp_path: Path) -> None:
    async def main() -> None:
        limit = "requests_per_minute = 50"
        keys = KeyFile(tmp_path / "keys.toml", a=limit, b=limit)
        async with running(keys=str(keys.path)) as system:
            worker = await system.worker()
            connector = aiohttp.TCPConnector(limit=1)
            async with aiohttp.ClientSession(system.url, connector=connector) as proxy:

                async def status(headers: dict[str, str]) -> int:
                    async with proxy.post("/v1/completions", json=BODY, headers=headers) as answer:
                        await answer.read()
                        told = answer.headers.get("x-ratelimit-remaining-requests", "none")
                        assert told == {200: "49"}.get(answer.status, "none")
                        return answer.status

                assert [await status(headers) for headers in (keys.headers("a"), {}, keys.headers("b"))] == [
                    200,
                    401,
                    200,
                ]
            one, other = worker.assignments
            assert one.tenant != other.tenant

    run(main())


def test_the_client_of_this_package_sends_its_key(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        keys = KeyFile(tmp_path / "keys.toml", a="")
        async with running(keys=str(keys.path)) as system:
            worker = await system.worker()
            async with AsyncClient(system.url, api_key="sk-baton-nobody") as client:
                with pytest.raises(ClientError, match="--api-key-file, or BATON_API_KEY") as raised:
                    await client.models()
                assert "nobody" not in str(raised.value)
            monkeypatch.setenv("BATON_API_KEY", keys.keys["a"])
            async with AsyncClient(system.url) as client:
                assert await client.models() == ["demo"]
                assert (await client.status())["workers"], "on this machine itself any good key will do"
                assert [delta async for delta in client.complete("hello", max_tokens=6)]
                given_up = client.complete("hello", max_tokens=6)
                worker.pause_at = 3
                await anext(given_up)
                await given_up.aclose()  # it says so to the coordinator, with the key
            told = await usage(system, keys.headers("a"))
            assert told["requests"] == {"completed": 1, "aborted": 1}
            assert 6 < told["output_tokens"] <= 9

    run(main())


def test_what_is_not_taken_in_the_end_is_not_charged(run, tmp_path: Path) -> None:
    async def main() -> None:
        keys = KeyFile(tmp_path / "keys.toml", acme="requests_per_minute = 9\ntokens_per_minute = 900")
        async with running(keys=str(keys.path), max_requests=1) as system:
            worker = await system.worker()
            account, headers = system.coordinator.tenants.accounts["acme"], keys.headers("acme")
            taken: list[float] = []
            account.requests.take = lambda amount, now_s: taken.append(amount)
            await ask(system, headers, 400, temperature=-1)
            worker.pause_at = 1
            one, other = (asyncio.create_task(get_status(system, headers)) for _ in range(2))
            await until(lambda: one.done() or other.done())
            assert sum(taken) == 1
            worker.go.set()
            assert sorted([await one, await other]) == [200, 429]
            assert (await usage(system, headers))["requests"] == {"completed": 1}
            assert account.running == {}

    async def get_status(system: System, headers: dict[str, str]) -> int:
        async with system.http.post("/v1/completions", json=BODY, headers=headers) as answer:
            await answer.read()
            return answer.status

    run(main())


def test_workers_are_told_whose_a_request_is_at_every_attempt(run, tmp_path: Path) -> None:
    async def main() -> None:
        keys = KeyFile(tmp_path / "keys.toml", acme="weight = 2.5\npriority = 7\nkv_share = 0.25", plain="")
        async with running(keys=str(keys.path)) as system:
            first, second = await system.worker("decode-0"), await system.worker("decode-1")
            first.fail_at = second.fail_at = 3
            first.heals = second.heals = True
            await ask(system, keys.headers("acme"))
            await ask(system, keys.headers("plain"))
            told = [*first.assignments, *second.assignments]
            mine = [each for each in told if each.priority]
            assert {each.id.attempt for each in mine} == {1, 2}
            assert {(each.weight, each.priority, each.kv_share) for each in mine} == {(2.5, 7, 0.25)}
            others = [each for each in told if not each.priority]
            assert {(each.weight, each.kv_share) for each in others} == {(1.0, 0.0)}
            assert len({each.tenant for each in mine}) == len({each.tenant for each in others}) == 1
            assert mine[0].tenant != others[0].tenant
            assert "acme" not in mine[0].tenant
            assert mine[0].tenant == parse_keys(keys.path.read_text()).secret.opaque("acme"), "the same everywhere"

    run(main())


def test_tenants_share_no_cached_kv_unless_they_say_so(run, tmp_path: Path) -> None:
    async def main() -> None:
        group = 'cache_group = "family"'
        keys = KeyFile(tmp_path / "keys.toml", a="", b="", c=group, d=group)
        async with running(keys=str(keys.path)) as system:
            worker = await system.worker()

            async def salt(tenant: str, **body: Any) -> str:
                await ask(system, keys.headers(tenant), **body)
                return worker.assignments[-1].cache_salt

            plain = {tenant: await salt(tenant) for tenant in "abcd"}
            salted = {tenant: await salt(tenant, cache_salt="s") for tenant in "abcd"}
            assert plain["c"] == plain["d"]
            assert salted["c"] == salted["d"]
            assert len({*plain.values(), *salted.values()}) == 6, "what a client gives is mixed in"
            assert await salt("a", cache_salt="s") == salted["a"]
            assert await salt("b", cache_salt=plain["a"]) != plain["a"], "nobody can ask for another's"

    run(main())


def test_pins_belong_to_their_tenant(run, tmp_path: Path) -> None:
    async def main() -> None:
        pins = 'scopes = ["infer", "pins"]'
        keys = KeyFile(tmp_path / "keys.toml", a=pins, b=pins, boss='scopes = ["operate", "pins"]')
        async with running(keys=str(keys.path)) as system:
            worker = await system.worker(pinnable_blocks=100)
            prompt = "word " * 40
            path = "/v1/cache/pins"
            async with system.http.post(path, json={"prompt": prompt}, headers=keys.headers("a")) as answer:
                id = (await answer.json())["id"]
            await worker.wait_for(lambda: bool(worker.pins))
            await ask(system, keys.headers("a"), prompt=prompt)
            assert worker.pins[id].cache_salt == worker.assignments[-1].cache_salt
            for method in ("GET", "DELETE"):
                assert (await get(system, f"{path}/{id}", keys.headers("b"), method))[0] == 404
            call = system.inference.DeletePin(api.PinId(id=id), metadata=keys.metadata("b"))
            assert (await refused(call))[0] is grpc.StatusCode.NOT_FOUND
            for tenant, number in (("a", 1), ("b", 0), ("boss", 1)):
                assert len((await get(system, path, keys.headers(tenant)))[1]["data"]) == number
            assert (await get(system, f"{path}/{id}", keys.headers("a"), "DELETE"))[0] == 200

    run(main())


def test_who_knows_the_id_of_another_tenants_request_can_do_nothing_with_it(run, tmp_path: Path) -> None:
    async def main() -> None:
        keys = KeyFile(tmp_path / "keys.toml", a="", b="")
        async with running(keys=str(keys.path), heartbeat_timeout_s=0.5) as system:
            worker = await system.worker()
            worker.pause_at = 2
            mine = keys.headers("a") | {"X-Request-Id": ID, "X-Baton-Resume-S": "9"}
            call = asyncio.create_task(ask(system, mine))
            await until(lambda: ID in system.coordinator.dispatcher.requests)
            for path in (f"/v1/streams/{ID}", f"/v1/requests/{ID}"):
                assert (await get(system, path, keys.headers("b")))[0] == 404
            resume = system.inference.Resume(api.ResumeRequest(request_id=ID), metadata=keys.metadata("b"))
            assert (await refused(resume))[0] is grpc.StatusCode.NOT_FOUND
            assert (await get(system, f"/v1/requests/{ID}", keys.headers("b"), "DELETE"))[0] == 200, "as for any id"
            await system.inference.Abort(api.AbortRequest(request_id=ID), metadata=keys.metadata("b"))
            assert (await ask(system, keys.headers("b") | {"X-Request-Id": ID}, 409))["code"] == "request_id_in_use"
            assert worker.claims == []
            worker.go.set()
            assert (await call)["usage"]["completion_tokens"] == 5

    run(main())


def test_at_another_coordinator_only_its_tenant_goes_on_with_a_request(run, tmp_path: Path) -> None:
    async def main() -> None:
        keys = KeyFile(tmp_path / "keys.toml", a="weight = 3.0", b="")
        options = {"keys": str(keys.path), "heartbeat_timeout_s": 0.8}
        async with running(**options) as old, running(**options) as new, running(heartbeat_timeout_s=0.8) as bare:
            first, second, third = await old.worker(), await new.worker(), await bare.worker()
            whole = await ask(old, keys.headers("a") | {"X-Request-Id": ID})
            (assignment,) = first.assignments
            await second.report(assignment, num_tokens=2)
            await until(lambda: new.metric("baton_orphans_total", event="reported") == 1)
            for path in (f"/v1/streams/{ID}", f"/v1/requests/{ID}"):
                assert (await get(new, path, keys.headers("b")))[0] == 404
            assert (await get(new, f"/v1/requests/{ID}", keys.headers("b"), "DELETE"))[0] == 200
            assert not second.aborts
            # A coordinator that asks for no keys has nothing for a tenant's request.
            await third.report(wire.Assignment.FromString(assignment.SerializeToString()))
            assert (await get(bare, f"/v1/requests/{ID}", {}))[0] == 404

            second.lie_at = None
            second.pause_at = 4
            call = asyncio.create_task(get(new, f"/v1/requests/{ID}", keys.headers("a")))
            await second.wait_for(lambda: bool(second.adopted))
            fourth = await new.worker("decode-1")
            await second.stop()
            status, resumed = await call
            assert status == 200
            assert resumed["choices"] == whole["choices"]
            (again,) = fourth.assignments
            assert (again.weight, again.tenant, again.cache_salt) == (3.0, assignment.tenant, assignment.cache_salt)
            assert (await usage(new, keys.headers("a")))["output_tokens"] == 5
            status, _ = await get(new, "/v1/requests/another-id-of-this-test", keys.headers("a"))
            assert status == 404
            await until(lambda: bool(fourth.claims))

    run(main())


def test_a_claim_says_whose_the_client_is(run, tmp_path: Path) -> None:
    async def main() -> None:
        keys = KeyFile(tmp_path / "keys.toml", a="")
        async with running(keys=str(keys.path), heartbeat_timeout_s=0.5) as system:
            await system.worker()
            sent: list[wire.CoordinatorMessage] = []
            real = system.coordinator.registry.workers["decode-0"]
            tell = real.send
            real.send = lambda message: (sent.append(message), tell(message))[1]
            await get(system, f"/v1/requests/{ID}", keys.headers("a"))
            claims = [message.claim for message in sent if message.HasField("claim")]
            tenant = parse_keys(keys.path.read_text()).secret.opaque("a")
            assert claims == [wire.Claim(request_id=ID, tenant=tenant)]

    run(main())


def test_usage_is_what_clients_got_whatever_happened_on_the_way(run, tmp_path: Path) -> None:
    async def main() -> None:
        prices = "price_input = 2.5\nprice_cached = 0.25\nprice_output = 10"
        keys = KeyFile(tmp_path / "keys.toml", acme=prices, other="", boss='scopes = ["operate"]')
        audit_log = tmp_path / "audit.jsonl"
        async with running(keys=str(keys.path), audit_log=str(audit_log)) as system:
            headers = keys.headers("acme")
            workers = [await system.worker(f"decode-{number}") for number in range(3)]
            for index, worker in enumerate(workers):  # attempts fail, and others repeat nothing
                worker.fail_at, worker.heals, worker.repeat = index + 1, True, 2
            got = [(await ask(system, headers, n=at % 2 + 1, max_tokens=4 + at))["usage"] for at in range(6)]
            stream = BODY | {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 9}
            async with system.http.post("/v1/completions", json=stream, headers=headers) as answer:
                events = [line for line in (await answer.text()).split("\n") if line.startswith("data: {")]
            got.append(json.loads(events[-1].removeprefix("data: "))["usage"])
            request = api.GenerateRequest(text="hello world", sampling=api.Sampling(max_tokens=3))
            last = [each async for each in system.inference.Generate(request, metadata=keys.metadata("acme"))][-1]
            got.append({"prompt_tokens": last.usage.prompt_tokens, "completion_tokens": last.usage.completion_tokens})
            # One that its client gives up gets what came until then.
            for worker in workers:
                worker.fail_at, worker.pause_at, worker.heals = None, 4, False
            aborted = keys.headers("acme") | {"X-Request-Id": ID}
            async with system.http.post("/v1/completions", json=stream, headers=aborted) as answer:
                tokens_of = system.coordinator.dispatcher.requests[ID]
                await until(lambda: tokens_of.output_tokens == 4)
                await get(system, f"/v1/requests/{ID}", headers, "DELETE")
                events = [line for line in (await answer.text()).split("\n") if line.startswith("data: {")]
            got.append(json.loads(events[-1].removeprefix("data: "))["usage"])
            assert got[-1]["completion_tokens"] == 4

            told = await usage(system, headers)
            assert told["input_tokens"] == sum(each["prompt_tokens"] for each in got)
            assert told["output_tokens"] == sum(each["completion_tokens"] for each in got)
            assert told["requests"] == {"completed": 8, "aborted": 1}
            cached = told["cached_tokens"]
            exact = (told["input_tokens"] - cached) * Decimal("2.5") + cached * Decimal("0.25")
            assert Decimal(str(told["cost"])) == (exact + told["output_tokens"] * 10) / 1_000_000
            for kind in ("input", "cached", "output"):
                counted = system.metric("baton_tenant_tokens_total", tenant="acme", kind=kind)
                assert counted == told[f"{kind}_tokens"]
            assert (await usage(system, keys.headers("other")))["output_tokens"] == 0
            assert len((await get(system, "/v1/usage", keys.headers("boss")))[1]["data"]) == 3
            assert len((await get(system, "/v1/usage", {}))[1]["data"]) == 3, "on this machine itself"
            assert (await get(system, "/v1/usage", {"Forwarded": "for=192.0.2.1"}))[0] == 401
        lines = [json.loads(line) for line in audit_log.read_text().splitlines()][1:]
        assert sum(line["input"] for line in lines) == told["input_tokens"]
        assert sum(line["output"] for line in lines) == told["output_tokens"]
        assert [line["outcome"] for line in lines] == ["completed"] * 8 + ["aborted"]
        assert {(line["tenant"], line["model"]) for line in lines} == {("acme", "demo")}
        assert lines[-1]["request"] == ID
        assert len({line["prompts"][0] for line in lines}) == 1, "they asked the same"
        assert "hello" not in audit_log.read_text()
        assert verify([audit_log], parse_keys(keys.path.read_text()).secret) == (10, [])

    run(main())


def test_what_another_coordinator_goes_on_with_is_counted_there(run, tmp_path: Path) -> None:
    async def main() -> None:
        keys = KeyFile(tmp_path / "keys.toml", a="")
        async with running(keys=str(keys.path)) as system:
            worker = await system.worker()
            worker.pause_at = 3
            call = asyncio.create_task(ask(system, keys.headers("a")))
            account = system.coordinator.tenants.accounts["a"]
            await until(lambda: any(request.output_tokens == 3 for request in account.running))
            system.coordinator.dispatcher.let_go()
            with pytest.raises(aiohttp.ClientError):
                await call
            assert dict(account.usage.requests) == {"handed_on": 1}
            assert (account.usage.output_tokens, account.num_streams) == (0, 0)

    run(main())


def test_a_changed_file_counts_at_once_and_a_broken_one_changes_nothing(
    run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def main() -> None:
        keys = KeyFile(tmp_path / "keys.toml", acme="", gone="")
        good, more = keys.path.read_text(), new_key()
        async with running(keys=str(keys.path)) as system:
            worker = await system.worker()
            worker.pause_at = 2
            running_on = asyncio.create_task(ask(system, keys.headers("acme")))
            ended = asyncio.create_task(ask(system, keys.headers("gone"), 403))
            await until(lambda: len(worker.assignments) == 2)

            keys.write_text(good + '[[keys]]\ntenant = "acme"\nhash = "' + more + '"')
            await until(lambda: system.metric("baton_keys_file_errors_total") == 1)
            keys.path.chmod(0o644)
            await until(lambda: system.metric("baton_keys_file_errors_total") == 2)
            assert (await get(system, "/v1/models", keys.headers("gone")))[0] == 200, "the old one is in force"

            revoked = keys.headers("acme")
            keys.tenants = {"acme": "max_streams = 1"}
            keys.keys = {"acme": more}
            keys.write()
            assert 3 * POLL_S < 1, "promised within a second; a busy machine takes longer for everything"
            async with asyncio.timeout(5.0):
                while (await get(system, "/v1/models", revoked))[0] != 401:
                    await asyncio.sleep(0.01)
            assert "was removed" in (await ended)["message"], "with its tenant, what runs ends as well"
            assert (await ask(system, keys.headers("acme"), 429))["code"] == "rate_limit_exceeded"
            worker.go.set()
            assert (await running_on)["usage"]["completion_tokens"] == 5, "what a revoked key began goes on"
            assert (await usage(system, keys.headers("acme")))["requests"] == {"completed": 1}
            assert system.metric("baton_tenant_requests_total", tenant="gone", outcome="revoked") == 1
        for secret in (more, revoked["Authorization"], "0123456789abcdef0123456789abcdef"):
            assert secret not in caplog.text

    run(main())


def test_what_waits_for_the_tokenizer_when_its_tenant_is_removed_is_not_begun(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        keys = KeyFile(tmp_path / "keys.toml", acme="")
        async with running(keys=str(keys.path)) as system:
            worker = await system.worker()
            tokenizer, here, go = system.coordinator.intake.tokenizer, asyncio.Event(), asyncio.Event()
            encode = tokenizer.encode

            async def slowly(*words: Any) -> list[int]:
                here.set()
                await go.wait()
                return await encode(*words)

            monkeypatch.setattr(tokenizer, "encode", slowly)
            call = asyncio.create_task(ask(system, keys.headers("acme"), 403))
            await here.wait()
            keys.write_text(SECRET)
            await until(lambda: system.coordinator.tenants.accounts["acme"].removed)
            go.set()
            assert "was removed" in (await call)["message"]
            assert not worker.assignments

    run(main())


def test_copies_for_shadow_versions_are_nobodys_and_cost_nothing(run, tmp_path: Path) -> None:
    async def main() -> None:
        keys = KeyFile(tmp_path / "keys.toml", acme="")
        rollout = tmp_path / "rollout.toml"
        rollout.write_text("[weights]\nv = 1\n[shadow]\nw = 1.0")
        async with running(keys=str(keys.path), rollout=str(rollout)) as system:
            await system.worker()
            shadow = await system.worker("decode-1", model_version="w")
            await ask(system, keys.headers("acme"))
            await until(lambda: system.metric("baton_shadows_total", event="started") == 1)
            await until(lambda: not system.coordinator.dispatcher.requests)
            assert shadow.assignments[0].tenant == ""
            told = await usage(system, keys.headers("acme"))
            assert (told["requests"], told["output_tokens"]) == ({"completed": 1}, 5)

    run(main())


def test_without_keys_everything_is_as_before(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker()
            told = await ask(system, {"Authorization": "Bearer whatever"}, cache_salt="mine")
            assert not [name for name in told["headers"] if "ratelimit" in name]
            (assignment,) = worker.assignments
            assert (assignment.cache_salt, assignment.tenant, assignment.weight) == ("mine", "", 0.0)
            assert (await get(system, "/v1/usage", {}))[0] == 404

    run(main())
