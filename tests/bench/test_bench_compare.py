"""Two runs beside each other, what of them is judged, and what their pages show."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from baton.errors import ConfigurationError
from cli.bench.asking import Asking
from cli.bench.command import run
from cli.bench.compare import compared, gates
from cli.bench.drawing import fitting, linear, logarithmic
from cli.bench.load import Measured
from cli.bench.measuring import CUT_OFF, ClientHealth, Histogram, Record, Timeline
from cli.bench.options import LoadOptions, OutputOptions, WorkloadOptions, check, parse_objectives
from cli.bench.report import page
from cli.bench.results import load_result, result_of
from cli.bench.running import Outcome
from cli.main import parse

# As `vllm bench serve --save-result` writes it, in part.
VLLM = {
    "date": "20260101-120000", "endpoint_type": "openai", "backend": "openai", "label": "theirs", "model_id": "m",
    "num_prompts": 10, "request_rate": "inf", "burstiness": 1.0, "max_concurrency": None, "duration": 5.0,
    "completed": 10, "failed": 0, "total_input_tokens": 100, "total_output_tokens": 200, "request_throughput": 2.0,
    "request_goodput": None, "output_throughput": 40.0, "total_token_throughput": 60.0, "mean_ttft_ms": 100.0,
    "median_ttft_ms": 90.0, "std_ttft_ms": 5.0, "p99_ttft_ms": 200.0, "mean_tpot_ms": 20.0, "median_tpot_ms": 20.0,
    "std_tpot_ms": 1.0, "p99_tpot_ms": 25.0,
}  # fmt: skip


def other(**changes: Any) -> dict[str, Any]:
    return {**VLLM, **changes}


def ratios(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float | None]:
    return {row.name: row.ratio for row in compared(before, after)}


def test_ratios_are_the_second_by_the_first() -> None:
    seen = ratios(VLLM, other(p99_ttft_ms=300.0, request_throughput=1.0))
    assert (seen["p99_ttft_ms"], seen["request_throughput"], seen["mean_tpot_ms"]) == (1.5, 0.5, 1.0)
    assert seen["failed"] is None, "of nothing there is no ratio"
    assert "request_goodput" not in seen, "nobody asked for it"


def test_better_is_more_throughput_and_less_latency() -> None:
    rows = {row.name: row.verdict for row in compared(VLLM, other(p99_ttft_ms=150.0, request_throughput=1.0))}
    assert (rows["p99_ttft_ms"], rows["request_throughput"], rows["mean_tpot_ms"]) == ("better", "worse", "")
    assert rows["total_input_tokens"] == "", "neither"


@pytest.mark.parametrize(
    ("gate", "changes", "fails"),
    [
        ("p99_ttft_ms:1.1", {"p99_ttft_ms": 219.0}, False),
        ("p99_ttft_ms:1.1", {"p99_ttft_ms": 221.0}, True),
        ("request_throughput:0.95", {"request_throughput": 1.91}, False),
        ("request_throughput:0.95", {"request_throughput": 1.89}, True),
        ("failed:1", {"failed": 0}, False),
        ("failed:1", {"failed": 3}, True),
    ],
)
def test_a_gate_fails_where_the_second_run_is_worse_than_it_allows(
    gate: str, changes: dict[str, Any], fails: bool
) -> None:
    (judged,) = gates([gate], compared(VLLM, other(**changes)))
    assert judged.failed == fails


@pytest.mark.parametrize("gate", ["p99_ttft:1.1", "p99_ttft_ms", "p99_ttft_ms:fast", "p99_ttft_ms:-1", "duration:1"])
def test_a_gate_that_can_judge_nothing_is_refused(gate: str) -> None:
    with pytest.raises(ConfigurationError, match="--fail-if has"):
        gates([gate], compared(VLLM, VLLM))


def test_the_command_exits_with_1_when_a_gate_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "a.json", tmp_path / "b.json"
    one.write_text(json.dumps(VLLM))
    two.write_text(json.dumps(other(p99_ttft_ms=300.0, model_id="n")))
    words = ["bench", "compare", str(one), str(two), "--fail-if"]
    assert run(parse([*words, "p99_ttft_ms:1.6", "request_throughput:1"])) == 0
    assert run(parse([*words, "p99_ttft_ms:1.4"])) == 1
    said = capsys.readouterr().out
    assert "FAILED  p99_ttft_ms: 200 -> 300 is 1.500 times, at most 1.4 was asked" in said
    assert "asked differently: model_id: m / n" in said


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"completed": 1}', "<html>"])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigurationError):
        load_result(str(tmp_path / "x.json"))


# Results and their page


def result(
    records: list[Record], interrupted: bool = False, cpu_share: float = 0.1, lag_s: float = 0.0
) -> dict[str, Any]:
    gaps, timeline, lag = Histogram(), Timeline(), Histogram()
    gaps.add([0.02] * 9)
    timeline.add([each.start for each in records], 10.0)  # type: ignore[arg-type]
    lag.add([lag_s] * 100)
    measured = Measured(gaps, timeline, ClientHealth(cpu_share, lag, 3, 0), {"HTTP 500": "<script>no</script>"}, 0)
    facts = {"url": "http://h:1", "model": "m", "seed": 1, "streams": 0, "open_loop": True, "command": "baton bench"}
    outcome = Outcome(records, [measured], 0, interrupted, 1e9)
    return result_of(outcome, LoadOptions(rate=2.0), WorkloadOptions(), OutputOptions(), {"ttft": 150.0}, facts)


def record(number: int, late: float = 0.0, prompt_tokens: int = 10, error: str = "") -> Record:
    at = 0.5 * number
    return Record(number, 0, at, at + late, 10, 0.1 + 0.01 * number, 1.0, prompt_tokens, 10, 10, True, error=error)


RECORDS = [record(number) for number in range(10)]


def warnings(records: list[Record], **others: Any) -> str:
    return " | ".join(result(records, **others)["baton"]["warnings"])


def test_a_run_without_trouble_has_no_warning() -> None:
    assert warnings(RECORDS) == ""


def test_warnings_say_when_the_client_was_part_of_what_was_measured() -> None:
    assert "the client was the bottleneck: 97% of a core" in warnings(RECORDS, cpu_share=0.97)
    assert "late to see answers: one in a hundred times by 30 ms" in warnings(RECORDS, lag_s=0.03)
    assert "requests went out late: one in a hundred by 50 ms" in warnings([record(1, 0.05)] * 10)
    assert "1.500 times the prompt tokens" in warnings([record(1, 0.0, 15)])
    assert "interrupted: 1 requests were cut off" in warnings([*RECORDS, record(3, error=CUT_OFF)], interrupted=True)
    assert "no request came to its end" in warnings([record(1, error="HTTP 500")])
    assert "1 of 11 requests failed" in warnings([*RECORDS, record(1, error="HTTP 500")])


def test_how_many_run_is_the_mean_of_each_second() -> None:
    timeline = result([record(0), record(1)])["baton"]["timeline"]
    assert timeline["running"] == pytest.approx([1.5, 0.5]), "from 0 to 1, and from 0.5 to 1.5"
    assert (timeline["sent"], timeline["ended"]) == ([2, 0], [0, 2])


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)


def test_the_page_draws_curves_and_escapes_what_servers_say() -> None:
    text = page(result([*RECORDS, record(1, error="HTTP 500")]))
    tags = _Tags()
    tags.feed(text)
    assert tags.tags.count("svg") == 8
    assert "script" not in tags.tags
    assert "&lt;script&gt;no" in text
    assert not re.search(r"https?://(?!h:1)", text), "it asks nothing of any network"
    assert "objective" in text
    assert "NaN" not in text


def test_the_page_shows_results_of_vllm_and_runs_without_any_answer() -> None:
    assert "theirs" in page(VLLM)
    assert "no request came to its end" in page(result([record(1, error="HTTP 500")]))
    assert "no request came to its end" in page(result([]))


@pytest.mark.parametrize(("low", "high"), [(0.01, 5000.0), (3.0, 3.0), (19.9, 20.1), (1.0, 11.0), (1e-2, 1e-2)])
def test_axes_hold_what_they_show_and_have_a_few_ticks(low: float, high: float) -> None:
    axis = fitting(low, high)
    assert axis.low <= low + 1e-9
    assert axis.low < axis.high >= high - 1e-9
    assert 2 <= len(axis.ticks) <= 12
    assert axis.ticks == sorted(axis.ticks)


def test_ticks_are_round_numbers() -> None:
    assert linear(47.0).ticks == [0, 10, 20, 30, 40, 50]
    assert logarithmic(3.0, 60.0).ticks == [2, 5, 10, 20, 50, 100]


# Flags


@pytest.mark.parametrize(
    ("url", "load", "workload", "words"),
    [
        ("localhost:8000", {}, {}, "--url is"),
        ("grpc://localhost", {}, {}, "gRPC needs a port"),
        ("http://a:1,http://b:1", {}, {}, "--url is"),
        ("http://a:1", {"rate": -1.0}, {}, "--rate is -1.0"),
        ("http://a:1", {"rate": float("nan")}, {}, "--rate is nan"),
        ("http://a:1", {"rate": float("inf")}, {}, "say how many with --requests"),
        ("http://a:1", {"clients": 4, "concurrency": 2}, {}, "--clients is more than --concurrency"),
        ("http://a:1", {"clients": 4, "concurrency": 2, "rate": 9.0}, {}, "--clients is more than --concurrency"),
        ("http://a:1", {"burstiness": 0.0}, {}, "--burstiness and --speed"),
        ("http://a:1", {}, {"length_spread": 1.0}, "--length-spread is 1.0"),
        ("http://a:1", {}, {"turns": 0}, "--turns is 0"),
        ("http://a:1", {}, {"body": "[1]"}, "--body is no JSON object"),
    ],
)
def test_flags_that_cannot_work_say_what_to_change(
    url: str, load: dict[str, Any], workload: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        check(url, LoadOptions(**load), WorkloadOptions(**workload), OutputOptions())


def test_a_body_that_does_not_fit_grpc_is_refused_before_anybody_is_asked() -> None:
    with pytest.raises(ConfigurationError, match="--body does not fit"):
        Asking(True, False, "m", True, {"top_k": 3}).check()
    Asking(True, False, "m", True, {"sampling": {"topK": 3}}).check()
    Asking(False, False, "m", True, {"top_k": 3}).check()


def test_objectives_are_read_as_vllm_reads_them() -> None:
    assert parse_objectives(["ttft:500", "tpot:50"]) == {"ttft": 500.0, "tpot": 50.0}
    assert parse_objectives(["ttft:500,e2el:2e4"]) == {"ttft": 500.0, "e2el": 20000.0}
    with pytest.raises(ConfigurationError, match="'itl:5'"):
        parse_objectives(["itl:5"])
