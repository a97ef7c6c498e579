"""The units of deploy/systemd/: what systemd thinks of them, and what they start."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "deploy/systemd"


def here(text: str) -> str:
    """As if /opt/baton were this checkout."""
    return text.replace("/opt/baton/.venv/bin/python", sys.executable).replace("/opt/baton", str(ROOT))


def settings(path: Path) -> dict[str, str]:
    """Of a unit, or a file of its environment; the last counts."""
    return dict(re.findall(r"^(\w+)=(.*)$", path.read_text(), re.M))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_finds_no_mistake_in_the_units(tmp_path: Path) -> None:
    for unit in UNITS.glob("baton*.*"):
        (tmp_path / unit.name).write_text(here(unit.read_text()).replace("User=baton", "User=root"))
    names = ["baton.target", "baton-coordinator.service", "baton@decode-1.service"]
    (tmp_path / names[2]).symlink_to("baton@.service")
    environ = {**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"}  # ours, and the system's
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environ,
    )  # fmt: skip
    ours = [line for line in checked.stderr.splitlines() if "baton" in line]
    assert checked.returncode == 0, checked.stderr
    assert not ours


@pytest.mark.parametrize(("unit", "kind"), [("baton-coordinator", "coordinator"), ("baton@", "decode")])
def test_a_unit_starts_its_part_with_the_flags_of_the_file(unit: str, kind: str) -> None:
    command = shlex.split(here(settings(UNITS / f"{unit}.service")["ExecStart"]).replace("%i", "decode-0"))
    environ = {**os.environ, **settings(UNITS / "baton.env"), "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run([*command, "--print"], env=environ, capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stderr
    words = shlex.split(said.stdout)
    assert words[words.index("cli.main") + 1] == kind
    assert words[words.index("--model") + 1] == "demo"


@pytest.mark.parametrize("unit", ["baton-coordinator", "baton@"])
def test_a_unit_leaves_time_to_drain_and_sends_one_signal(unit: str) -> None:
    found = settings(UNITS / f"{unit}.service")
    assert found["KillMode"] == "mixed"
    assert int(found["TimeoutStopSec"]) >= 30 + 15, "--drain-timeout-s by default, and the end of the process"
    assert found["RestartPreventExitStatus"] == "2"
    assert signal.SIGTERM.name == found.get("KillSignal", "SIGTERM")
