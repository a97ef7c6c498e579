"""Rolling upgrades as docs/upgrades.md describes them, on real processes and under load: no error, no wrong token."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coordinator.rollout import Rollout, parse_rollout
from tests.system.cluster import Cluster
from tests.system.test_pools import TIMEOUT_S, Parts

DEMO = Path(__file__).resolve().parents[2] / "engine" / "demo_model"
PROMPTS = [f"Number {number}: what does the function do, and why? " * (4 + number) for number in range(4)]
MAX_TOKENS, CLIENTS = 24, 3


@dataclass
class Answer:
    id: str
    prompt: int
    text: str
    version: str


def stream(
    url: str, prompt: int, max_tokens: int = MAX_TOKENS, on_text: Callable[[], None] = lambda: None, id: str = ""
) -> Answer:
    """One streamed answer, asked for once: whatever goes wrong on the way is an exception."""
    id = id or uuid.uuid4().hex
    body = {
        "prompt": PROMPTS[prompt], "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True
    }  # fmt: skip
    headers = {"Content-Type": "application/json", "X-Request-Id": id}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), headers)
    text, versions = "", set()
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            data = line.decode().strip().removeprefix("data: ")
            if data == "[DONE]":
                assert len(versions) == 1
                return Answer(id, prompt, text, versions.pop())
            if data.startswith("{"):
                event = json.loads(data)
                assert "error" not in event, event
                versions.add(event["system_fingerprint"])
                text += event["choices"][0]["text"]
                on_text()
    raise AssertionError("the stream broke off")


@dataclass
class Load:
    """Clients that ask one thing after the other until the load is stopped."""

    url: str
    answers: list[tuple[float, Answer]] = field(default_factory=list)
    """And when each was asked for."""
    errors: list[Exception] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        for prompt in itertools.cycle((number, number + 1)):
            if self._over.is_set():
                return
            asked_s = time.monotonic()
            try:
                self.answers.append((asked_s, stream(self.url, prompt)))
            except Exception as error:  # noqa: BLE001 - whatever it is, the test names it
                self.errors.append(error)
                return

    def more(self, count: int = 8) -> list[Answer]:
        """Waits for so many more answers that were asked for after now."""
        now = time.monotonic()
        while len(found := [answer for asked_s, answer in list(self.answers) if asked_s > now]) < count:
            assert not self.errors, self.errors
            assert time.monotonic() < now + 2 * TIMEOUT_S, "the load stands still"
            time.sleep(0.02)
        return found

    def stop(self) -> list[Answer]:
        self._over.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive(), "a request never ended"
        assert not self.errors, self.errors
        return [answer for _, answer in self.answers]


def baton(*words: str) -> "subprocess.CompletedProcess[str]":
    """As an operator types it."""
    command = [sys.executable, "-P", "-m", "cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def drain(url: str, *words: str) -> str:
    """Until the workers have ended."""
    done = baton("drain", *words, "--wait", "--url", url)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def new_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model after a little more training, as it were."""
    folder = tmp_path_factory.mktemp("models") / "new"
    shutil.copytree(DEMO, folder)
    generator = torch.Generator().manual_seed(7)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if "norm" not in name:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * 0.3
            weights[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    parts = Parts(tmp_path)
    try:
        yield parts
    finally:
        parts.stop()


def metric(parts: Parts, start: str) -> float:
    with urllib.request.urlopen(parts.url + "/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


@pytest.mark.slow
def test_every_worker_is_replaced_one_by_one_under_load(parts: Parts) -> None:
    names = ("prefill-0", "prefill-1", "decode-0", "decode-1")
    parts.start("coordinator", "--port", str(parts.http), "--grpc-port", str(parts.grpc), "--link-port",
                str(parts.link), "--local-prefill-tokens", "16")  # fmt: skip
    for name in names:
        parts.start_worker(name)
    parts.wait_for(*names)
    expected = [stream(parts.url, number).text for number in range(len(PROMPTS))]
    load = Load(parts.url)
    here, coming = list(names), [f"{name}-new" for name in names]
    parts.start_worker(coming[0])
    for name in names:
        load.more(2)
        parts.wait_for(*here, coming[0])
        here.append(coming.pop(0))
        if coming:
            parts.start_worker(coming[0])  # it loads while the old one ends
        assert name in drain(parts.url, name)
        assert parts.processes[name].wait(TIMEOUT_S) == 0
        here.remove(name)
    deadline = time.monotonic() + TIMEOUT_S
    while not all(parts.counted("generated_tokens", name) for name in here):  # as of their last heartbeats
        assert time.monotonic() < deadline, "a new worker gets nothing to do"
        load.more(4)
    for answer in load.stop():
        assert answer.text == expected[answer.prompt]
    for cause in ("worker_lost", "diverged", "gap", "ended", "expired"):
        assert metric(parts, f'baton_attempts_failed_total{{cause="{cause}"}}') == 0
    assert metric(parts, "baton_worker_handover_checksum_failures_total") == 0


class Canary:
    """An old and a new version behind one coordinator, and the file that says who gets what."""

    def __init__(self, parts: Parts, folder: Path, new_model: Path, first: str, *words: str) -> None:
        self.parts, self.file = parts, folder / "rollout.toml"
        self.file.write_text(first)
        ports = ["--port", str(parts.http), "--grpc-port", str(parts.grpc), "--link-port", str(parts.link)]
        parts.start("coordinator", *ports, "--rollout", str(self.file), *words)
        parts.start_worker("prefill-old", "--model-version", "old")
        parts.start_worker("decode-old", "--model-version", "old")
        self.start_new(new_model)
        parts.wait_for("prefill-old", "decode-old", "mixed-new")

    def start_new(self, new_model: Path) -> None:
        model = ["--model", str(new_model), "--served-name", "demo"]
        self.parts.start_worker("mixed-new", *model, "--model-version", "new")

    def says(self, text: str) -> Rollout:
        """Change the file, and wait until the coordinator has read it."""
        self.file.write_text(text)
        said = parse_rollout(text)
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            rows = {row["version"]: row for row in self.parts.status()["versions"]}
            if {name: row["weight"] for name, row in rows.items() if row["weight"] is not None} == said.weights and {
                name: row["shadow"] for name, row in rows.items() if row["shadow"]
            } == said.shadow:
                return said
            assert time.monotonic() < deadline, "the coordinator did not read the file"
            time.sleep(0.05)

    def own(self, version: str) -> list[str]:
        """What this version answers when it has everything."""
        self.says(f"[weights]\n{version} = 1\n")
        answers = [stream(self.parts.url, number) for number in range(len(PROMPTS))]
        assert {answer.version for answer in answers} == {version}
        return [answer.text for answer in answers]


@pytest.mark.slow
def test_a_canary_is_raised_by_editing_a_file_and_the_old_version_drained(
    parts: Parts, tmp_path: Path, new_model: Path
) -> None:
    canary = Canary(parts, tmp_path, new_model, "[weights]\nold = 1\nnew = 0\n")
    own = {"old": canary.own("old"), "new": canary.own("new")}
    assert not set(own["old"]) & set(own["new"]), "the models differ"

    canary.says("[weights]\nold = 100\nnew = 0\n")
    load = Load(parts.url)
    assert {answer.version for answer in load.more()} == {"old"}
    counts: dict[float, list[str]] = {}
    for percent in (10, 50):
        said = canary.says(f"[weights]\nold = {100 - percent}\nnew = {percent}\n")
        answers = load.more(30)
        assert [answer.version for answer in answers] == [said.pick(answer.id, said.weights) for answer in answers]
        counts[percent] = [answer.version for answer in answers]
    assert 0 <= counts[10].count("new") < counts[50].count("new"), "exactly the share is the unit tests'"
    shown = baton("status", "--url", parts.url).stdout
    assert "version new: weight 50, 1 workers, 0 draining" in shown
    canary.file.write_text("[weights]\nnew = \n")
    deadline = time.monotonic() + TIMEOUT_S
    while not metric(parts, "baton_rollout_errors_total"):
        assert time.monotonic() < deadline, "nobody saw that the file is broken"
        time.sleep(0.05)
    assert {answer.version for answer in load.more(20)} == {"old", "new"}, "what it said before is in force"
    canary.says("[weights]\nold = 0\nnew = 100\n")
    assert {answer.version for answer in load.more()} == {"new"}
    assert "prefill-old" in drain(parts.url, "--version", "old")
    assert [parts.processes[name].wait(TIMEOUT_S) for name in ("prefill-old", "decode-old")] == [0, 0]
    assert {answer.version for answer in load.more()} == {"new"}
    for answer in load.stop():
        assert answer.text == own[answer.version][answer.prompt], "wholly one model's answer"
    assert metric(parts, "baton_attempts_failed_total") == 0


@pytest.mark.slow
def test_the_only_worker_of_the_canary_is_killed(parts: Parts, tmp_path: Path, new_model: Path) -> None:
    canary = Canary(parts, tmp_path, new_model, "[weights]\nold = 1\nnew = 0\n")
    own = {version: canary.own(version) for version in ("old", "new")}
    said = canary.says("[weights]\nnew = 1\nold = 1\n")
    load = Load(parts.url)
    load.more(2)
    killed = parts.processes["mixed-new"]

    long = 600
    ids = (id for id in map(str, range(10**15, 10**16)) if said.pick(id, said.weights) == "new")
    id = next(ids)
    begun, streamed = threading.Event(), []
    one = threading.Thread(target=lambda: streamed.append(stream(parts.url, 0, long, begun.set, id)))
    one.start()
    assert begun.wait(TIMEOUT_S), "no token came"
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(TIMEOUT_S)
    parts.wait_for("prefill-old", "decode-old")
    # New requests go to the old version at once; what had begun at the new one waits for it.
    assert stream(parts.url, 1, id=next(ids)).version == "old"
    assert one.is_alive(), "it waits"
    canary.start_new(new_model)
    one.join(TIMEOUT_S)
    assert [answer.version for answer in streamed] == ["new"]
    answers = load.stop()
    assert {answer.version for answer in answers} == {"old", "new"}
    for answer in answers:
        assert answer.text == own[answer.version][answer.prompt]
    canary.says("[weights]\nnew = 1\n")
    assert stream(parts.url, 0, long).text == streamed[0].text
    assert metric(parts, "baton_version_absent_total") > 0
    assert metric(parts, 'baton_attempts_failed_total{cause="worker_lost"}') > 0


@pytest.mark.slow
def test_shadows_of_equal_weights_are_equal_and_of_others_are_not(
    parts: Parts, tmp_path: Path, new_model: Path
) -> None:
    canary = Canary(parts, tmp_path, new_model, "[weights]\nold = 1\n")
    parts.start_worker("mixed-twin", "--model-version", "twin")
    parts.wait_for("prefill-old", "decode-old", "mixed-new", "mixed-twin")
    expected = canary.own("old")
    canary.says("[weights]\nold = 1\n[shadow]\nnew = 1\ntwin = 1\n")
    for number in range(len(PROMPTS)):
        answer = stream(parts.url, number)
        assert (answer.version, answer.text) == ("old", expected[number])

    def compared(version: str, tokens: str) -> float:
        return metric(parts, f'baton_shadow_answers_total{{tokens="{tokens}",version="{version}"}}')

    deadline = time.monotonic() + TIMEOUT_S
    while compared("twin", "equal") + compared("new", "different") < 2 * len(PROMPTS):
        assert time.monotonic() < deadline, parts.logs()
        time.sleep(0.05)
    assert compared("twin", "different") == compared("new", "equal") == 0
    assert metric(parts, 'baton_version_ttft_seconds_count{traffic="shadow"') == 2 * len(PROMPTS)
    assert metric(parts, "baton_completion_tokens_total") == 2 * len(PROMPTS) * MAX_TOKENS, "those of clients"


@pytest.mark.slow
def test_a_drain_is_known_to_every_coordinator_and_long_streams_are_moved() -> None:
    words = ("--coordinators", "2", "--decode", "2", "--dtype", "float32", "--kv-memory", "64MiB", "--no-restart")
    with Cluster(*words, "--drain-timeout-s", "0.3") as cluster:
        doors = [cluster.at(url) for url in cluster.urls]
        expected = stream(doors[0].url, 0, 3000).text
        answers: list[str] = []
        threads = [
            threading.Thread(target=lambda door=door: answers.append(stream(door.url, 0, 3000).text))
            for door in doors for _ in range(3)
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        cluster.wait_for(lambda: all(door.worker("decode-0")["running"] >= 2 for door in doors), "decode-0 is at work")
        assert "decode-0" in drain(doors[0].url, "decode-0")
        moved = sum(door.metric("baton_drains_total", event="moved") for door in doors)
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert answers == [expected] * len(threads)
        assert moved > 0, "they were long enough"
        wrong = baton("drain", "nobody", "--url", doors[0].url)
        assert (wrong.returncode, "worker nobody is not here" in wrong.stderr) == (1, True), wrong.stderr
        assert baton("drain").returncode == 2
        # The last decode worker goes, and prefill workers do its work.
        assert "decode-1" in drain(doors[1].url, "decode-1")
        for door in doors:
            text = stream(door.url, 0).text
            assert expected.startswith(text)
            assert text
            assert door.metric("baton_prefill_choice_total", choice="local_no_decode_worker") > 0
            assert door.metric("baton_attempts_failed_total", cause="worker_lost") == 0
