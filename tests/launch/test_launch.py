"""The launcher as a process, with a stand-in for the `baton` command that does what a file says."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.launch.host import write_cpus
from tests.launch.sysfs import Host

LAUNCH = Path(__file__).resolve().parents[2] / "deploy/launch/launch.py"
STAND_IN = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["STAND_IN"])
def note(text):
    with open(folder / "notes", "a") as file:
        file.write(f"{os.getpid()} {text}\\n")
def stop(number, frame):
    note(signal.Signals(number).name)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
note("started " + " ".join(sys.argv[1:]))
statuses = folder / "statuses"  # of one start after the other; after the last it lives
left = statuses.read_text().split()
statuses.write_text(" ".join(left[1:]))
if left:
    sys.exit(int(left[0]))
time.sleep(60)
"""


class Launcher:
    """`plan` are the statuses with which the stand-in ends, one start after the other."""

    def __init__(self, folder: Path, env: dict[str, str] | None = None) -> None:
        self._folder = folder
        package = folder / "path/cli"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "main.py").write_text(STAND_IN)
        clean = {
            name: value for name, value in os.environ.items() if not re.match("SLURM|CUDA|BATON|UCX|NCCL|STAND", name)
        }
        self.env = {**clean, "PYTHONPATH": str(folder / "path"), "STAND_IN": str(folder), **(env or {})}
        self.process: subprocess.Popen[str] | None = None

    def words(self, *words: str) -> list[str]:
        return [sys.executable, str(LAUNCH), *words]

    def print(self, *words: str) -> list[str]:
        """The words of the command it would run."""
        said = subprocess.run(self.words(*words, "--print"), env=self.env, capture_output=True, text=True, timeout=60)
        assert said.returncode == 0, said.stderr
        return shlex.split(said.stdout)

    def start(self, *words: str, statuses: str = "") -> "subprocess.Popen[str]":
        (self._folder / "statuses").write_text(statuses)
        self.process = subprocess.Popen(self.words(*words), env=self.env, stderr=subprocess.PIPE, text=True)
        return self.process

    def notes(self) -> list[str]:
        notes = self._folder / "notes"
        return notes.read_text().splitlines() if notes.exists() else []

    def end(self) -> str:
        """What it said, after it ended."""
        assert self.process is not None
        return self.process.communicate(timeout=30)[1]


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path)
    yield launcher
    if launcher.process is not None and launcher.process.poll() is None:
        launcher.process.kill()
        launcher.process.wait()


