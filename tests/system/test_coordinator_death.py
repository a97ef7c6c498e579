"""A coordinator dies (kill -9) and another takes its ports; its clients go on with exactly the tokens they missed.

Workers and coordinator are processes of their own here, because `baton serve` ends with its coordinator. Each test
proves that there were requests to lose.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from baton.client import Client
from baton.v1 import inference_pb2, inference_pb2_grpc
from tests.system.cluster import Cluster, alive

PROMPTS = [f"Number {number}: what does the function do, and why? " * (4 + 9 * number) for number in range(4)]
MAX_TOKENS = 200
OPTIONS: dict[str, Any] = {"max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
RESUME_FOR_S = 40.0


class Apart(Cluster):
    """A coordinator and workers that outlive each other."""

    def __init__(self, *kinds: str, orphan_s: float = 30.0, coordinator: tuple[str, ...] = ()) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", prefix="baton-apart-", suffix=".log")  # noqa: SIM115
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            self._ports = [each.getsockname()[1] for each in sockets]
        self.url, self.grpc = f"http://127.0.0.1:{self._ports[0]}", f"127.0.0.1:{self._ports[1]}"
        self._num_workers = len(kinds)
        self._words = coordinator
        self.start_coordinator()
        link = f"127.0.0.1:{self._ports[2]}"
        self._workers = [
            self._start(
                kind, "--worker-id", f"{kind}-{number}", "--coordinator", link, "--dtype", "float32",
                "--kv-memory", "64MiB", "--threads", "1", "--orphan-s", str(orphan_s),
            )
            for number, kind in enumerate(kinds)
        ]  # fmt: skip
        self.wait_for(self.complete, "every worker has registered", 120)

    def _start(self, *words: str) -> "subprocess.Popen[bytes]":
        parent = ("--parent-pid", str(os.getpid()))
        return subprocess.Popen([sys.executable, "-P", "-m", "cli.main", *words, *parent], stderr=self._log)

    def start_coordinator(self) -> None:
        ports = [word for name, port in zip(("port", "grpc-port", "link-port"), self._ports, strict=True)
                 for word in (f"--{name}", str(port))]  # fmt: skip
        self.coordinator = self._start("coordinator", *ports, *self._words)

    def complete(self) -> bool:
        with contextlib.suppress(OSError):
            return len(self.status()["workers"]) == self._num_workers
        return False

    def kill_coordinator(self) -> None:
        """And start the next."""
        self.coordinator.kill()
        self.coordinator.wait(10)
        assert not alive(self.coordinator.pid)
        self.start_coordinator()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        for process in (*self._workers, self.coordinator):
            process.kill()
            process.wait(10)
        return 0


@pytest.fixture(scope="module")
def pools() -> Iterator[Apart]:
    with Apart("prefill", "decode") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(pools: Apart) -> list[str]:
    body = {"model": "demo", **OPTIONS}
    return [str(pools.post("/v1/completions", body | {"prompt": each})["choices"][0]["text"]) for each in PROMPTS]


class Streams:
    """Every prompt asked by our own client, each in a thread. `reached`: the last has so many characters."""

    def __init__(self, cluster: Cluster, prompts: list[str], characters: int = 0) -> None:
        self._url = cluster.url
        self._characters = characters
        self.reached = threading.Event()
        self.pieces: list[list[str]] = [[] for _ in prompts]
        self.errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._ask, args=each) for each in enumerate(prompts)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int, prompt: str) -> None:
        try:
            with Client(self._url) as client:
                for delta in client.complete(prompt, **OPTIONS):
                    self.pieces[number].append(delta.text)
                    if number == len(self.pieces) - 1 and sum(map(len, self.pieces[-1])) >= self._characters:
                        self.reached.set()
        except Exception as error:  # noqa: BLE001 - shown by `texts`
            self.errors.append(error)

    def texts(self) -> list[str]:
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive(), "a stream never ended"
        assert not self.errors, self.errors
        return ["".join(pieces) for pieces in self.pieces]


@pytest.mark.parametrize(("moment", "share"), [("first token", 0.0), ("mid-stream", 0.5), ("last tokens", 0.93)])
def test_streams_of_our_own_client_go_on_when_their_coordinator_is_killed(
    pools: Apart, undisturbed: list[str], moment: str, share: float
) -> None:
    for _ in range(5):  # the last tokens may come before the blow
        streams = Streams(pools, PROMPTS, round(share * len(undisturbed[-1])))
        assert streams.reached.wait(60), moment
        pools.kill_coordinator()
        assert streams.texts() == undisturbed
        pools.wait_for(pools.complete, "all workers are there")
        if pools.metric("baton_requests_resumed_total", how="adopted") > 0:
            break
    else:
        raise AssertionError("there was nothing to lose")
    pools.wait_for(pools.is_whole, "every block is free or cached")


def test_streams_of_our_own_client_go_on_when_their_coordinator_hangs_and_goes_on(
    pools: Apart, undisturbed: list[str]
) -> None:
    pools.wait_for(pools.complete, "all workers are there")
    streams = Streams(pools, PROMPTS, len(undisturbed[-1]) // 2)
    assert streams.reached.wait(60)
    os.kill(pools.coordinator.pid, signal.SIGSTOP)
    try:
        time.sleep(3.5)  # clients and workers have both given it up
    finally:
        os.kill(pools.coordinator.pid, signal.SIGCONT)
    assert streams.texts() == undisturbed
    assert pools.metric("baton_requests_resumed_total", how="here") > 0, "clients came back"
    pools.wait_for(pools.complete, "all workers are there again")
    pools.wait_for(pools.is_whole, "every block is free or cached")


def test_prompts_that_were_being_computed_are_answered_too(pools: Apart, undisturbed: list[str]) -> None:
    pools.wait_for(pools.complete, "all workers are there")
    pids = [worker["pid"] for worker in pools.status()["workers"]]
    for pid in pids:  # so that no token can have come
        os.kill(pid, signal.SIGSTOP)
    try:
        streams = Streams(pools, PROMPTS)
        pools.wait_for(lambda: pools.status()["requests"] == len(PROMPTS), "all are assigned")
        pools.kill_coordinator()
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert streams.texts() == undisturbed
    pools.wait_for(pools.is_whole, "every block is free or cached")


def events_of(cluster: Cluster, body: dict[str, Any], id: str, on_event: Callable[[int], None]) -> list[dict[str, Any]]:
    """A stream as any SSE client reads it: where the connection breaks, on from the last event id."""
    found: list[dict[str, Any]] = []
    last, give_up_at = "", time.monotonic() + RESUME_FOR_S
    request = urllib.request.Request(
        cluster.url + "/v1/completions", json.dumps({"model": "demo", "stream": True, **OPTIONS, **body}).encode(),
        {"Content-Type": "application/json", "X-Request-Id": id},
    )  # fmt: skip
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException), urllib.request.urlopen(request) as answer:
            name = ""
            for line in answer:
                key, _, value = line.decode().rstrip("\n").partition(": ")
                if key == "id":
                    name = value
                elif key == "data" and value == "[DONE]":
                    return found
                elif key == "data":
                    found.append(json.loads(value))
                    last = name
                    on_event(len(found))
        assert time.monotonic() < give_up_at, "it could not be resumed"
        time.sleep(0.1)
        request = urllib.request.Request(cluster.url + f"/v1/streams/{id}", headers={"Last-Event-ID": last})


def merged(events: list[dict[str, Any]]) -> dict[int, Any]:
    """Per choice: text, tokens and their logprobs, ends."""
    found: dict[int, Any] = {}
    for event in events:
        assert "error" not in event, event
        for choice in event["choices"]:
            own = found.setdefault(choice["index"], {"text": "", "tokens": [], "logprobs": [], "ends": []})
            own["text"] += choice["text"]
            own["tokens"] += (choice["logprobs"] or {}).get("tokens", [])
            own["logprobs"] += (choice["logprobs"] or {}).get("token_logprobs", [])
            own["ends"] += [choice["finish_reason"]] * (choice["finish_reason"] is not None)
    found[-1] = [event["usage"]["completion_tokens"] for event in events if event.get("usage")]
    return found


@pytest.mark.parametrize("form", ["logprobs", "two choices", "stop string"])
def test_any_client_goes_on_from_its_last_event_id(pools: Apart, undisturbed: list[str], form: str) -> None:
    body: dict[str, Any] = {"prompt": PROMPTS[1], "stream_options": {"include_usage": True}}
    if form == "logprobs":
        body["logprobs"] = 1
    elif form == "two choices":
        body |= {"n": 2}
    else:  # the first time that it comes, its beginning has been held back for a while
        text = undisturbed[1]
        body["stop"] = next(
            text[at : at + 40] for at in range(len(text) // 2, len(text)) if text.find(text[at : at + 40]) == at
        )
    pools.wait_for(pools.complete, "all workers are there")
    whole = merged(events_of(pools, body, f"{form.replace(' ', '-')}-undisturbed", lambda count: None))

    def kill(count: int) -> None:
        if count == 30:
            pools.kill_coordinator()

    cut = merged(events_of(pools, body, f"{form.replace(' ', '-')}-cut-in-two", kill))
    # Their last bits depend on what ran in the same step, and on how much of the prompt was cached.
    assert cut[0].pop("logprobs") == pytest.approx(whole[0].pop("logprobs"), abs=1e-3)
    assert cut == whole
    assert pools.metric("baton_requests_resumed_total", how="adopted") == 1
    pools.wait_for(pools.is_whole, "every block is free or cached")


def test_logprobs_are_whole_although_the_first_token_came_from_the_prefill_worker_after_the_death(pools: Apart) -> None:
    """The decode worker has nothing yet when its coordinator dies; the prefill worker's own words reach nobody."""
    pools.wait_for(pools.complete, "all workers are there")
    body: dict[str, Any] = {"prompt": PROMPTS[2], "logprobs": 1, "cache_salt": "of this test"}
    generated = pools.metric("baton_worker_generated_tokens_total", worker="decode-1")
    whole = merged(events_of(pools, body, "logprobs-whole-undisturbed", lambda count: None))
    pools.wait_for(
        lambda: pools.metric("baton_worker_generated_tokens_total", worker="decode-1") > generated,
        "a report later than what the test before had adopted",
    )
    adopted = pools.metric("baton_worker_orphans_adopted_total", worker="decode-1")
    prefill = next(worker["pid"] for worker in pools.status()["workers"] if worker["id"] == "prefill-0")
    found: list[dict[str, Any]] = []
    body["cache_salt"] = "so that prefill has something to do"
    ask = threading.Thread(
        target=lambda: found.extend(events_of(pools, body, "logprobs-cut-before-any", lambda count: None))
    )
    pools.wait_for(pools.is_whole, "nothing of the first request is left")
    os.kill(prefill, signal.SIGSTOP)
    try:
        ask.start()
        pools.wait_for(lambda: not pools.is_whole(), "the decode worker has its assignment")
        pools.kill_coordinator()
    finally:
        os.kill(prefill, signal.SIGCONT)
    ask.join(60)
    cut = merged(found)
    pools.wait_for(
        lambda: pools.metric("baton_worker_orphans_adopted_total", worker="decode-1") == adopted + 1, "not begun again"
    )
    assert cut[0].pop("logprobs") == pytest.approx(whole[0].pop("logprobs"), abs=1e-3)
    assert cut == whole


