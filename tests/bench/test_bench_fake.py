"""What `baton bench` says of `baton fake`, whose times are set: it is what was set, by HTTP and by gRPC alike."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench_agreement import PREFILL_TOKENS_PER_S, STEP_MS, Addresses, server

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def at() -> Iterator[Addresses]:
    with server() as addresses:
        yield addresses


def bench(folder: Path, *words: str) -> dict[str, Any]:
    path = folder / "result.json"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cli.main", "bench", *words, "--json", str(path)],
        capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(path.read_text())
    return result


@pytest.mark.parametrize("words", [("http",), ("grpc",), ("http", "--api", "chat"), ("grpc", "--api", "chat")])
def test_tokens_and_times_are_those_of_the_workers(at: Addresses, tmp_path: Path, words: tuple[str, ...]) -> None:
    result = bench(
        tmp_path, "--url", getattr(at, words[0]), *words[1:], "--concurrency", "2", "--requests", "6", "--input-tokens",
        "1000", "--output-tokens", "15",
    )  # fmt: skip
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (6, 0, 90)
    exact = "--api" not in words  # a chat template adds to what was asked
    assert result["total_input_tokens"] == 6000 if exact else 6000 < result["total_input_tokens"] < 6500
    prompt_ms = 1e3 * 1000 / PREFILL_TOKENS_PER_S
    assert result["median_ttft_ms"] >= prompt_ms
    assert result["median_ttft_ms"] < 2 * prompt_ms + 10 * STEP_MS, "two prompts, and steps that it waits for"
    assert 0.7 * STEP_MS < result["median_tpot_ms"] < 2 * STEP_MS
    assert result["baton"]["events"] <= 90


def test_sessions_find_what_was_said_before(at: Addresses, tmp_path: Path) -> None:
    result = bench(
        tmp_path, "--url", at.grpc, "--rate", "20", "--requests", "6", "--turns", "3", "--input-tokens", "50",
        "--output-tokens", "5", "--prefix-tokens", "20",
    )  # fmt: skip
    turns = [70, 70 + 5 + 50, 125 + 5 + 50]
    assert (result["completed"], result["total_input_tokens"]) == (6, 2 * sum(turns))
    assert [each["turn"] for each in result["baton"]["ttft_by_turn"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("way", "body", "kind"),
    [("http", '{"top_k": -7}', "HTTP 400"), ("grpc", '{"sampling": {"top_k": -7}}', "gRPC INVALID_ARGUMENT")],
)
def test_what_the_server_refuses_is_told_in_its_words(at: Addresses, way: str, body: str, kind: str) -> None:
    words = ("--requests", "2", "--body", body)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cli.main", "bench", "--url", getattr(at, way), *words],
        capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"2 x {kind}: top_k must be" in done.stdout