def wait_for(promise: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not promise():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def value_of(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_the_command_names_gpu_cores_card_address_and_a_name_that_stays(launcher: Launcher, tmp_path: Path) -> None:
    host = Host(tmp_path / "sys")
    launcher.env["PATH"] = f"{host.nvidia_smi(tmp_path / 'bin')}:{launcher.env['PATH']}"
    everywhere = write_cpus(frozenset(os.sched_getaffinity(0)))
    for list_of_cpus in tmp_path.glob("sys/devices/system/node/*/cpulist"):
        list_of_cpus.write_text(everywhere)
    words = launcher.print(
        "decode-1", "--sysfs", str(host.root), "--discovery", "etcd://127.0.0.1:2379/x", "--model", "a b"
    )
    assert "CUDA_VISIBLE_DEVICES=1" in words
    assert "UCX_NET_DEVICES=mlx5_1:1" in words
    assert "NCCL_IB_HCA==mlx5_1:1" in words
    assert words[words.index("cli.main") + 1] == "decode"
    assert value_of(words, "--host") == "127.0.0.1"
    assert value_of(words, "--lanes") == "shm,cma,nixl,tcp"
    assert re.fullmatch(r"decode-.+-1", value_of(words, "--worker-id"))
    assert words[-2:] == ["--model", "a b"]


def test_what_somebody_chose_stays(launcher: Launcher, tmp_path: Path) -> None:
    host = Host(tmp_path / "sys")
    launcher.env |= {
        "UCX_NET_DEVICES": "mine", "CUDA_VISIBLE_DEVICES": "",
        "BATON_FLAGS": "--model 'a b'", "BATON_PREFILL_FLAGS": "--threads 2", "BATON_DECODE_FLAGS": "--threads 3",
    }  # fmt: skip
    words = launcher.print("prefill-7", "--sysfs", str(host.root), "--host", "10.0.0.9", "--tls-cert", "c.pem")
    assert not [word for word in words if word.startswith(("UCX", "CUDA"))]
    assert words.count("--host") == 1
    assert "--lanes" not in words, "the RDMA lanes cannot be encrypted"
    after = words[words.index("--model") :]
    assert after == ["--model", "a b", "--threads", "2", "--host", "10.0.0.9", "--tls-cert", "c.pem"]


def test_in_slurm_rank_and_name_are_those_of_the_task(launcher: Launcher) -> None:
    launcher.env |= {"SLURM_LOCALID": "2", "SLURM_JOB_ID": "77", "SLURMD_NODENAME": "n3", "SLURM_STEP_ID": "0"}
    launcher.env["CUDA_VISIBLE_DEVICES"] = "4,5,6"
    words = launcher.print("decode", "--sysfs", "/nowhere")
    assert value_of(words, "--worker-id") == "decode-n3-2-77"
    assert "CUDA_VISIBLE_DEVICES=6" in words


def test_a_coordinator_listens_for_workers_where_they_are_and_takes_no_gpu(launcher: Launcher, tmp_path: Path) -> None:
    host = Host(tmp_path / "sys")
    launcher.env["PATH"] = f"{host.nvidia_smi(tmp_path / 'bin')}:{launcher.env['PATH']}"
    words = launcher.print("coordinator", "--sysfs", str(host.root), "--discovery", "etcd://127.0.0.1:2379")
    assert value_of(words, "--link-host") == "127.0.0.1"
    assert not [word for word in words if word.startswith(("CUDA", "UCX", "NCCL", "--worker-id", "taskset"))]


@pytest.mark.parametrize(
    ("words", "env", "says"),
    [
        (["decoder"], {}, "write one of coordinator, prefill, decode, mixed"),
        (["decode-1"], {"CUDA_VISIBLE_DEVICES": "0"}, "start fewer workers"),
        (["decode"], {"BATON_FLAGS": "--model 'a"}, "BATON_FLAGS cannot be split"),
        (["decode"], {"BATON_INTERFACE": "ib7"}, "BATON_INTERFACE is 'ib7'"),
        (["decode", "--discovery", "etcd://no.such.host.invalid:1"], {}, "no way to no.such.host.invalid"),
    ],
)
def test_what_cannot_be_started_is_said_with_what_to_change(
    launcher: Launcher, words: list[str], env: dict[str, str], says: str
) -> None:
    launcher.env |= env
    launcher.start(*words)
    assert says in launcher.end()
    assert launcher.process
    assert launcher.process.returncode == 2
    assert not launcher.notes()


def test_what_dies_is_started_again_later_each_time_and_what_drained_is_not(launcher: Launcher) -> None:
    launcher.start("decode", statuses="70 1 0")
    said = launcher.end()
    assert launcher.process
    assert launcher.process.returncode == 0
    assert len(launcher.notes()) == 3
    pauses = [float(found) for found in re.findall(r"started again in ([\d.]+) s", said)]
    assert len(pauses) == 2
    assert 0.7 <= pauses[0] <= 1.3 <= 1.5 <= pauses[1] <= 2.5
    assert "(status 70)" in said
    assert "as when it was drained" in said


def test_what_is_configured_wrong_is_not_started_again(launcher: Launcher) -> None:
    launcher.start("decode", statuses="2 0")
    said = launcher.end()
    assert launcher.process
    assert launcher.process.returncode == 2
    assert len(launcher.notes()) == 1
    assert "it is not started again" in said


def test_a_signal_is_passed_on_and_the_end_waited_for(launcher: Launcher) -> None:
    process = launcher.start("decode", "--model", "m")
    wait_for(lambda: len(launcher.notes()) == 1, "the stand-in started")
    assert f"--parent-pid {process.pid}" in launcher.notes()[0]
    process.terminate()
    launcher.end()
    assert process.returncode == 0
    assert launcher.notes()[1].endswith("SIGTERM")


def test_a_kill_is_survived_and_a_signal_during_the_pause_ends_it(launcher: Launcher) -> None:
    process = launcher.start("decode")
    wait_for(lambda: len(launcher.notes()) == 1, "the stand-in started")
    os.kill(int(launcher.notes()[0].split()[0]), signal.SIGKILL)
    wait_for(lambda: len(launcher.notes()) == 2, "it was started again")
    os.kill(int(launcher.notes()[1].split()[0]), signal.SIGKILL)
    assert process.stderr
    while "SIGKILL); started again in" not in process.stderr.readline():
        pass
    while "SIGKILL); started again in" not in process.stderr.readline():
        pass
    process.terminate()
    assert process.wait(10) == 0
    assert len(launcher.notes()) == 2
