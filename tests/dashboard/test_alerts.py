"""What operators are told first: that it is said when it is so, and not otherwise."""

import copy
from typing import Any

import pytest

from coordinator.dashboard.alerts import alerts

WORKER: dict[str, Any] = {
    "id": "decode-0", "state": "ready", "breaker": "closed", "tiers": {"host": {"on": 1.0}},
    "blocks": {"total": 100, "free": 50, "cached": 20, "held": 30, "leased": 0, "quarantined": 0},
}  # fmt: skip
LOSS: dict[str, Any] = {
    "worker": "decode-1", "died": True, "at": 990.0, "reason": "its link closed", "requests": 5, "running": 0,
    "ended": {"completed": 5},
}  # fmt: skip
ROW: dict[str, Any] = {"age_s": 90.0, "silent_s": 0.02}
WELL: dict[str, Any] = {
    "at": 1000.0, "state": "ready", "rollout_trouble": "", "pressure": {"standard": 0.2}, "workers": [WORKER],
    "losses": [], "quarantine": {"waiting": 0, "cells": {}},
    "on_their_way": {"stages": {"waiting": 0, "decode": 1}, "shown": [ROW]},
    "recent": {"window_s": 60.0, "requests": {"completed": 5}, "refused": {}, "work": {"preemptions": 1.0}},
}  # fmt: skip


def told(path: str = "", value: Any = None) -> list[tuple[str, str]]:
    """Of a cluster that is well but for one thing."""
    feed = copy.deepcopy(WELL)
    *parents, last = path.split("/")
    place: Any = feed
    for name in parents:
        place = place[int(name) if isinstance(place, list) else name]
    if last:
        place[last] = value
    return [(alert["level"], alert["text"]) for alert in alerts(feed)]


def test_a_cluster_that_is_well_has_none() -> None:
    assert told() == []


@pytest.mark.parametrize(
    ("path", "value", "level", "words"),
    [
        ("state", "draining", "warn", "shutting down"),
        ("state", "waiting for workers", "bad", "every request is refused"),
        ("rollout_trouble", "no weights", "warn", "no weights"),
        ("pressure/standard", 0.95, "warn", "Class standard would wait for 95%"),
        ("quarantine/waiting", 1, "warn", "1 request may kill workers"),
        ("losses", [LOSS], "warn", "-1 died 10 s ago (its link closed): of its 5 requests 5 completed elsewhere."),
        ("losses", [LOSS | {"requests": 0, "ended": {}}], "warn", "it had no requests"),
        ("losses", [LOSS | {"worker": "decode-0"}], "warn", "; it is back."),
        ("losses", [LOSS | {"running": 2, "ended": {"completed": 2, "timeout": 1}}], "bad", "2 going on, 1 failed"),
        ("on_their_way/stages/waiting", 2, "bad", "2 streams without a worker"),
        ("on_their_way/shown/0/silent_s", 6.0, "warn", "1 stream had no token for more than 5 s"),
        ("on_their_way/shown/0/silent_s", None, "warn", "1 stream had no token for more than 5 s"),
        ("workers/0/breaker", "open", "warn", "decode-0 failed again and again"),
        ("workers/0/state", "draining", "info", "Draining: decode-0"),
        ("workers/0/blocks/held", 96, "warn", "KV pool nearly full: decode-0"),
        ("workers/0/blocks/quarantined", 1, "info", "decode-0"),
        ("workers/0/tiers/host/on", 0.5, "warn", "Tiers off or read-only: host of decode-0"),
        ("recent/requests", {"failed": 2, "poisoned": 1}, "bad", "3 requests failed in the last 60 s: 2 failed, 1 p"),
        ("recent/refused", {"overloaded": 1}, "warn", "1 request refused in the last 60 s: 1 overloaded"),
        ("recent/refused", {"invalid_request": 3}, "info", "3 requests refused"),
        ("recent/work", {"handover_checksum_failures": 1}, "bad", "wrong bytes"),
        ("recent/work", {"handover_lane_fallbacks": 1}, "warn", "slower lane"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_once_with_its_level(path: str, value: Any, level: str, words: str) -> None:
    ((said, text),) = told(path, value)
    assert said == level
    assert words in text


@pytest.mark.parametrize("loss", [LOSS | {"died": False}, LOSS | {"at": 600.0}])
def test_nobody_is_told_of_workers_that_were_to_go_or_died_long_ago(loss: dict[str, Any]) -> None:
    assert told("losses", [loss]) == []


def test_the_worst_comes_first_and_many_names_are_counted() -> None:
    feed = copy.deepcopy(WELL)
    feed["workers"] = [{**WORKER, "id": f"w{number}", "state": "draining"} for number in range(10)]
    feed["recent"]["requests"] = {"failed": 1}
    assert [alert["level"] for alert in alerts(feed)] == ["bad", "info"]
    assert alerts(feed)[1]["text"] == "Draining: w0, w1, w2 and 7 more."
