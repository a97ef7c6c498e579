"""What an operator should know first, in words. A function of the feed's figures; `baton top` says the same.

Each alert is its level (`bad`: clients feel it; `warn`: look before they do; `info`: as was asked for) and a sentence.
"""

from collections.abc import Iterator, Mapping
from typing import Any

LOSS_S = 300.0
"""So long after a worker's death it is spoken of."""
STUCK_S = 5.0
FULL = 0.95
PRESSED = 0.9
MAX_NAMES = 3
FAILED = ("failed", "timeout", "poisoned")
"""Outcomes of requests."""
OURS = {"overloaded", "unavailable", "internal"}
"""Refusals that say something of the cluster; others are their clients' doing."""
_LEVELS = ("bad", "warn", "info")


def alerts(feed: Mapping[str, Any]) -> list[dict[str, str]]:
    """Worst first."""
    found = [*_state(feed), *_losses(feed), *_requests(feed), *_workers(feed["workers"]), *_recent(feed["recent"])]
    return [{"level": level, "text": text} for level, text in sorted(found, key=lambda each: _LEVELS.index(each[0]))]


def _state(feed: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if feed["state"] == "draining":
        yield "warn", "This coordinator is shutting down: it takes nothing new."
    elif feed["state"] != "ready":
        yield "bad", "No worker that can decode is connected: every request is refused."
    if feed["rollout_trouble"]:
        yield "warn", f"The --rollout file is broken, what it said before is in force: {feed['rollout_trouble']}"
    for name, pressure in feed["pressure"].items():
        if pressure >= PRESSED:
            yield "warn", f"Class {name} would wait for {pressure:.0%} of its target: refused, or soon to be."
    if suspects := feed["quarantine"]["waiting"] + len(feed["quarantine"]["cells"]):
        yield "warn", f"{_some(suspects, 'request')} may kill workers: each runs alone, or waits for that."


def _losses(feed: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    there = {worker["id"] for worker in feed["workers"]}
    for loss in feed["losses"]:
        ago_s = feed["at"] - loss["at"]
        if not loss["died"] or ago_s > LOSS_S:
            continue
        failed = sum(loss["ended"].get(outcome, 0) for outcome in FAILED)
        completed = loss["ended"].get("completed", 0)
        words = ((completed, "completed elsewhere"), (loss["running"], "going on"), (failed, "failed"))
        fate = [f"{number} {word}" for number, word in words if number]
        of = f"of its {_some(loss['requests'], 'request')} {', '.join(fate)}" if fate else "it had no requests"
        back = "; it is back" if loss["worker"] in there else ""
        yield "bad" if failed else "warn", f"{loss['worker']} died {_ago(ago_s)} ago ({loss['reason']}): {of}{back}."


def _requests(feed: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    way = feed["on_their_way"]
    if waiting := way["stages"]["waiting"]:
        yield "bad", f"{_some(waiting, 'stream')} without a worker: each waits for one, or for the retry budget."
    stuck = [row for row in way["shown"] if (row["age_s"] if row["silent_s"] is None else row["silent_s"]) > STUCK_S]
    if stuck:
        some = "at least " if len(stuck) == len(way["shown"]) < sum(way["stages"].values()) else ""
        yield "warn", f"{some}{_some(len(stuck), 'stream')} had no token for more than {STUCK_S:g} s.".capitalize()


def _workers(workers: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    open = [worker["id"] for worker in workers if worker["breaker"] != "closed"]
    if open:
        yield "warn", f"Breaker open or probing: {_names(open)} failed again and again, and gets little or nothing."
    draining = [worker["id"] for worker in workers if worker["state"] == "draining"]
    if draining:
        yield "info", f"Draining: {_names(draining)}."
    full = [worker["id"] for worker in workers if worker["blocks"]["held"] > FULL * worker["blocks"]["total"]]
    if full:
        yield "warn", f"KV pool nearly full: {_names(full)}."
    quarantined = [worker["id"] for worker in workers if worker["blocks"]["quarantined"]]
    if quarantined:
        yield "info", f"Blocks in quarantine, as a transfer may still touch them: {_names(quarantined)}."
    off = [
        f"{name} of {worker['id']}" for worker in workers for name, tier in worker["tiers"].items() if tier["on"] < 1
    ]
    if off:
        yield "warn", f"Tiers off or read-only: {_names(off)}."


def _recent(recent: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    over = f"in the last {_ago(recent['window_s'])}"
    lost = {name: number for name, number in recent["requests"].items() if name in FAILED}
    if lost:
        yield "bad", f"{_some(sum(lost.values()), 'request')} failed {over}: {_counted(lost)}."
    for reasons, level in ((OURS, "warn"), (recent["refused"].keys() - OURS, "info")):
        if refused := {name: number for name, number in recent["refused"].items() if name in reasons}:
            yield level, f"{_some(sum(refused.values()), 'request')} refused {over}: {_counted(refused)}."
    if wrong := recent["work"].get("handover_checksum_failures"):
        yield "bad", f"{_some(wrong, 'block')} with wrong bytes, twice, {over}: computed again, but is memory broken?"
    if slower := recent["work"].get("handover_lane_fallbacks"):
        yield "warn", f"{_some(slower, 'connection')} between workers fell back to a slower lane {over}."


def _some(number: float, what: str) -> str:
    return f"{number:.0f} {what}{'' if number == 1 else 's'}"


def _counted(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{number:.0f} {name.replace('_', ' ')}" for name, number in numbers.items())


def _names(names: list[str]) -> str:
    rest = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
