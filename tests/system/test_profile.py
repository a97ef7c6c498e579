"""`baton profile` on the bundled model: the files it writes, what it prints, and how it says no."""

import contextlib
import io
import json
import re
import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import baton.files
from baton.errors import ConfigurationError, ModelError
from baton.files import replace_file
from cli import profile
from cli.main import parse
from cli.profiling.breakdown import PARTS
from engine.costs import CostTable, StepShape
from kvtransfer.lanes.registry import LANES

SMALL = (
    "--max-batch-tokens", "64", "--max-running", "9", "--max-model-tokens", "512", "--kv-memory", "24MiB",
    "--lanes", "shm,tcp",
)  # fmt: skip
KINDS = {"scheduler", "kernels", "transfers", "requests"}


@dataclass
class Profiled:
    """One finished run."""

    folder: Path
    costs: CostTable
    trace: dict[str, Any]
    printed: str

    def events(self, phase: str, kind: str, name: str = "") -> list[dict[str, Any]]:
        return [
            event
            for event in self.trace["traceEvents"]
            if event["ph"] == phase and event["cat"] == kind and event["name"].startswith(name)
        ]


def run(*words: str) -> int:
    return profile.run(parse(["profile", *words]))


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Profiled:
    folder = tmp_path_factory.mktemp("profile") / "new" / "folder"
    threads, lanes, hook = torch.get_num_threads(), dict(LANES), threading.getprofile()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run("--output", str(folder), "--seconds", "4", "--dtype", "float32", *SMALL) == 0
    torch.set_num_threads(threads)
    assert lanes == LANES
    assert threading.getprofile() is hook
    trace = json.loads((folder / "trace.json").read_text())
    return Profiled(folder, CostTable.load(folder / "costs.json"), trace, printed.getvalue())


def test_both_files_are_written_whole_and_nothing_else(profiled: Profiled) -> None:
    assert {path.name for path in profiled.folder.iterdir()} == {"costs.json", "trace.json"}
    facts = profiled.costs.model
    assert (facts.name, facts.layers, profiled.costs.dtype, profiled.costs.kernels) == ("demo", 6, "float32", "torch")
    assert facts.kv_bytes_per_token == 6 * 4 * 2 * 32 * 4
    assert 5e6 < facts.parameters < 6e6


def test_the_cost_table_has_every_kind_of_step_and_transfer(profiled: Profiled) -> None:
    costs = profiled.costs
    assert {cost.tokens for cost in costs.prefill} == {16, 32, 64}
    assert {cost.context for cost in costs.prefill} == {0, 448}
    assert {cost.batch for cost in costs.decode} == {1, 2, 4, 8, 9}
    assert {cost.context for cost in costs.decode} == {16, 128}
    assert {cost.lane for cost in costs.transfer} == {"shm", "tcp", "checksum"}
    assert {cost.batch for cost in costs.scheduler} == {1, 8}
    assert costs.estimate(StepShape(3, 100, ((40, 200),))) > 0


def test_the_trace_shows_scheduler_kernels_transfers_and_requests_on_named_tracks(profiled: Profiled) -> None:
    events = profiled.trace["traceEvents"]
    assert {event["cat"] for event in events if event["ph"] != "M"} == KINDS
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in events if event["ph"] != "M"} <= named
    workers = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert workers == {"requests", "prefill-shm", "prefill-tcp", "decode", "transfers"}
    layers = {event["args"].get("layer") for event in profiled.events("X", "kernels", "linear")}
    assert layers == {None, 0, 1, 2, 3, 4, 5}
    assert all(event["args"]["rows"] > 0 for event in profiled.events("X", "kernels", "linear qkv"))


def test_spans_of_a_track_nest_and_none_is_negative(profiled: Profiled) -> None:
    tracks: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in profiled.trace["traceEvents"]:
        if event["ph"] == "X":
            assert event["ts"] >= 0 <= event["dur"], event
            tracks[event["pid"], event["tid"]].append(event)
    assert len(tracks) >= 3 * 2 + 4
    for spans in tracks.values():
        ends: list[float] = []
        for span in spans:  # sorted by start, the longer one first
            while ends and ends[-1] <= span["ts"] + 1e-3:
                ends.pop()
            end = span["ts"] + span["dur"]
            assert not ends or end <= ends[-1] + 1e-3, span
            ends.append(end)


