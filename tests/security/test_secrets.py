"""No secret and no word of a prompt is in what operators and other users of a machine see.

That is logs, metrics, statuses, traces, errors, command lines, the audit log.
"""

import json
import os
import re
import secrets
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc as rpc
from tests.authority import Authority, Files
from tests.system.test_coordinator_death import Apart
from tests.system.test_tls import Safe

PROMPT = f"canary{secrets.token_hex(8)}"
SALT, HUB, ETCD = (f"{name}-{secrets.token_hex(8)}" for name in ("salt", "hf", "etcd"))
BAD_KEY = f"sk-baton-{secrets.token_hex(20)}"


class Guarded(Safe):
    """With keys, an audit log, TLS on every wire and a login for an etcd that is not there."""

    def __init__(self, files: Files, folder: Path) -> None:
        self._files, self._lanes = files, "tcp"
        self.keys, self.audit_log, login = folder / "keys.toml", folder / "audit.jsonl", folder / "login"
        login.write_text(f"root:{ETCD}\n")
        login.chmod(0o600)
        made = subprocess.run(
            [sys.executable, "-P", "-m", "cli.main", "key", "create", "--keys", str(self.keys), "--tenant", "acme"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        self.key = made.stdout.strip()
        Apart.__init__(
            self, "prefill", "decode",
            coordinator=("--keys", str(self.keys), "--audit-log", str(self.audit_log), "--discovery-login", str(login),
                         "--discovery", "etcd://127.0.0.1:1"),
        )  # fmt: skip

    def ask(self, path: str, body: Any, key: str = "", **headers: str) -> tuple[int, str]:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers |= {"Content-Type": "application/json", "Authorization": f"Bearer {key or self.key}"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def noise(self, said: bytes) -> str:
        context = ssl.create_default_context(cafile=self._files.ca)
        with (
            socket.create_connection(("127.0.0.1", self.ports[0]), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            connection.sendall(said)
            heard = b""
            while piece := connection.recv(4096):
                heard += piece
            return heard.decode(errors="replace")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("secrets")
    authority = Authority(folder, "ours")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(authority.ca))
        patch.setenv("HF_TOKEN", HUB)
        with Guarded(authority.sign("all"), folder) as cluster:
            yield cluster


def test_nothing_that_is_secret_and_nothing_of_a_prompt_is_shown(guarded: Guarded) -> None:
    good = {"prompt": PROMPT, "max_tokens": 8, "cache_salt": SALT}
    status, answer = guarded.ask("/v1/completions", good)
    assert status == 200
    said = json.loads(answer)["choices"][0]["text"]
    errors = [
        guarded.ask("/v1/completions", good, key=BAD_KEY),
        guarded.ask("/v1/completions", {**good, "temperature": PROMPT}),
        guarded.ask("/v1/completions", {**good, "cache_salt": SALT * 100}),
        guarded.ask("/v1/completions", {**good, "max_tokens": 10**6}),
        guarded.ask("/v1/completions", f'{{"prompt": "{PROMPT}'.encode()),
        guarded.ask("/v1/chat/completions", {"messages": [{"role": PROMPT, "content": PROMPT}]}),
        guarded.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": PROMPT}]}]}),
        guarded.ask("/status", None, key=BAD_KEY),
        guarded.ask("/v1/completions", b"x" * 2_000_000),
    ]  # fmt: skip
    assert {status for status, _ in errors} <= {400, 401, 403, 413, 422}
    shown = [body for _, body in errors]
    bearer = f"Authorization: Bearer {guarded.key}"
    for head in (f"{bearer}\0", bearer + "x" * 9000, bearer.partition(": ")[2]):
        shown += [guarded.noise(f"GET /health HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())]
    credentials = grpc.ssl_channel_credentials(Path(guarded._files.ca).read_bytes())
    with grpc.secure_channel(guarded.grpc, credentials) as channel:
        request = api.GenerateRequest(text=PROMPT, cache_salt=SALT, sampling={"top_p": 7})
        for key in (BAD_KEY, guarded.key):
            told = [("authorization", f"Bearer {key}")]
            call = rpc.InferenceStub(channel).Generate(request, metadata=told, timeout=30)
            with pytest.raises(grpc.RpcError) as failed:
                list(call)
            shown += [str(failed.value)]
    shown += [json.dumps(guarded.status()), guarded.get("/metrics"), guarded.ask("/v1/usage", None)[1]]
    shown += [guarded.get("/dashboard/feed"), guarded.ask(f"/v1/requests/{json.loads(answer)['id']}/trace", None)[1]]
    assert '"spans"' in shown[-1]
    for pid in (guarded.coordinator.pid, *(worker.pid for worker in guarded._workers)):
        shown.append(Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(guarded._workers[1].pid, 9)  # whatever a death has the others say
    guarded.wait_for(lambda: len(guarded.status()["workers"]) == 1, "it is gone")
    guarded.wait_for(lambda: guarded.audit_log.exists() and guarded.audit_log.read_text() != "", "the audit's line")
    shown += [guarded.audit_log.read_text(), guarded.whole_log()]
    assert "lost" in shown[-1], "this is the log"

    pem = [line for line in Path(guarded._files.key).read_text().splitlines() if "-----" not in line]
    of_tenants = re.findall(r'secret = "(.+?)"', guarded.keys.read_text())
    hidden = [guarded.key, guarded.key[9:], BAD_KEY, BAD_KEY[9:], PROMPT, SALT, HUB, ETCD, *pem, *of_tenants]
    assert of_tenants
    assert len(pem) >= 2
    for number, text in enumerate(shown):
        assert [each for each in hidden if each in text] == [], f"in {number}: {text[:200]}"
        if len(said.strip()) > 8:
            assert said.strip() not in text
