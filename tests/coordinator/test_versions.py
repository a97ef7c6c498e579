"""Versions of one model side by side: which one serves a request, and that a request never leaves it."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from coordinator_harness import DECODE, DEMO_FOLDER, PREFILL, System, running, until
from fake_worker import FakeWorker, Refused, token_at

import baton
from baton.model_folder import tokenizer_fingerprint
from baton.token_ids import unpack
from coordinator import watched_file
from coordinator.rollout import Rollout
from coordinator.shadows import first_difference

LONG = "count the words of this " * 40
NEW: dict[str, Any] = {"model_version": "new", "model_fingerprint": "g"}


def new_token_at(prompt: Any, index: int) -> int:
    return token_at(prompt, index) + 1


async def new_worker(system: System, id: str = "new-0", *roles: int, **options: Any) -> FakeWorker:
    return await system.worker(id, *roles, **(NEW | {"token_at": new_token_at, "started_unix_s": 2.0} | options))


async def ask(system: System, prompt: str = "hello", max_tokens: int = 4, **options: Any) -> dict[str, Any]:
    headers = {"X-Request-Id": options.pop("id")} if "id" in options else {}
    body = {"prompt": prompt, "max_tokens": max_tokens, **options}
    async with system.http.post("/v1/completions", json=body, headers=headers) as response:
        answer: dict[str, Any] = await response.json()
        return answer


def text(system: System, version: str, count: int, prompt: str = "hello") -> str:
    tokens = {"v": token_at, "new": new_token_at}[version]
    ids = system.encode(prompt)
    return system.decode([tokens(ids, index) for index in range(count)])


def roll_out(system: System, weights: dict[str, float], **shadow: float) -> Rollout:
    said = Rollout(weights, shadow)
    system.coordinator._roll_out(said)
    return said


def tokens_of(system: System) -> list[int]:
    return [len(choice.stream.tokens) for request in system.coordinator.dispatcher.requests.values()
            for choice in request.choices]  # fmt: skip


# Which workers may be here


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"protocol_version": 2, "software_version": "9.9"}, r"baton 9\.9.*speaks 1; upgrade coordinators first"),
        ({"protocol_version": 0}, "upgrade this worker"),
        ({"model_version": "v", "model_fingerprint": "g"}, "version v: model_fingerprint is g"),
        ({"model_version": "not a label"}, "model_version has 'not a label'"),
        ({"model_version": "new", "tokenizer_fingerprint": "other"}, "its tokenizer differs"),
    ],
)
def test_a_worker_that_does_not_fit_is_refused_with_the_reason(run, changes: dict[str, Any], says: str) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker()
            with pytest.raises(Refused, match=says):
                await FakeWorker(system.ports.link, "other", [PREFILL], **changes).start()

    run(main())


def test_another_version_and_other_software_are_welcome_beside_what_is_here(run) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker(software_version="0.0.9", tokenizer_fingerprint="")
            own = tokenizer_fingerprint(DEMO_FOLDER)
            await new_worker(system, software_version="7.0", tokenizer_fingerprint=own)
            async with system.http.get("/status") as response:
                status = await response.json()
            rows = {row["id"]: (row["model_version"], row["software"]) for row in status["workers"]}
            assert rows == {"decode-0": ("v", "0.0.9"), "new-0": ("new", "7.0")}
            assert [row["version"] for row in status["versions"]] == ["new", "v"]
            assert system.metric("baton_worker_info", worker="new-0", version="new", software="7.0") == 1
            assert status["version"] == baton.__version__

    run(main())


def test_a_worker_without_a_label_gets_one_from_its_weights(run) -> None:
    async def main() -> None:
        async with running() as system:
            fingerprints = {"model_fingerprint": "m" * 32, "weights_fingerprint": "w" * 32}
            await system.worker("one", model_version="", **fingerprints)
            assert system.coordinator.registry.workers["one"].version == "w" * 12
            other = {**fingerprints, "model_fingerprint": "n" * 32, "model_version": "w" * 12}
            with pytest.raises(Refused, match="model_fingerprint"):
                await FakeWorker(system.ports.link, "two", [DECODE], **other).start()

    run(main())


def test_a_tokenizer_is_what_its_file_says_and_not_how_it_is_written(tmp_path: Path) -> None:
    content = json.loads((DEMO_FOLDER / "tokenizer.json").read_bytes())
    own = tokenizer_fingerprint(DEMO_FOLDER)
    for name, change, same in (
        ("spaces", {}, True),
        ("cut", {"truncation": {"max_length": 5}}, True),
        ("added", {"added_tokens": []}, False),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps({**content, **change}, indent=3))
        assert (tokenizer_fingerprint(folder) == own) is same
    assert tokenizer_fingerprint(tmp_path) == ""


# Which version serves


def test_without_a_file_the_oldest_version_serves_everything_until_it_is_gone(run) -> None:
    async def main() -> None:
        async with running() as system:
            await new_worker(system)
            old = await system.worker(started_unix_s=1.0)
            await new_worker(system, "new-1", started_unix_s=3.0)
            assert {(await ask(system))["system_fingerprint"] for _ in range(8)} == {"v"}, "or what was asked first"
            again = await system.worker("decode-1", started_unix_s=9.0)
            await old.stop()
            await until(lambda: "decode-0" not in system.coordinator.registry.workers)
            assert (await ask(system))["system_fingerprint"] == "v", "also when its first worker was started anew"
            await again.stop()
            await until(lambda: "decode-1" not in system.coordinator.registry.workers)
            answer = await ask(system)
            assert (answer["system_fingerprint"], answer["choices"][0]["text"]) == ("new", text(system, "new", 4))
            await system.worker("decode-2", started_unix_s=11.0)
            assert (await ask(system))["system_fingerprint"] == "v", "nobody has given the new one traffic"

    run(main())


def test_weights_decide_and_the_answer_is_wholly_of_the_version_that_it_names(run) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker()
            await new_worker(system)
            said = roll_out(system, {"v": 3.0, "new": 1.0})
            for number in range(40):
                id = f"a-request-of-this-test-{number}"
                answer = await ask(system, id=id, n=2, temperature=0)
                version = said.pick(id, said.weights)
                assert answer["system_fingerprint"] == version
                assert {choice["text"] for choice in answer["choices"]} == {text(system, version, 4)}
            versions = {(await ask(system, user="somebody"))["system_fingerprint"] for _ in range(6)}
            assert versions == {said.pick("somebody", said.weights)}
            served = sum(
                system.metric("baton_version_requests_total", version=version, traffic="clients", outcome="completed")
                for version in ("v", "new")
            )
            assert served == 46

    run(main())


def test_a_weighted_version_that_is_not_there_leaves_its_share_to_the_others_and_a_forbidden_one_gets_none(run) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker()
            roll_out(system, {"v": 1.0, "new": 9.0})
            assert {(await ask(system))["system_fingerprint"] for _ in range(10)} == {"v"}
            assert system.metric("baton_version_absent_total", version="new") > 0
            roll_out(system, {"new": 9.0})
            assert (await ask(system))["system_fingerprint"] == "v", "nobody said never"
            roll_out(system, {"new": 9.0, "v": 0.0})
            assert (await ask(system))["error"]["code"] == "unavailable"
            async with system.http.get("/ready") as response:
                assert response.status == 503
            await new_worker(system)
            assert (await ask(system))["system_fingerprint"] == "new"

    run(main())


def test_the_file_is_followed_while_it_runs(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_file, "POLL_S", 0.01)
    path = tmp_path / "rollout.toml"
    path.write_text("[weights]\nv = 1\nnew = 0\n")

    async def main() -> None:
        async with running(rollout=str(path)) as system:
            await system.worker()
            await new_worker(system)
            assert (await ask(system))["system_fingerprint"] == "v"
            path.write_text("[weights]\nnew = 1\nv = 0\n")
            await until(lambda: "new" in system.coordinator.dispatcher.versions.rollout.weights
                        and not system.coordinator.dispatcher.versions.rollout.forbids("new"))  # fmt: skip
            assert (await ask(system))["system_fingerprint"] == "new"
            path.write_text("[weights]\nnew = oops\n")
            await until(lambda: system.metric("baton_rollout_errors_total") == 1)
            async with system.http.get("/status") as response:
                assert "no TOML" in (await response.json())["rollout_trouble"]
            assert (await ask(system))["system_fingerprint"] == "new"

    run(main())


# A request stays with its version


def test_prefill_prefixes_and_attempts_stay_within_the_version(run) -> None:
    async def main() -> None:
        async with running() as system:
            # Even where both would compute the same KV.
            same = {"model_fingerprint": "f"}
            await system.worker("prefill-0", PREFILL)
            first = await system.worker("decode-0")
            await new_worker(system, "new-p", PREFILL, **same)
            new = [await new_worker(system, f"new-{at}", **same) for at in range(2)]
            roll_out(system, {"v": 1.0})
            assert (await ask(system, LONG))["choices"][0]["text"] == text(system, "v", 4, LONG)
            roll_out(system, {"new": 1.0})
            for worker in new:
                worker.pause_at = 2
            call = asyncio.create_task(ask(system, LONG))
            await until(lambda: tokens_of(system) == [2])
            busy = next(worker for worker in new if worker.assignments)
            next(worker for worker in new if worker is not busy).pause_at = None
            await busy.stop()
            assert (await call)["choices"][0]["text"] == text(system, "new", 4, LONG)
            for worker in system.workers:
                prefix = "new" if worker.id.startswith("new") else ""
                for assignment in worker.assignments:
                    named = [assignment.prefill.worker_id, assignment.decode.worker_id]
                    named += [holder.worker.worker_id for holder in assignment.holders]
                    assert all(name.startswith("new") == bool(prefix) for name in named if name)
            assert len(first.assignments) == 1

    run(main())


def test_a_stream_whose_version_is_gone_waits_for_it_and_does_not_go_on_at_another(run) -> None:
    async def main() -> None:
        async with running(worker_return_s=5) as system:
            await new_worker(system)
            old = await system.worker()
            old.pause_at = 2
            roll_out(system, {"v": 1.0})
            call = asyncio.create_task(ask(system))
            await until(lambda: tokens_of(system) == [2])
            await old.stop()
            await until(lambda: system.metric("baton_waits_for_worker_total") == 1)
            back = await system.worker()
            assert (await call)["choices"][0]["text"] == text(system, "v", 4)
            assert [assignment.id.attempt for assignment in back.assignments] == [2]

    run(main())


def test_a_stream_whose_version_never_comes_back_ends_if_something_was_delivered(run) -> None:
    async def main() -> None:
        async with running(worker_return_s=0.2) as system:
            new = await new_worker(system)
            old = await system.worker()
            old.pause_at = 2
            roll_out(system, {"v": 1.0})
            call = asyncio.create_task(ask(system, n=2))
            await until(lambda: tokens_of(system) == [2, 2])
            await old.stop()
            assert (await call)["error"]["code"] == "unavailable"
            assert not new.assignments

    run(main())


def test_a_request_of_which_nothing_was_delivered_begins_anew_at_another_version_with_all_its_choices(run) -> None:
    async def main() -> None:
        async with running(worker_return_s=0.2) as system:
            await new_worker(system)
            old = await system.worker()
            old.pause_at = 0
            roll_out(system, {"v": 1.0})
            call = asyncio.create_task(ask(system, n=2, temperature=0))
            await until(lambda: len(old.assignments) == 2)
            await old.stop()
            answer = await call
            assert answer["system_fingerprint"] == "new"
            assert [choice["text"] for choice in answer["choices"]] == [text(system, "new", 4)] * 2
            assert system.metric("baton_version_moves_total") == 1

    run(main())


@pytest.mark.parametrize("count", [2, 6])
def test_poison_kills_workers_of_its_own_version_only(run, count: int) -> None:
    async def main() -> None:
        async with running(worker_return_s=0.2) as system:
            others = [await new_worker(system, f"new-{at}") for at in range(3)]
            own = [await system.worker(f"decode-{at}") for at in range(count)]
            for worker in (*own, *others):
                worker.dies_of = lambda assignment, index: 299 in unpack(assignment.token_ids)
            roll_out(system, {"v": 1.0})
            answer = await ask(system, [299, 301])  # type: ignore[arg-type]
            assert answer["error"]["code"] == ("poison" if count == 6 else "unavailable")
            assert not any(worker.assignments or worker.closed.is_set() for worker in others)
            assert sum(worker.closed.is_set() for worker in own) == min(count, 4)
            assert (await ask(system))["choices"][0]["text"] == text(system, "v" if count == 6 else "new", 4)

    run(main())


def test_of_a_request_that_two_versions_began_the_newer_one_goes_on(run) -> None:
    async def main() -> None:
        async with running() as first:
            old = await first.worker()
            old.pause_at = 2
            headers = {"X-Request-Id": "a-request-of-this-test"}
            body = {"prompt": "hello", "max_tokens": 4, "n": 2, "stream": True, "temperature": 0}
            stream = await first.http.post("/v1/completions", json=body, headers=headers)
            await until(lambda: tokens_of(first) == [2, 2])
            async with running() as second:
                stale, heir = await second.worker("decode-1"), await new_worker(second)
                for worker, assignment, attempt in ((stale, old.assignments[0], 1), (heir, old.assignments[1], 2)):
                    assignment.id.attempt = attempt
                    await worker.report(assignment, 2)
                async with second.http.get("/v1/requests/a-request-of-this-test") as response:
                    answer = await response.json()
                assert answer["system_fingerprint"] == "new"
                assert [choice["text"] for choice in answer["choices"]] == [text(second, "new", 4)] * 2
                assert len(stale.aborts) == 1
            stream.close()

    run(main())


def test_a_resumed_stream_stays_with_the_version_of_the_worker_that_has_it(run) -> None:
    async def main() -> None:
        async with running() as first:
            old = await first.worker()
            old.pause_at = 2
            headers = {"X-Request-Id": "a-request-of-this-test"}
            body = {"prompt": "hello", "max_tokens": 4, "stream": True}
            stream = await first.http.post("/v1/completions", json=body, headers=headers)
            await until(lambda: tokens_of(first) == [2])
            assignment = old.assignments[0]
            async with running(worker_return_s=0.2) as second:
                new = await new_worker(second)
                heir = await second.worker("decode-1")
                roll_out(second, {"new": 1.0, "v": 0.0})
                await heir.report(assignment, 2)
                async with second.http.get("/v1/requests/a-request-of-this-test") as response:
                    answer = await response.json()
                assert answer["system_fingerprint"] == "v"
                assert answer["choices"][0]["text"] == text(second, "v", 4)
                assert not new.assignments
            stream.close()

    run(main())


# Shadows


def test_a_shadow_runs_beside_is_compared_and_never_seen(run) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker()
            new = await new_worker(system, token_at=lambda prompt, index: token_at(prompt, index) + (index >= 2))
            roll_out(system, {}, new=1.0)
            answer = await ask(system, n=2, temperature=0)
            assert answer["system_fingerprint"] == "v"
            assert [choice["text"] for choice in answer["choices"]] == [text(system, "v", 4)] * 2
            await until(lambda: system.metric("baton_shadow_answers_total", version="new", tokens="different") == 2)
            buckets = {
                at: system.metric("baton_shadow_first_difference_tokens_bucket", version="new", le=at) for at in "12"
            }
            assert buckets == {"1": 0, "2": 2}
            labels = {"version": "new", "traffic": "shadow"}
            assert system.metric("baton_version_requests_total", outcome="completed", **labels) == 1
            assert system.metric("baton_version_completion_tokens_total", **labels) == 8
            assert system.metric("baton_version_ttft_seconds_count", **labels) == 1
            assert system.metric("baton_requests_total", outcome="completed") == 1
            assert system.metric("baton_completion_tokens_total") == 8
            assert not any(assignment.ticket for assignment in new.assignments)

    run(main())


def test_equal_shadows_are_counted_as_equal_also_when_they_end_first(run) -> None:
    async def main() -> None:
        async with running() as system:
            old = await system.worker()
            await new_worker(system, token_at=token_at)
            roll_out(system, {}, new=1.0)
            old.pause_at = 3
            call = asyncio.create_task(ask(system))
            labels = {"version": "new", "traffic": "shadow", "outcome": "completed"}
            await until(lambda: system.metric("baton_version_requests_total", **labels) == 1)
            assert system.metric("baton_shadow_answers_total", version="new", tokens="equal") == 0
            old.go.set()
            await call
            assert system.metric("baton_shadow_answers_total", version="new", tokens="equal") == 1

    run(main())


def test_a_shadow_that_fails_or_hangs_costs_the_client_nothing(run) -> None:
    async def main() -> None:
        async with running(max_shadows=2) as system:
            await system.worker()
            new = await new_worker(system)
            roll_out(system, {}, new=1.0)
            new.fail_at = 1
            assert (await ask(system))["choices"][0]["text"] == text(system, "v", 4)
            labels = {"version": "new", "traffic": "shadow"}
            await until(lambda: system.metric("baton_version_requests_total", outcome="failed", **labels) == 1)
            assert len(new.assignments) == 1, "no second attempt"
            new.fail_at, new.pause_at = None, 1
            for _ in range(4):
                assert (await ask(system))["choices"][0]["text"] == text(system, "v", 4)
            await until(lambda: system.metric("baton_shadows_total", event="dropped_limit") == 2)
            await ask(system, n=3)
            await until(lambda: system.metric("baton_shadows_total", event="dropped_limit") == 3)
            assert system.coordinator.dispatcher.num_streams == 0
            await new.stop()
            await until(lambda: not system.coordinator.dispatcher.requests)
            assert system.metric("baton_suspects_total") == 0
            assert (await ask(system))["choices"][0]["text"] == text(system, "v", 4)

    run(main())


def test_shadows_go_when_the_client_does_and_when_clients_are_many(run) -> None:
    async def main() -> None:
        async with running(max_requests=4) as system:
            old, new = await system.worker(), await new_worker(system)
            roll_out(system, {}, new=1.0)
            old.pause_at = new.pause_at = 1
            call = asyncio.create_task(ask(system))
            await new.wait_for(lambda: len(new.assignments) == 1)
            call.cancel()
            await new.wait_for(lambda: len(new.aborts) == 1)
            assert system.metric("baton_shadows_total", event="useless") == 1
            calls = [asyncio.create_task(ask(system)) for _ in range(3)]
            await until(lambda: system.metric("baton_shadows_total", event="dropped_load") == 3)
            await until(lambda: len(system.coordinator.dispatcher.requests) == 3)
            old.go.set()
            for call in calls:
                assert (await call)["choices"][0]["text"] == text(system, "v", 4)
            new.go.set()

    run(main())


def test_a_version_that_begins_to_serve_has_no_shadows_left(run) -> None:
    async def main() -> None:
        async with running() as system:
            old, new = await system.worker(), await new_worker(system)
            roll_out(system, {}, new=1.0)
            old.pause_at = new.pause_at = 1
            call = asyncio.create_task(ask(system))
            await new.wait_for(lambda: len(new.assignments) == 1)
            roll_out(system, {"new": 1.0})
            await new.wait_for(lambda: len(new.aborts) == 1)
            old.go.set()
            assert (await call)["choices"][0]["text"] == text(system, "v", 4)

    run(main())


def test_the_first_difference_is_where_one_answer_has_another_token_or_none() -> None:
    class Own:
        def __init__(self, *tokens: int) -> None:
            self.stream = type("Stream", (), {"tokens": list(tokens)})

    cases = [((1, 2, 3), None), ((1, 2), 2), ((1, 2, 3, 4), 3), ((1, 9, 3), 1), ((), 0)]
    assert [first_difference([1, 2, 3], Own(*own)) for own, _ in cases] == [first for _, first in cases]