def test_an_answer_that_is_not_streamed_is_had_by_its_id(pools: Apart) -> None:
    pools.wait_for(pools.complete, "all workers are there")
    id = "the-id-of-a-whole-answer"
    broken: list[BaseException] = []
    body = {"model": "demo", "prompt": PROMPTS[2], **OPTIONS, "max_tokens": 1000}
    undisturbed = pools.post("/v1/completions", body)["choices"][0]["text"]

    def ask() -> None:
        request = urllib.request.Request(
            pools.url + "/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "X-Request-Id": id},
        )
        try:
            urllib.request.urlopen(request).read()
        except (OSError, http.client.HTTPException) as error:
            broken.append(error)

    before = pools.metric("baton_worker_generated_tokens_total", worker="decode-1")
    thread = threading.Thread(target=ask)
    thread.start()
    pools.wait_for(
        lambda: pools.metric("baton_worker_generated_tokens_total", worker="decode-1") > before, "it decodes"
    )
    pools.kill_coordinator()
    thread.join(20)
    assert broken, "the coordinator died before its answer"
    give_up_at = time.monotonic() + RESUME_FOR_S
    while True:
        try:
            answer = json.loads(pools.get(f"/v1/requests/{id}"))
            break
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < give_up_at
            time.sleep(0.1)
    assert answer["id"] == id
    assert answer["choices"][0]["text"] == undisturbed
    assert answer["usage"]["completion_tokens"] == 1000


