"""The whole relay with its two workers on one GPU, through the front door."""

import importlib.util
import json
import tempfile
import time
import urllib.request
from pathlib import Path

from benchmarks.gpu.measuring import Budget
from benchmarks.report import Report

NEEDED = ("msgspec", "zmq", "grpc_health", "grpc_reflection")
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 4096, 64, 3
LANES = ("shm", "cuda_ipc")
RESERVE_S = 90.0
TIMEOUT_S = 120.0


def measure(report: Report, budget: Budget) -> None:
    """Time to the first token and between tokens, handed over and colocated; the texts must be equal."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        report.note(f"relay of two processes on one GPU: left out, as this machine lacks {', '.join(missing)}")
        return
    if budget.left < RESERVE_S:
        report.note("relay of two processes on one GPU: no time left")
        return
    from benchmarks import random_model
    from benchmarks.serving import Serving

    with tempfile.TemporaryDirectory() as name:
        words = ["--model", str(random_model.write(Path(name) / "random246")), "--device", "cuda",
                 "--kv-memory", "4GiB", "--max-batch-tokens", "2048"]  # fmt: skip
        with Serving(*words, "--mixed", "1") as mixed:
            colocated_s, colocated_gap_s, expected = _complete(mixed.url)
        for lane in LANES:
            with Serving(*words, "--prefill", "1", "--decode", "1", "--lanes", f"{lane},tcp") as pools:
                first_s, gap_s, text = _complete(pools.url)
                counters = pools.get("/metrics")
            name = f"relay by {lane}"
            if f'lane="{lane}"' not in counters:
                report.note(f"{name}: not measured, another lane was used; the log says why")
                continue
            moved = _counter(counters, "baton_worker_kv_blocks_to_device_total")
            report.row(f"{name}: blocks that went through host memory", moved, "blocks")
            report.row(f"{name}: time to first token", first_s * 1e3, "ms", "one mixed worker", first_s / colocated_s)
            report.row(f"{name}: time between tokens", gap_s * 1e3, "ms", "one mixed worker", gap_s / colocated_gap_s)
            if text != expected:
                report.note(f"{name}: in bfloat16 the handed-over text differs from the mixed worker's")


def _complete(url: str) -> tuple[float, float, str]:
    """Best time to first token, best mean gap after it, and the text, of one long prompt, each time a new one."""
    first, gap, text = float("inf"), float("inf"), ""
    for repeat in range(REPEATS + 1):
        prompt = " ".join(f"w{2 + (place * 7 + repeat * 1009) % 31000}" for place in range(PROMPT_TOKENS))
        body = {"model": "random246", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True,
                "ignore_eos": True}  # fmt: skip
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        began, times, text = time.perf_counter(), [], ""
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    choices = json.loads(line[6:])["choices"]
                    if choices and choices[0]["text"]:
                        times.append(time.perf_counter())
                        text += choices[0]["text"]
        if repeat:  # the first warms up
            first = min(first, times[0] - began)
            gap = min(gap, (times[-1] - times[0]) / (NEW_TOKENS - 1))
    return first, gap, text


def _counter(metrics: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(name))
