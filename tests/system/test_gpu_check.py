"""`make gpu-check` where there is no GPU: it says so, and its correctness part runs in the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def gpu_check(*words):
    # An empty list hides the GPUs of a machine that has some.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu_check", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False)


def test_without_a_gpu_it_says_so_in_one_line_and_ends_well():
    done = gpu_check("--quick")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "no CUDA device" in done.stdout


@pytest.mark.slow
def test_its_correctness_part_runs_in_the_interpreter():
    done = gpu_check("--interpret")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 wrong" in done.stdout