def test_grpc_goes_on_from_its_offsets(pools: Apart, undisturbed: list[str]) -> None:
    pools.wait_for(pools.complete, "all workers are there")
    id = "the-id-of-a-grpc-request"
    sampling = inference_pb2.Sampling(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    request = inference_pb2.GenerateRequest(text=PROMPTS[3], sampling=sampling, request_id=id)
    had: list[inference_pb2.GenerateResponse] = []

    def read() -> None:
        with grpc.insecure_channel(pools.grpc) as channel:
            for response in inference_pb2_grpc.InferenceStub(channel).Generate(request):
                had.append(response)
                if len(had) == 40:
                    pools.kill_coordinator()

    with pytest.raises(grpc.RpcError):
        read()
    pools.wait_for(pools.complete, "the workers found the new coordinator")
    position = inference_pb2.ChoicePosition(
        num_tokens=had[-1].first_index + len(had[-1].token_ids), digest=had[-1].digest
    )
    with grpc.insecure_channel(pools.grpc) as channel:
        resume = inference_pb2.ResumeRequest(request_id=id, positions=[position])
        rest = list(inference_pb2_grpc.InferenceStub(channel).Resume(resume))
    assert rest[0].first_index == position.num_tokens
    assert "".join(response.text for response in [*had, *rest]) == undisturbed[3]
    assert rest[-1].usage.completion_tokens == MAX_TOKENS


def test_where_no_client_comes_back_nothing_is_left_after_the_grace() -> None:
    with Apart("mixed", orphan_s=1.0) as cluster:
        body = json.dumps({"model": "demo", "prompt": PROMPTS[0], "stream": True, **OPTIONS, "max_tokens": 1500})
        request = urllib.request.Request(
            cluster.url + "/v1/completions", body.encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            answer.readline()
            assert cluster.status()["requests"] == 1
            cluster.kill_coordinator()
        cluster.wait_for(cluster.complete, "the worker found the new coordinator")
        cluster.wait_for(cluster.is_whole, "every block is free or cached")
        cluster.wait_for(
            lambda: cluster.metric("baton_worker_orphans_aborted_total", worker="mixed-0") == 1, "it was given up"
        )
        assert cluster.status()["requests"] == 0
        assert len(str(cluster.post("/v1/completions", {"model": "demo", "prompt": "x", **OPTIONS}))) > 100
