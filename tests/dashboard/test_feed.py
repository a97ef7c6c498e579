"""The feed: what it says of requests, losses and faults, to whom, and what it never says."""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from coordinator_harness import DECODE, PREFILL, System, running, until
from fake_worker import FakeWorker
from tenant_files import KeyFile

from coordinator.dashboard import feed as feed_module
from coordinator.dashboard.feed import quantile
from coordinator.dashboard.journal import MAX_CHARACTERS, MAX_LINES, Journal
from coordinator.dashboard.pages import FEED, PAGES
from coordinator.dashboard.recent import RATE_S, WINDOW_S, Recent

Run = Callable[..., Any]
PROMPT = "Xylophones are my secret"
FAR = {"X-Forwarded-For": "203.0.113.9"}
"""As if from another machine."""


@pytest.fixture(autouse=True)
def always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "FRESH_S", 0.0)


async def look(system: System, **headers: str) -> dict[str, Any]:
    async with system.http.get(FEED, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        feed: dict[str, Any] = json.loads(await answer.read())
        return feed


def ask(system: System, prompt: str = PROMPT, **options: Any) -> "asyncio.Task[Any]":
    return asyncio.create_task(
        system.openai.completions.create(model="demo", prompt=prompt, **({"max_tokens": 8} | options))
    )


async def paused(system: System, id: str, at: int, *roles: int) -> FakeWorker:
    worker = await system.worker(id, *roles)
    worker.pause_at = at
    return worker


def test_a_request_is_shown_in_its_stage_until_it_is_done(run: Run) -> None:
    async def life() -> None:
        async with running(local_prefill_tokens=0) as system:
            prefill = await paused(system, "p", 0, PREFILL)
            decode = await paused(system, "d", 0, DECODE)

            async def stage(wanted: str) -> dict[str, Any]:
                async with asyncio.timeout(5):
                    while True:
                        way = (await look(system))["on_their_way"]
                        if way["stages"][wanted] == 1:
                            assert sum(way["stages"].values()) == 1
                            return dict(way["shown"][0])
                        await asyncio.sleep(0.01)

            answer = ask(system, "long " * 200)
            row = await stage("prefill")
            assert (row["prefill"], row["decode"], row["tokens"], row["attempt"]) == ("p", "d", 0, 1)
            prefill.go.set()  # its one token: the prompt is computed
            row = await stage("hand_over")
            assert row["tokens"] == 1
            decode.go.set()
            await answer
            feed = await look(system)
            assert not feed["on_their_way"]["shown"]
            assert feed["recent"]["requests"] == {"completed": 1}
            assert feed["recent"]["tokens"] == {"delivered": 8}

    run(life())


def test_of_a_lost_worker_it_says_what_became_of_its_requests(run: Run) -> None:
    async def life() -> None:
        async with running(worker_return_s=0.3) as system:
            await look(system)
            first = await paused(system, "a", 2)
            answers = [ask(system), ask(system)]
            await until(
                lambda: (
                    all(len(each.choices[0].stream.tokens) == 2 for each in _requests(system))
                    and len(_requests(system)) == 2
                )
            )
            other = await paused(system, "b", 4)
            await first.stop()
            await until(lambda: not system.coordinator.registry.workers.get("a"))
            feed = await look(system)
            (loss,) = feed["losses"]
            assert (loss["worker"], loss["died"], loss["requests"], loss["running"]) == ("a", True, 2, 2)
            assert [alert["level"] for alert in feed["alerts"] if "a died" in alert["text"]] == ["warn"]
            other.go.set()
            await asyncio.gather(*answers)
            (loss,) = (await look(system))["losses"]
            assert (loss["running"], loss["ended"]) == (0, {"completed": 2})

    run(life())


def _requests(system: System) -> list[Any]:
    return list(system.coordinator.dispatcher.requests.values())


def test_requests_that_a_loss_costs_are_said_to_have_failed(run: Run) -> None:
    async def life() -> None:
        async with running(worker_return_s=0.2) as system:
            worker = await paused(system, "a", 2)
            answer = ask(system)
            await until(lambda: len(_requests(system)) == 1 and len(_requests(system)[0].choices[0].stream.tokens) == 2)
            await look(system)
            await worker.stop()
            await until(lambda: not system.coordinator.registry.workers)
            feed = await look(system)
            assert feed["state"] == "waiting for workers"
            await asyncio.gather(answer, return_exceptions=True)
            feed = await look(system)
            assert feed["losses"][0]["ended"] == {"failed": 1}
            assert feed["alerts"][0]["level"] == "bad"

    run(life())


def test_nothing_of_a_prompt_an_answer_or_a_whole_id_is_in_it(run: Run) -> None:
    async def life() -> None:
        async with running() as system:
            worker = await paused(system, "d", 4)
            worker.token_at = system.says("Glockenspiel sounds nice")
            answer = ask(system)
            await until(lambda: len(_requests(system)) == 1 and len(_requests(system)[0].choices[0].stream.tokens) >= 3)
            (id,) = system.coordinator.dispatcher.requests
            async with system.http.get(FEED) as response:
                text = await response.text()
            assert id[-6:] in text
            for secret in (id, "Xylophones", "secret", "Glockenspiel", "Glock"):
                assert secret not in text
            worker.go.set()
            await answer

    run(life())


def test_all_who_look_within_a_second_get_the_same_figures(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> None:
        async with running() as system:
            await system.worker("d")
            now, made = [100.0], []
            feed = system.coordinator._feed
            monkeypatch.setattr(feed_module, "FRESH_S", 0.9)
            feed._clock = lambda: now[0]
            document = feed._document
            monkeypatch.setattr(feed, "_document", lambda: made.append(now[0]) or document())
            for _ in range(20):
                await look(system)
            assert made == [100.0]
            now[0] += 1.0
            await look(system)
            assert made == [100.0, 101.0]

    run(life())


def test_what_it_lists_is_bounded_and_the_longest_waiting_come_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> None:
        monkeypatch.setattr(feed_module, "MAX_WORKERS", 2)
        monkeypatch.setattr(feed_module, "MAX_STREAMS", 3)
        async with running() as system:
            for number in range(3):
                worker = await paused(system, f"d{number}", 1)
            worker.heartbeat.draining = True
            await worker.beat()
            await until(lambda: not system.coordinator.registry.workers["d2"].accepts)
            answers = [ask(system) for _ in range(5)]
            await until(lambda: len(_requests(system)) == 5)
            await until(lambda: all(len(each.choices[0].stream.tokens) == 1 for each in _requests(system)))
            _requests(system)[3].choices[0].last_token_s -= 60
            feed = await look(system)
            assert feed["on_their_way"]["stages"]["decode"] == 5
            assert len(feed["on_their_way"]["shown"]) == 3
            assert feed["on_their_way"]["shown"][0]["id"] == _requests(system)[3].id[-6:]
            assert any("no token for more than" in alert["text"] for alert in feed["alerts"])
            assert feed["num_workers"] == 3
            assert [each["id"] for each in feed["workers"]] == ["d2", "d0"]  # the one in trouble first
            for each in system.workers:
                each.go.set()
            await asyncio.gather(*answers)

    run(life())


# Who may see it


def test_figures_are_for_this_machine_and_the_page_for_everybody_with_headers_that_keep_others_out(run: Run) -> None:
    async def life() -> None:
        async with running() as system:
            for path, headers, status in ((FEED, {}, 200), (FEED, FAR, 403), *((path, FAR, 200) for path in PAGES)):
                async with system.http.get(path, headers=headers) as answer:
                    assert answer.status == status, path
                    if status == 403:
                        assert "operator" in await answer.text()
                        continue
                    policy = answer.headers["Content-Security-Policy"]
                    assert "default-src 'none'" in policy
                    assert "unsafe" not in policy
                    assert "http" not in policy
                    assert answer.headers["X-Content-Type-Options"] == "nosniff"
                    assert answer.headers["X-Frame-Options"] == "DENY"
            async with system.http.get("/dashboard/../server.py") as answer:
                assert answer.status == 404

    run(life())


def test_with_keys_figures_from_elsewhere_need_one_that_operates(run: Run, tmp_path: Any) -> None:
    async def life() -> None:
        keys = KeyFile(tmp_path / "keys.toml", ops='scopes = ["operate"]', app="")
        async with running(keys=str(keys.path)) as system:
            for headers, status in (
                ({}, 200), (FAR, 401), (FAR | keys.headers("app"), 403), (FAR | keys.headers("ops"), 200),
            ):  # fmt: skip
                async with system.http.get(FEED, headers=headers) as answer:
                    assert answer.status == status
            async with system.http.get("/dashboard", headers=FAR) as answer:
                assert answer.status == 200

    run(life())


# The last minute


def test_the_last_minute_is_what_came_in_it_and_a_worker_counts_from_when_it_is_seen() -> None:
    recent = Recent(["work/tokens"])
    for second in range(100):
        workers = {("a", "1"): [50.0 * second]}
        if second >= 90:
            workers["b", "1"] = [1e6 + second]  # it has served another coordinator before
        recent.look(float(second), {"ended": 2.0 * second, "still": 7.0}, workers)
    assert recent.window_s == WINDOW_S
    assert recent.gains() == {"ended": 120.0, "work/tokens": 50.0 * 60 + 9}
    assert recent.rate("ended") == 2.0
    assert recent.rates(("a", "1"), 1) == [50.0]
    assert recent.rates(("b", "1"), 1) == [1.0]
    recent.look(99.0 + RATE_S * 2, {"ended": 198.0, "still": 7.0}, {("b", "2"): [0.0]})
    assert recent.rates(("b", "2"), 1) == []
    assert recent.rate("ended") is None  # nobody has looked for a while


def test_quantiles_are_within_their_bucket() -> None:
    bounds, counts = [0.01, 0.1, 1.0], [0, 50, 100, 100]
    assert quantile(bounds, counts, 0.5) == pytest.approx(0.1)
    assert 0.1 < (quantile(bounds, counts, 0.75) or 0) < 1.0
    assert quantile(bounds, counts, 1.0) == pytest.approx(1.0)
    assert quantile(bounds, [0, 0, 0, 5], 0.5) == 1.0  # beyond the last bound: at least that
    assert quantile(bounds, [0, 0, 0, 0], 0.5) is None
    assert quantile(bounds, [4, 4, 4, 4], 0.5) == pytest.approx(0.01 / 2**0.5)


def test_the_journal_keeps_the_last_lines_and_counts_repeated_ones() -> None:
    journal, log = Journal(), logging.getLogger("test-journal")
    log.propagate = False
    log.addHandler(journal)
    for number in range(MAX_LINES + 10):
        log.warning("worker %s", number)
    for _ in range(3):
        log.error("x" * 1000)
    lines = journal.lines(2)
    assert [(line["level"], line["times"]) for line in lines] == [("error", 3), ("warning", 1)]
    assert len(lines[0]["text"]) == MAX_CHARACTERS
    assert len(journal.lines(1000)) == MAX_LINES
