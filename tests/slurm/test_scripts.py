"""The scripts of deploy/slurm/ without a Slurm: their form, and what they say when they are used wrongly."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("baton.sbatch", "pool.sbatch")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed: make system-packages")
def test_shellcheck_finds_nothing() -> None:
    files = ["deploy/slurm/common.sh", *(f"deploy/slurm/{name}" for name in SCRIPTS)]
    checked = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


def run(script: str, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    environ = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT), **env}
    return subprocess.run(
        ["bash", f"deploy/slurm/{script}", *words], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_submitted_from_elsewhere_it_says_where_to_submit(script: str, tmp_path: Path) -> None:
    done = run(script, SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2
    assert "submit from Baton's folder, or set BATON_HOME" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_an_environment_it_says_how_to_make_one(script: str, tmp_path: Path) -> None:
    done = run(script, BATON_PYTHON=str(tmp_path / "python"))
    assert done.returncode == 2
    assert "run make install, or set BATON_PYTHON" in done.stderr


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("baton.sbatch", (), "this job has 1 components; it needs three"),
        ("pool.sbatch", (), "say: sbatch deploy/slurm/pool.sbatch prefill|decode"),
        ("pool.sbatch", ("decoder", "12"), "say: sbatch deploy/slurm/pool.sbatch prefill|decode"),
    ],
)
def test_the_wrong_use_is_said(script: str, words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 'KillWait = 30 sec'\n")
    scontrol.chmod(0o755)
    done = run(script, *words, BATON_PYTHON="/bin/sh", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert says in done.stderr