def test_a_step_is_plan_then_run_then_apply_and_kernels_run_within(profiled: Profiled) -> None:
    for process in {event["pid"] for event in profiled.events("X", "scheduler")}:
        own = [event for event in profiled.trace["traceEvents"] if event["pid"] == process and event["ph"] == "X"]
        runs = [event for event in own if event["name"] == "run"]
        for step in (event for event in own if event["name"] == "step"):
            inside = [
                event
                for event in own
                if event["name"] in ("plan", "run", "apply")
                and step["ts"] - 1e-3 <= event["ts"] <= event["ts"] + event["dur"] <= step["ts"] + step["dur"] + 1e-3
            ]
            inside.sort(key=lambda event: event["ts"])
            assert [event["name"] for event in inside] == ["plan", "run", "apply"]
            assert sum(event["dur"] for event in inside) == pytest.approx(step["dur"], abs=1e-2)
        for kernel in (event for event in own if event["cat"] == "kernels"):
            assert any(
                one["ts"] - 1e-3 <= kernel["ts"] <= kernel["ts"] + kernel["dur"] <= one["ts"] + one["dur"] + 1e-3
                for one in runs
            )


def test_what_is_pulled_is_what_is_handed_over_block_by_block(profiled: Profiled) -> None:
    block_bytes = profiled.costs.model.kv_bytes_per_token * 16
    pulls = profiled.events("X", "transfers", "pull by")
    handovers = profiled.events("b", "transfers", "hand-over")
    assert len(handovers) == 3
    for event in (*pulls, *handovers, *profiled.events("i", "transfers", "offer")):
        assert event["args"]["bytes"] == event["args"]["blocks"] * block_bytes
    assert sum(pull["args"]["blocks"] for pull in pulls) == sum(each["args"]["blocks"] for each in handovers)
    assert {pull["args"]["lane"] for pull in pulls} == {"shm", "tcp"}
    assert sorted(each["args"]["cached_blocks"] > 0 for each in handovers) == [False, False, True]
    checks = profiled.events("X", "transfers", "check")
    assert len([event for event in checks if event["name"] == "check"]) == len(pulls)
    assert [event for event in checks if event["name"] == "checksums to offer"]


def test_every_request_goes_from_arrival_to_its_end_with_a_first_token_between(profiled: Profiled) -> None:
    begun = {event["id"]: event for event in profiled.events("b", "requests")}
    ended = {event["id"]: event["ts"] for event in profiled.events("e", "requests")}
    first = {event["id"]: event["ts"] for event in profiled.events("n", "requests", "first token")}
    assert begun.keys() == ended.keys() == first.keys()
    assert len(begun) == 4 + 2 + 1
    for id, event in begun.items():
        assert event["ts"] < first[id] <= ended[id]
        assert event["args"]["output_tokens"] > 0


def test_the_printed_parts_of_a_step_add_up_to_the_step(profiled: Profiled) -> None:
    tables = re.split(r"\n(?=decode, batch|prefill, \d+ tokens)", profiled.printed)[1:]
    titles = [table.splitlines()[0].split(", context")[0].strip() for table in tables]
    assert titles == [
        "decode, batch 1",
        "decode, batch 8",
        "prefill, 64 tokens after 0",
        "prefill, 64 tokens after 384",
    ]
    for table in tables:
        rows = dict(re.findall(r"^ (\S.*?)\s{2,}(\d+\.\d{3})\s", table, re.MULTILINE))
        step = float(rows.pop("step"))
        rows.pop("the same step, not watched")
        assert rows.keys() <= set(PARTS)
        assert {"linear layers", "attention", "sampling", "scheduler"} <= rows.keys()
        assert sum(map(float, rows.values())) == pytest.approx(step, abs=0.0005 * (len(rows) + 1))


@pytest.mark.parametrize(
    ("words", "error", "complaint"),
    [
        (("--model", "/no/such/model"), ModelError, "does not exist"),
        (("--output", "/proc/nowhere"), ConfigurationError, "/proc/nowhere is no folder"),
        (("--seconds", "0"), ConfigurationError, "--seconds"),
        (("--lanes", "smoke"), ConfigurationError, "smoke"),
        (("--seconds", "0.01"), ConfigurationError, r"--seconds 0\.01 is too little .* give at least \d+"),
    ],
)
def test_what_cannot_work_is_said(
    tmp_path: Path, words: tuple[str, ...], error: type[Exception], complaint: str
) -> None:
    folder = tmp_path / "out"
    with pytest.raises(error, match=complaint):
        run("--output", str(folder), *SMALL, *words)
    assert not list(tmp_path.rglob("*.json"))


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "costs.json"
    replace_file(path, "old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(baton.files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["costs.json"]


def test_its_help_says_what_it_writes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["profile", "--help"])
    text = capsys.readouterr().out
    for word in ("costs.json", "trace.json", "ui.perfetto.dev", "--seconds", "--output", "--model", "--lanes"):
        assert word in text
