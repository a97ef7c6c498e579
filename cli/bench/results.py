"""A run as JSON: the fields of `vllm bench serve` at the top, and all that it does not have under `baton`.

The report and `baton bench compare` read this, whoever wrote it, as far as it goes.
"""

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from baton.errors import ConfigurationError
from cli.bench.measuring import (
    CUT_OFF,
    REFUSED,
    Histogram,
    Record,
    Timeline,
    error_counts,
    statistics,
    summarise,
)
from cli.bench.options import LoadOptions, OutputOptions, WorkloadOptions, is_grpc, parse_percentiles
from cli.bench.running import Outcome

_Floats = npt.NDArray[np.float64]
CURVE = tuple(float(each) for each in [*np.arange(0, 99, 0.5), 99, 99.25, 99.5, 99.75, 99.9, 99.95, 99.99, 100])
"""Percents at which curves are drawn."""
MAX_SHARE, MAX_LAG_MS, MAX_LATE_MS = 0.9, 10.0, 10.0
"""Beyond these the client is part of what was measured."""
MAX_POINTS = 2000
_EXACT = 0.01
"""Of the length of prompts, what the server may count otherwise without a word about it."""


def result_of(
    outcome: Outcome, load: LoadOptions, workload: WorkloadOptions, output: OutputOptions,
    objectives: Mapping[str, float], facts: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """`facts`: url, model, seed, and what else was found out before the run."""
    records = sorted(outcome.records, key=lambda each: (each.start, each.number))
    gaps, timeline, lag = Histogram(), Timeline(), Histogram()
    for each in outcome.measured:
        gaps.merge(each.gaps)
        timeline.merge(each.timeline)
        lag.merge(each.health.lag)
    duration_s = max((each.start + each.latency for each in records), default=0.0)
    percents = parse_percentiles(output.percentiles)
    is_open = bool(load.rate) or any(each.scheduled != each.start for each in records)
    summary = summarise(
        records, gaps, timeline, duration_s, percents, objectives, queued=bool(is_open and load.concurrency)
    )
    kind = "grpc" if is_grpc(str(facts["url"])) else "openai" + ("-chat" if workload.api == "chat" else "")
    result: dict[str, Any] = {
        "date": datetime.datetime.fromtimestamp(outcome.started_unix_s).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": kind,
        "backend": kind,
        "label": output.label or kind,
        "model_id": facts["model"],
        "tokenizer_id": workload.tokenizer or facts["model"],
        "num_prompts": len(records),
        "request_rate": load.rate if 0 < load.rate < float("inf") else "inf",
        "burstiness": load.burstiness if np.isfinite(load.burstiness) else "inf",
        "max_concurrency": facts["streams"] or None,
        **summary,
    }
    if output.detailed:
        result |= _detailed(records, outcome)
    result["baton"] = {
        "version": version("baton-serve"),
        "client": platform.node(),
        "interrupted": outcome.interrupted,
        "lost_clients": outcome.lost,
        "objectives_ms": dict(objectives),
        "settings": {**_finite(load), **_finite(workload), **facts},
        "percentiles": percents,
        **_counts(records, outcome),
        "curves_ms": _curves(records, gaps),
        "timeline": _timeline(records, timeline),
        "health": _health(records, outcome, lag, percents, is_open),
    }
    result["baton"]["warnings"] = warnings_of(result)
    return result


def _finite(options: object) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(options)
    return {name: "inf" if value == float("inf") else value for name, value in fields.items()}


def _counts(records: Sequence[Record], outcome: Outcome) -> dict[str, Any]:
    done = [each for each in records if each.ok]
    asked = [each for each in done if each.asked_tokens and each.counted]
    examples: dict[str, str] = {}
    for measured in outcome.measured:
        examples = {**measured.examples, **examples}
    by_turn: dict[int, list[float]] = {}
    for each in done:
        by_turn.setdefault(each.turn, []).append(each.ttft)
    return {
        "errors": error_counts(records),
        "error_examples": examples,
        "refused": sum(each.error == REFUSED for each in records),
        "asked_again": sum(each.refusals for each in records),
        "cut_off": sum(each.error == CUT_OFF for each in records),
        "turns_not_asked": sum(each.unasked for each in outcome.measured),
        "uncounted_answers": sum(not each.counted for each in done),
        "events": sum(each.events for each in done),
        "asked_input_tokens": sum(each.asked_tokens for each in asked),
        "counted_input_tokens": sum(each.prompt_tokens for each in asked),
        "ttft_by_turn": [
            {"turn": turn + 1, "requests": len(seconds), **statistics("ttft", seconds, [99])}
            for turn, seconds in sorted(by_turn.items())
        ]
        if len(by_turn) > 1
        else [],
    }


def _curves(records: Sequence[Record], gaps: Histogram) -> dict[str, list[float]]:
    """Of each latency, its value in ms at each of `CURVE`'s percents."""
    done = [each for each in records if each.ok]
    values = {
        "ttft": [each.ttft for each in done],
        "tpot": [each.tpot for each in done if each.output_tokens > 1],
        "e2el": [each.latency for each in done],
    }
    curves = {name: [1e3 * float(at) for at in np.percentile(each, CURVE)] for name, each in values.items() if each}
    if gaps.count:
        curves["itl"] = [1e3 * at for at in gaps.percentiles(CURVE)]
    return curves


def _timeline(records: Sequence[Record], timeline: Timeline) -> dict[str, Any]:
    """By second of the run."""
    ends = [each.start + each.latency for each in records]
    seconds = int(max([*ends, *(each.start for each in records), 0.0])) + 1
    marks = np.arange(seconds + 1, dtype=np.float64)
    running = np.diff(_since(marks, [each.start for each in records]) - _since(marks, ends))

    def a_second(times: Sequence[float]) -> list[int]:
        return [int(each) for each in np.bincount(np.asarray(times, dtype=np.float64).astype(int), minlength=seconds)]

    done = [each for each in records if each.ok]
    step = max(1, len(done) // MAX_POINTS)
    return {
        "due": a_second([max(each.scheduled, 0.0) for each in records]),
        "sent": a_second([each.start for each in records]),
        "ended": a_second([each.start + each.latency for each in done]),
        "failed": a_second([each.start for each in records if each.error not in ("", CUT_OFF)]),
        "running": [round(float(each), 3) for each in running],
        "tokens": [*timeline.tokens, *[0.0] * (seconds - len(timeline.tokens))],
        "ttft_points": [[round(each.start, 3), round(1e3 * each.ttft, 3)] for each in done[::step]],
    }


def _since(marks: _Floats, times: Sequence[float]) -> _Floats:
    """At each mark, how much time has passed since each of `times` that is before it, all together."""
    ordered = np.sort(np.asarray(times, dtype=np.float64))
    before = np.searchsorted(ordered, marks)
    sums = np.concatenate(([0.0], np.cumsum(ordered)))
    passed: _Floats = before * marks - sums[before]
    return passed


def _health(
    records: Sequence[Record], outcome: Outcome, lag: Histogram, percents: Sequence[float], is_open: bool
) -> dict[str, Any]:  # fmt: skip
    """Whether the client kept up: how late its loop was, and how late requests went out."""
    late = [max(0.0, each.start - each.scheduled) for each in records if not each.turn] if is_open else []
    return {
        "clients": len(outcome.measured),
        "cpu_share": [round(each.health.cpu_share, 4) for each in outcome.measured],
        "connections": sum(each.health.connections for each in outcome.measured),
        "reconnections": sum(each.health.reconnections for each in outcome.measured),
        **statistics("loop_lag", lag, percents),
        "max_loop_lag_ms": 1e3 * lag.longest,
        **(statistics("send_delay", late, percents) if late else {}),
        "max_send_delay_ms": 1e3 * max(late, default=0.0),
        "p99_send_delay": 1e3 * float(np.percentile(late, 99)) if late else 0.0,
        "p99_lag": 1e3 * lag.percentiles([99])[0],
    }


def warnings_of(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the figures."""
    own, health = result["baton"], result["baton"]["health"]
    said: list[str] = []
    if own["interrupted"]:
        said.append(f"interrupted: {own['cut_off']} requests were cut off, and are in no figure")
    if own["lost_clients"]:
        said.append(f"{own['lost_clients']} of the processes that send died: what they measured last is missing")
    if max(health["cpu_share"], default=0.0) > MAX_SHARE:
        share = max(health["cpu_share"])
        said.append(f"the client was the bottleneck: {share:.0%} of a core; give it more --clients, or another machine")
    if health["p99_lag"] > MAX_LAG_MS:
        said.append(
            f"the client was late to see answers: one in a hundred times by {health['p99_lag']:.0f} ms or more; "
            "latencies are too long by as much"
        )
    if health["p99_send_delay"] > MAX_LATE_MS and "mean_client_queue_time_ms" not in result:
        said.append(
            f"requests went out late: one in a hundred by {health['p99_send_delay']:.0f} ms or more, which no latency "
            "shows; give it more --clients"
        )
    asked, counted = own["asked_input_tokens"], own["counted_input_tokens"]
    if asked and abs(counted / asked - 1) > _EXACT:
        said.append(f"the server counts {counted / asked:.3f} times the prompt tokens that were asked for")
    if own["uncounted_answers"]:
        said.append(f"{own['uncounted_answers']} answers came without usage: their tokens are events that were counted")
    if not result["completed"]:
        said.append("no request came to its end: there is nothing to measure")
    elif result["failed"]:
        said.append(f"{result['failed']} of {result['completed'] + result['failed']} requests failed")
    return said


def _detailed(records: Sequence[Record], outcome: Outcome) -> dict[str, Any]:
    return {
        "input_lens": [each.prompt_tokens for each in records],
        "output_lens": [each.output_tokens if each.ok else 0 for each in records],
        "ttfts": [each.ttft for each in records],
        "itls": [[float(gap) for gap in np.frombuffer(each.gaps, dtype=np.float32)] for each in records],
        "latencies": [each.latency for each in records],
        "start_times": [each.start for each in records],
        "queue_times": [each.start - each.scheduled for each in records],
        "errors": [each.error for each in records],
    }


def load_result(path: str) -> dict[str, Any]:
    """Of this or of `vllm bench serve`. Raises ConfigurationError."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
        raise ConfigurationError(f"{path} cannot be read: {reason}; give what --json wrote") from None
    if not isinstance(result, dict) or "request_throughput" not in result:
        raise ConfigurationError(f"{path} is no result of `baton bench` or `vllm bench serve`")
    return result
