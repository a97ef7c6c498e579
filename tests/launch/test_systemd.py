"""The units of deploy/systemd/: what systemd thinks of them, and what they start."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.slurm.cluster import wait_for

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


@pytest.mark.slow
def test_what_the_units_start_serves_together_and_drains_in_the_order_of_systemd(tmp_path: Path) -> None:
    http, link = free_port(), free_port()
    worker = f"--coordinator 127.0.0.1:{link} --dtype float32 --kv-memory 64MiB --threads 1"
    environ = {
        **os.environ, **settings(UNITS / "baton.env"), "CUDA_VISIBLE_DEVICES": "",
        "BATON_COORDINATOR_FLAGS": f"--port {http} --grpc-port 0 --link-port {link}",
        "BATON_PREFILL_FLAGS": worker, "BATON_DECODE_FLAGS": worker,
    }  # fmt: skip
    parts: list[subprocess.Popen[bytes]] = []

    def said() -> str:
        return "\n".join(f"{each.name}: {each.read_text()[-2000:]}" for each in sorted(tmp_path.glob("*.log")))

    def are_there() -> bool:
        assert all(part.poll() is None for part in parts), said()
        return num_workers(http) == 2

    try:
        for unit, instance in (("baton-coordinator", ""), ("baton@", "prefill-0"), ("baton@", "decode-0")):
            command = shlex.split(here(settings(UNITS / f"{unit}.service")["ExecStart"]).replace("%i", instance))
            with (tmp_path / f"{instance or unit}.log").open("wb") as log:
                parts.append(subprocess.Popen(command, env=environ, stderr=log))
        wait_for(are_there, "both workers are there", 60, said)
        body = json.dumps({"model": "demo", "prompt": "The list type", "max_tokens": 5}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{http}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 5
        for part in parts:
            part.terminate()
            assert part.wait(60) == 0
    finally:
        for part in parts:
            part.kill()  # its process sees that, and ends
            part.wait()


def num_workers(port: int) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=10) as answer:
            return len(json.load(answer)["workers"])
    except OSError:
        return 0
