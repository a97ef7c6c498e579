"""Tenants with real processes: keys made by the command, two coordinators, a worker, HTTP and gRPC."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.client import Client
from baton.v1 import inference_pb2, inference_pb2_grpc
from tests.system.cluster import Cluster

PROMPT = "What does the function do, and why? " * 6
ID = "a-request-of-this-system-test"


def baton(*words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-m", "cli.main", *words],
        capture_output=True, text=True, timeout=60, env={**os.environ, **env},
    )  # fmt: skip


def new_key(path: Path, tenant: str, *words: str) -> str:
    made = baton("key", "create", "--keys", str(path), "--tenant", tenant, *words)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


@dataclass
class Tenancy:
    cluster: Cluster
    path: Path
    audit_log: Path
    acme: str
    other: str

    def ask(
        self, key: str, path: str, body: dict[str, Any] | None = None, door: int = 0, method: str | None = None,
        **headers: str,
    ) -> tuple[int, dict[str, Any]]:  # fmt: skip
        data = None if body is None else json.dumps(body).encode()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        headers["Content-Type"] = "application/json"
        request = urllib.request.Request(self.cluster.urls[door] + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def usage(self, key: str) -> dict[str, int]:
        """Of the key's tenant, at both coordinators together."""
        both = [self.ask(key, "/v1/usage", door=door)[1]["data"][0] for door in range(2)]
        return {name: sum(each[name] for each in both) for name in ("input_tokens", "output_tokens")}


@pytest.fixture(scope="module")
def tenancy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenancy]:
    folder = tmp_path_factory.mktemp("tenants")
    path, audit_log = folder / "keys.toml", folder / "audit.jsonl"
    acme, other = new_key(path, "acme"), new_key(path, "other")
    words = ("--mixed", "1", "--coordinators", "2", "--dtype", "float32", "--kv-memory", "64MiB")
    files = ("--keys", str(path), "--audit-log", str(audit_log))
    # A key in the environment is for clients: this command must not ask its own coordinators with it.
    with Cluster(*words, *files, env={"BATON_API_KEY": "sk-baton-of-somebody"}) as cluster:
        yield Tenancy(cluster, path, audit_log, acme, other)


