"""The files of deploy/slurm/ on a real Slurm: a job serves, loses processes, grows, reaches its limit and is cancelled.

Tests share one job where they run in one process; each submits its own where there is none.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port
from tests.slurm.cluster import INSTALLED, MISSING, Slurm, wait_for
from tests.system.test_serve import Oracle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason=MISSING),
    pytest.mark.skipif(not shutil.which("etcd"), reason="etcd is not installed: make system-packages"),
]
ROOT = Path(__file__).resolve().parents[2]
PROMPT = "The list type"
TOKENS = 500
"""Of a stream that still runs when something happens."""
SHAPES = (
    "--nodes=1", "--cpus-per-task=1", ":", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1",
    ":", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=2", "--cpus-per-task=1",
)  # fmt: skip
POOL_SHAPE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
WORKER_FLAGS = "--dtype float32 --kv-memory 64MiB --threads 1 --speculate off"


class Stream:
    """One stream in a thread of its own."""

    def __init__(self, url: str, max_tokens: int = TOKENS) -> None:
        self.text, self.error, self.num_events = "", "", 0
        self._url, self._max_tokens = url, max_tokens
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        body = {
            "model": "demo", "prompt": PROMPT, "max_tokens": self._max_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self._url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                for line in answer:
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        assert "error" not in event, event
                        self.text += event["choices"][0]["text"]
                        self.num_events += 1
                    elif line == b"data: [DONE]\n":
                        return
            self.error = "the stream broke off"
        except (OSError, AssertionError) as error:
            self.error = repr(error)

    @property
    def was_refused(self) -> bool:
        """Before it began: by a coordinator that drains, or by nobody."""
        ways = "503", "refused", "reset", "RemoteDisconnected"
        return not self.num_events and any(way in self.error for way in ways)

    def end(self) -> str:
        self._thread.join(90)
        assert not self._thread.is_alive(), "a stream never ended"
        return self.error or self.text


class Job:
    """A cluster of Baton: the job's id, and where its front door is."""

    def __init__(self, slurm: Slurm, **env: str) -> None:
        self.slurm = slurm
        self.port = free_port()
        self.pools: list[str] = []
        self._env = {
            **slurm.env, "BATON_PYTHON": sys.executable, "BATON_PORT": str(self.port),
            "BATON_COORDINATOR_FLAGS": "--grpc-port 0", "BATON_PREFILL_FLAGS": WORKER_FLAGS,
            "BATON_DECODE_FLAGS": WORKER_FLAGS, "BATON_REQUEUE": "yes", **env,
        }  # fmt: skip
        self.id = self.submit(*SHAPES, "deploy/slurm/baton.sbatch")

    def submit(self, *words: str) -> str:
        output = f"--output={self.slurm.folder}/job-%j.log"
        done = subprocess.run(
            ["sbatch", "--parsable", output, *words],
            env=self._env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().partition(";")[0]

    def add_pools(self, number: int = 2) -> None:
        self.pools.append(
            self.submit(f"--array=0-{number - 1}", *POOL_SHAPE, "deploy/slurm/pool.sbatch", "decode", self.id)
        )

    @property
    def url(self) -> str:
        """As the job says it to Slurm."""
        found = re.search(r"http://\S+", self.slurm.run("squeue", "-h", "-j", self.id, "-o", "%k"))
        return found[0] if found else ""

    def field(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", self.slurm.run("scontrol", "-o", "show", "job", self.id))
        return found[1] if found else ""

    def is_over(self) -> bool:
        return not self.slurm.run("squeue", "-h", "-j", self.id, "-o", "%i")

    def workers(self) -> dict[str, dict[str, Any]]:
        try:
            with urllib.request.urlopen(f"{self.url}/status", timeout=10) as answer:
                return {worker["id"]: worker for worker in json.load(answer)["workers"]}
        except (OSError, ValueError):
            return {}

    def of(self, kind: str) -> dict[str, dict[str, Any]]:
        return {name: worker for name, worker in self.workers().items() if name.startswith(kind)}

    def wait_for_workers(self, prefill: int = 1, decode: int = 1) -> None:
        wait_for(
            lambda: (len(self.of("prefill")), len(self.of("decode"))) == (prefill, decode),
            f"{prefill} prefill and {decode} decode workers", 90, self.log,
        )  # fmt: skip

    def log(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-6000:]}" for path in self.slurm.folder.glob("job-*.log"))


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    slurm = Slurm()
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    return []


@pytest.fixture
def job(slurm: Slurm, jobs: list[Job]) -> Iterator[Job]:
    """One that serves."""
    if not jobs or jobs[-1].is_over():
        jobs.append(Job(slurm))
    wait_for(lambda: bool(jobs[-1].of("prefill") and jobs[-1].of("decode")), "it serves", 90, jobs[-1].log)
    yield jobs[-1]
    print(jobs[-1].log())


@pytest.fixture(scope="module")
def beginning() -> str:
    """Of the stream, by transformers."""
    oracle = Oracle()
    oracle.model.generation_config.eos_token_id = None
    prompt = oracle.tokenizer.encode(PROMPT, add_special_tokens=False)
    return str(oracle.tokenizer.decode(oracle.continuation(prompt, 64), skip_special_tokens=True))


@pytest.fixture(scope="module")
def known() -> list[str]:
    return []


@pytest.fixture
def expected(job: Job, beginning: str, known: list[str]) -> str:
    """The text of a stream that nothing disturbed."""
    if not known:
        text = Stream(job.url).end()
        assert text.startswith(beginning), (text, beginning)
        assert len(text) > 5 * len(beginning)
        known.append(text)
    return known[0]


def test_a_submitted_job_serves_the_tokens_of_transformers_with_each_component_on_its_node(
    job: Job, expected: str
) -> None:
    assert Stream(job.url).end() == expected  # which begins as transformers would
    (prefill,), (decode,) = job.of("prefill"), job.of("decode")
    assert re.fullmatch(rf"prefill-n\d-0-{job.id}", prefill)
    assert re.fullmatch(rf"decode-n\d-0-{job.id}", decode)
    assert prefill.split("-")[1] != decode.split("-")[1]
    (process,) = job.slurm.pids("--worker-id", decode, "-P")
    assert "\0CUDA_VISIBLE_DEVICES=0\0" in Path(f"/proc/{process}/environ").read_text(), "the first of its two GPUs"


@pytest.mark.parametrize("kinds", [("decode", "etcd"), ("prefill", "coordinator")])
def test_killed_processes_come_back(job: Job, kinds: tuple[str, str], expected: str) -> None:
    words = {kind: ["etcd", "--name"] if kind == "etcd" else ["cli.main", kind, "--parent-pid"] for kind in kinds}
    workers = set(job.workers())
    before = {kind: job.slurm.pids(*words[kind]) for kind in kinds}
    assert [len(pids) for pids in before.values()] == [1, 1]
    stream = Stream(job.url)
    wait_for(lambda: stream.num_events > 5, "the stream runs")
    for (victim,) in before.values():
        os.kill(victim, signal.SIGKILL)
    if "coordinator" in kinds:
        stream.end()  # of a client that does not come back
    else:
        assert stream.end() == expected
    for kind in kinds:
        wait_for(
            lambda kind=kind: job.slurm.pids(*words[kind]) not in (before[kind], []), f"{kind} is back", 30, job.log
        )  # type: ignore[misc]
    wait_for(lambda: set(job.workers()) == workers, "all are back", 90, job.log)
    assert Stream(job.url).end() == expected


def test_pools_are_added_by_an_array_and_one_that_is_cancelled_drains(job: Job, expected: str) -> None:
    job.add_pools(2)
    job.wait_for_workers(decode=3)
    array = job.pools[-1]
    streams = [Stream(job.url) for _ in range(4)]
    wait_for(lambda: all(stream.num_events > 5 for stream in streams), "all run")
    number = job.slurm.run("squeue", "-h", "-j", f"{array}_1", "-o", "%A")
    (leaver,) = [name for name in job.of("decode") if name.endswith(f"-{number}")]
    wait_for(lambda: job.workers()[leaver]["running"] > 0, "some run on it", 10, job.log)
    job.slurm.run("scancel", f"{array}_1")
    assert [stream.end() for stream in streams] == [expected] * 4
    wait_for(lambda: leaver not in job.workers(), "it is gone", 30, job.log)
    assert Stream(job.url).end() == expected


def test_at_the_time_limit_streams_end_and_the_job_and_its_pools_go_on_after_a_requeue(job: Job, expected: str) -> None:
    if not job.pools:
        job.add_pools(1)
        job.wait_for_workers(decode=2)
    num_decode = len(job.of("decode"))
    ended: list[Stream] = []
    url = job.url

    def ask() -> None:
        while not ended or not ended[-1].error:
            stream = Stream(url)
            stream.end()
            ended.append(stream)

    # Slurm looks twice a minute which jobs are within their last 120 s, and half a minute ahead.
    job.slurm.run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={_minutes(job.field('RunTime')) + 3}")
    asking = threading.Thread(target=ask)
    asking.start()
    asking.join(90)
    assert not asking.is_alive(), "nothing drained"
    assert len(ended) > 1
    assert [stream.text for stream in ended[:-1]] == [expected] * (len(ended) - 1)
    assert ended[-1].was_refused, ended[-1].error
    wait_for(lambda: "all is drained; queued again" in job.log(), "the job asks to be queued again", 60, job.log)
    job.slurm.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=UNLIMITED")
    first_life = (job.slurm.folder / f"job-{job.id}.log").read_text()
    assert re.findall(r"(\w+)\S* (?:baton.events|worker.shell): draining", first_life)[0] == "coordinator"
    assert len(re.findall("worker.shell: draining", first_life)) == 2
    wait_for(lambda: job.field("Restarts") == "1" and job.field("JobState") == "RUNNING", "it runs again", 60, job.log)
    job.wait_for_workers(decode=num_decode)
    assert Stream(job.url).end() == expected


def test_a_cancelled_job_ends_its_streams_and_then_its_processes_and_pools(job: Job, expected: str) -> None:
    url = job.url
    streams = [Stream(url) for _ in range(2)]
    wait_for(lambda: all(stream.num_events > 5 for stream in streams), "both run")
    job.slurm.run("scancel", job.id)
    wait_for(lambda: is_refused(url), "nothing new is taken")
    assert [stream.end() for stream in streams] == [expected] * 2
    wait_for(job.is_over, "the job is over", 40, job.log)
    for pool in job.pools:
        wait_for(lambda pool=pool: not job.slurm.run("squeue", "-h", "-j", pool, "-o", "%i"), "so are its pools", 60,
                 job.log)  # fmt: skip
    assert not job.slurm.pids("cli.main")
    assert not job.slurm.pids("etcd")


def is_refused(url: str) -> bool:
    stream = Stream(url, max_tokens=1)
    stream.end()
    return stream.was_refused


def _minutes(elapsed: str) -> int:
    """Of hours:minutes:seconds."""
    return int(elapsed.split(":")[-2]) + 60 * int(elapsed.split(":")[-3])