def test_only_keys_are_served_over_http_grpc_and_by_the_commands(tenancy: Tenancy, tmp_path: Path) -> None:
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True}
    before = tenancy.usage(tenancy.acme)
    assert tenancy.ask("", "/v1/completions", body)[0] == 401
    assert tenancy.ask("", "/health")[0] == 200
    status, answer = tenancy.ask(tenancy.acme, "/v1/completions", body)
    assert status == 200
    with grpc.insecure_channel(tenancy.cluster.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        sampling = inference_pb2.Sampling(max_tokens=8, ignore_eos=True)
        request = inference_pb2.GenerateRequest(text=PROMPT, sampling=sampling)
        with pytest.raises(grpc.RpcError) as raised:
            list(stub.Generate(request, timeout=30))
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
        metadata = (("authorization", f"Bearer {tenancy.acme}"),)
        responses = list(stub.Generate(request, timeout=60, metadata=metadata))
        assert sum(len(response.token_ids) for response in responses) == 8
    key_file = tmp_path / "key"
    key_file.write_text(tenancy.acme)
    key_file.chmod(0o600)
    words = ("complete", PROMPT, "--max-tokens", "8", "--url", tenancy.cluster.url)
    refused = baton(*words)
    assert refused.returncode == 1
    assert "--api-key-file" in refused.stderr
    assert baton(*words, "--api-key-file", str(key_file)).returncode == 0
    assert baton(*words, BATON_API_KEY=tenancy.acme).returncode == 0
    used = tenancy.usage(tenancy.acme)
    assert used["input_tokens"] - before["input_tokens"] == 4 * answer["usage"]["prompt_tokens"]
    assert 16 < used["output_tokens"] - before["output_tokens"] <= 32  # the last two stop where the model does
    assert tenancy.usage(tenancy.other) == {"input_tokens": 0, "output_tokens": 0}
    log = tenancy.cluster.log()
    assert tenancy.acme not in log
    assert "sk-baton-of-somebody" not in log


def test_a_stranger_with_the_id_neither_gets_nor_disturbs_a_stream_at_another_coordinator(tenancy: Tenancy) -> None:
    started, pieces = threading.Event(), []
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 300, "ignore_eos": True, "temperature": 0}
    _, expected = tenancy.ask(tenancy.acme, "/v1/completions", body)

    def read() -> None:
        headers = {
            "Authorization": f"Bearer {tenancy.acme}", "Content-Type": "application/json", "X-Request-Id": ID,
            "X-Baton-Resume-S": "20",
        }  # fmt: skip
        data = json.dumps(body | {"stream": True}).encode()
        request = urllib.request.Request(tenancy.cluster.urls[0] + "/v1/completions", data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    pieces.append(json.loads(line[6:])["choices"][0]["text"])
                    started.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(30)
    assert reader.is_alive(), "there is a stream to disturb"
    for door in (1, 0):
        assert tenancy.ask(tenancy.other, f"/v1/requests/{ID}", door=door)[0] == 404
        assert tenancy.ask(tenancy.other, f"/v1/requests/{ID}", door=door, method="DELETE")[0] == 200
    reader.join(60)
    assert "".join(pieces) == expected["choices"][0]["text"]


def test_streams_of_a_tenant_go_on_at_the_other_coordinator_and_are_counted_there(tenancy: Tenancy) -> None:
    body = {"max_tokens": 300, "ignore_eos": True, "temperature": 0}
    _, expected = tenancy.ask(tenancy.acme, "/v1/completions", body | {"model": "demo", "prompt": PROMPT})
    at_other = tenancy.ask(tenancy.acme, "/v1/usage", door=1)[1]["data"][0]["output_tokens"]
    pids = tenancy.cluster.pids()
    with Client(",".join(tenancy.cluster.urls), api_key=tenancy.acme) as client:
        deltas = client.complete(PROMPT, **body)
        pieces = [next(deltas).text for _ in range(3)]
        os.kill(coordinator_at(pids, tenancy.cluster.urls[0]), signal.SIGKILL)
        pieces += [delta.text for delta in deltas]
    assert "".join(pieces) == expected["choices"][0]["text"]
    told = tenancy.ask(tenancy.acme, "/v1/usage", door=1)[1]["data"][0]["output_tokens"]
    assert told - at_other == 300
    tenancy.cluster.wait_for(lambda: _answers(tenancy), "the first coordinator is back", 30)


def _answers(tenancy: Tenancy) -> bool:
    try:
        return tenancy.ask("", "/ready")[0] == 200
    except OSError:
        return False


def coordinator_at(pids: list[int], url: str) -> int:
    """Which of these processes listens there."""
    port = url.rpartition(":")[2]
    for pid in pids[1:]:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"coordinator" in words and Path(f"/proc/{pid}/net/tcp").exists() and _listens(pid, int(port)):
            return pid
    raise AssertionError(f"no coordinator listens at {url}")


def _listens(pid: int, port: int) -> bool:
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    inodes = {line.split()[9] for line in lines if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"}
    sockets = {os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir() if each.exists() or each.is_symlink()}
    return any(f"socket:[{inode}]" in sockets for inode in inodes)


def test_a_key_that_is_taken_out_is_refused_within_a_second_and_the_log_is_whole(tenancy: Tenancy) -> None:
    fresh = new_key(tenancy.path, "late")

    def known(door: int) -> bool:
        return tenancy.ask(fresh, "/v1/models", door=door)[0] == 200

    for door in range(2):
        tenancy.cluster.wait_for(lambda door=door: known(door), "the new key is known", 5)  # type: ignore[misc]
    text = tenancy.path.read_text()
    tenancy.path.write_text(text[: text.index("[tenants.late]")])
    gone_s = time.monotonic()
    tenancy.cluster.wait_for(lambda: not known(0), "the key is refused", 5)
    assert time.monotonic() - gone_s < 3  # promised is one second; a busy machine takes longer for everything
    done = baton("audit", "verify", str(tenancy.audit_log), "--keys", str(tenancy.path))
    assert done.returncode == 0, done.stdout
    assert PROMPT[:20] not in tenancy.audit_log.read_text()
