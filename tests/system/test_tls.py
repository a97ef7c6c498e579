"""Clusters of real processes with TLS on every wire: the same tokens, the same recovery, and no word to strangers."""

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import grpc
import pytest

from baton.v1 import inference_pb2, inference_pb2_grpc
from tests.authority import Authority, Files
from tests.system.cluster import Cluster
from tests.system.test_coordinator_death import OPTIONS, PROMPTS, Apart, Streams

BODY = {"model": "demo", **OPTIONS}


class Safe(Apart):
    """Inside and outside with TLS. Whoever asks it trusts the authority of SSL_CERT_FILE."""

    def __init__(self, files: Files, lanes: str, *kinds: str) -> None:
        self._files, self._lanes = files, lanes
        super().__init__(*kinds)

    @cached_property
    def operator_port(self) -> int:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return int(free.getsockname()[1])

    def _start(self, *words: str) -> "subprocess.Popen[bytes]":
        own = ["--lanes", self._lanes]
        if words[0] == "coordinator":
            own = [*self._files.public_flags(), "--operator-port", str(self.operator_port)]
        return super()._start(*words, *self._files.flags(), *own)

    @property
    def url(self) -> str:
        return self._url

    @url.setter
    def url(self, url: str) -> None:
        self._url = url.replace("http://", "https://")

    @property
    def ports(self) -> list[int]:
        """HTTP, gRPC, link."""
        return self._ports

    def texts(self) -> list[str]:
        return [str(self.post("/v1/completions", BODY | {"prompt": each})["choices"][0]["text"]) for each in PROMPTS]

    def refused(self, side: str) -> float:
        return self.metric("baton_tls_refused_total", side=side)

    def whole_log(self) -> str:
        return Path(self._log.name).read_text()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "ours")


@pytest.fixture(scope="module")
def files(authority: Authority) -> Files:
    return authority.sign("all")


@pytest.fixture(scope="module", autouse=True)
def trusts_ours(authority: Authority) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(authority.ca))
        yield


@pytest.fixture(scope="module")
def safe(files: Files) -> Iterator[Safe]:
    with Safe(files, "tcp", "prefill", "decode", "decode") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed() -> list[str]:
    """Without TLS, by one worker."""
    with Cluster("--mixed", "1", "--dtype", "float32", "--kv-memory", "64MiB") as cluster:
        return [str(cluster.post("/v1/completions", BODY | {"prompt": each})["choices"][0]["text"]) for each in PROMPTS]


def test_tokens_are_those_without_tls_and_blocks_come_by_tcp(safe: Safe, undisturbed: list[str]) -> None:
    assert safe.texts() == undisturbed
    received = sum(
        safe.metric("baton_worker_handover_blocks_received_total", worker=f"decode-{number}") for number in (1, 2)
    )
    assert received > 0
    assert safe.metric("baton_lane_in_use", lane="tcp") > 0
    assert safe.refused("inside") == safe.refused("public") == 0


def test_operators_on_the_machine_need_no_certificate(safe: Safe) -> None:
    environment = os.environ | {"BATON_URL": f"http://127.0.0.1:{safe.operator_port}"}
    command = [sys.executable, "-P", "-m", "cli.main", "status"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert "decode-2" in shown.stdout
    assert f"ask http://127.0.0.1:{safe.operator_port} (BATON_URL)" in safe.whole_log()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", safe.operator_port), 5).close()


def test_tokens_are_those_without_tls_over_shared_memory(files: Files, undisturbed: list[str]) -> None:
    with Safe(files, "shm", "prefill", "decode") as cluster:
        assert cluster.texts() == undisturbed
        assert cluster.metric("baton_lane_in_use", lane="shm") == 1
        assert cluster.metric("baton_worker_handover_blocks_received_total", worker="decode-1") > 0


def test_grpc_clients_get_the_same_tokens(safe: Safe, authority: Authority, undisturbed: list[str]) -> None:
    sampling = inference_pb2.Sampling(temperature=0, max_tokens=OPTIONS["max_tokens"], ignore_eos=True)
    request = inference_pb2.GenerateRequest(text=PROMPTS[0], sampling=sampling)
    with grpc.secure_channel(safe.grpc, grpc.ssl_channel_credentials(authority.ca.read_bytes())) as channel:
        text = "".join(each.text for each in inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60))
    assert text == undisturbed[0]


def test_streams_go_on_when_the_coordinator_is_killed(safe: Safe, undisturbed: list[str]) -> None:
    safe.wait_for(safe.complete, "all workers are there")
    streams = Streams(safe, PROMPTS, len(undisturbed[-1]) // 2)
    assert streams.reached.wait(60)
    safe.kill_coordinator()
    assert streams.texts() == undisturbed
    assert safe.metric("baton_requests_resumed_total", how="adopted") > 0, "there was something to lose"
    safe.wait_for(safe.complete, "all workers found the new one")


# Strangers


def plain_peer(port: int) -> bytes:
    """What somebody without TLS hears: nothing, or an alert, and the end of the connection."""
    heard = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 200)
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(4096):
                heard += piece
    return heard


@pytest.mark.parametrize("number", [0, 1, 2], ids=["http", "grpc", "link"])
def test_a_port_with_tls_has_no_word_for_a_plain_peer_and_serves_on(
    safe: Safe, number: int, undisturbed: list[str]
) -> None:
    side = ("public", None, "inside")[number]
    before = safe.refused(side) if side else 0.0
    silent = [socket.create_connection(("127.0.0.1", safe.ports[number]), timeout=10) for _ in range(3)]
    heard = plain_peer(safe.ports[number])
    assert heard == b"" or heard.startswith(b"\x15\x03"), heard
    if side:
        safe.wait_for(lambda: safe.refused(side) > before, "it is counted")
    assert safe.post("/v1/completions", BODY | {"prompt": PROMPTS[0]})["choices"][0]["text"] == undisturbed[0]
    for each in silent:
        each.close()


def test_a_peer_without_a_certificate_gets_no_link(safe: Safe, authority: Authority) -> None:
    before = safe.refused("inside")
    context = ssl.create_default_context(cafile=str(authority.ca))
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", safe.ports[2]), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="coordinator.baton") as connection,
        contextlib.suppress(OSError),
    ):
        assert connection.recv(1) == b""
    safe.wait_for(lambda: safe.refused("inside") > before, "it is counted")
    assert safe.complete()


def worker_ends(port: int, *flags: str) -> str:
    """What a decode worker says that ends by itself."""
    words = ["decode", "--coordinator", f"127.0.0.1:{port}", "--worker-id", "stranger", "--kv-memory", "16MiB"]
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "cli.main", *words, *flags], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2, ended.stderr
    return ended.stderr


@pytest.mark.parametrize(
    ("who", "says"),
    [
        ("no certificate", "it talks TLS only; add --tls-cert, --tls-key and --tls-ca here"),
        ("another cluster", "its certificate is not good: .*compare --tls-ca here"),
        ("another authority", "it refused the certificate of --tls-cert; compare --tls-ca there"),
        ("an expired certificate", "does not pass for --tls-ca .*: certificate has expired"),
    ],
)
def test_a_worker_that_does_not_belong_here_ends_and_says_what_to_change(
    safe: Safe, authority: Authority, tmp_path: Path, who: str, says: str
) -> None:
    flags: list[str] = []
    if who == "an expired certificate":
        flags = authority.sign("expired", days=-1).flags()
    elif who != "no certificate":
        theirs = Authority(tmp_path, "theirs").sign("worker")
        if who == "another authority":  # it trusts ours, but is of another itself
            both = tmp_path / "both.pem"
            both.write_bytes(authority.ca.read_bytes() + Path(theirs.ca).read_bytes())
            theirs = theirs._replace(ca=str(both))
        flags = theirs.flags()
    before = safe.refused("inside")
    assert re.search(says, worker_ends(safe.ports[2], *flags))
    if who != "an expired certificate":  # that one found out by itself
        safe.wait_for(lambda: safe.refused("inside") > before, "it is counted")
        assert "link: a peer was refused" in safe.whole_log()
    assert len(safe.status()["workers"]) == 3


def test_a_worker_with_tls_does_not_talk_to_a_coordinator_without(files: Files) -> None:
    with Apart("mixed") as plain:
        assert "it talks no TLS; add --tls-cert" in worker_ends(plain._ports[2], *files.flags())


def test_no_worker_can_pose_as_a_coordinator(authority: Authority, tmp_path: Path) -> None:
    impostor = authority.sign("worker-7", names="DNS:worker-7")
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "cli.main", "coordinator", "--port", "0", *impostor.flags()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "it needs the name DNS:coordinator.baton" in ended.stderr
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # nor with another program
    context.load_cert_chain(impostor.cert, impostor.key)
    context.set_alpn_protocols(["h2"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        words = ["decode", "--coordinator", f"127.0.0.1:{listener.getsockname()[1]}", "--kv-memory", "16MiB"]
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "cli.main", *words, *authority.sign("worker-8", names="").flags()],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while worker.poll() is None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                listener.settimeout(2)
                connection.settimeout(5)
                context.wrap_socket(connection, server_side=True).recv(100)
    assert worker.wait(10) == 2
    assert worker.stderr is not None
    assert "not valid for 'coordinator.baton'" in worker.stderr.read()


# What is not changed by TLS, and what is replaced


def test_status_answers_this_machine_and_not_who_speaks_for_others(safe: Safe) -> None:
    assert safe.status()["workers"]
    request = urllib.request.Request(safe.url + "/status", headers={"X-Forwarded-For": "192.0.2.7"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=10)


def test_no_key_is_shown_anywhere(safe: Safe, files: Files) -> None:
    secret = [line for line in Path(files.key).read_text().splitlines() if "-----" not in line]
    shown = [safe.whole_log(), json.dumps(safe.status()), safe.get("/metrics")]
    shown += [Path(f"/proc/{process.pid}/cmdline").read_text() for process in (*safe._workers, safe.coordinator)]
    doctor = subprocess.run(
        [sys.executable, "-P", "-m", "cli.main", "doctor", "--lanes", "tcp", *files.flags()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert doctor.returncode == 0, doctor.stderr
    shown += [doctor.stdout, doctor.stderr]
    assert not [line for line in secret for text in shown if line in text]


def test_streams_of_a_killed_decode_worker_go_on_and_it_may_come_back(safe: Safe, undisturbed: list[str]) -> None:
    safe.wait_for(safe.complete, "all workers are there")
    streams = Streams(safe, PROMPTS, len(undisturbed[-1]) // 2)
    assert streams.reached.wait(60)
    busiest = max(safe.status()["workers"], key=lambda worker: worker["running"])
    assert busiest["running"]
    os.kill(busiest["pid"], signal.SIGKILL)
    assert streams.texts() == undisturbed
    assert safe.metric("baton_attempts_failed_total", cause="worker_lost") > 0
    safe.wait_for(lambda: len(safe.status()["workers"]) == 2, "it is gone")


def served_serial(port: int, ca: str) -> str:
    context = ssl.create_default_context(cafile=ca)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        return str((connection.getpeercert() or {})["serialNumber"])


@pytest.mark.slow
def test_new_files_are_used_without_a_restart_and_bad_ones_are_not(
    authority: Authority, tmp_path: Path, undisturbed: list[str]
) -> None:
    first, second = authority.sign("first"), authority.sign("second")
    own = Files(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"), first.ca)

    def install(cert: str, key: str) -> None:
        for source, target in ((cert, own.cert), (key, own.key)):
            part = tmp_path / "part"
            part.write_bytes(Path(source).read_bytes())
            part.chmod(0o600)
            part.replace(target)

    install(first.cert, first.key)
    with Safe(own, "tcp", "mixed") as cluster:
        before = served_serial(cluster.ports[0], own.ca)
        install(second.cert, first.key)  # which is not its key
        cluster.wait_for(lambda: cluster.metric("baton_tls_reload_failures_total") == 2, "inside and outside")
        cluster.wait_for(lambda: cluster.metric("baton_worker_tls_reload_failures_total") == 1, "and in the worker")
        assert served_serial(cluster.ports[0], own.ca) == before
        install(second.cert, second.key)
        cluster.wait_for(lambda: cluster.metric("baton_tls_reloads_total") == 2, "inside and outside")
        for port in cluster.ports[:2]:
            assert served_serial(port, own.ca) != before
        assert "new TLS files are not used" in cluster.whole_log()
        assert cluster.post("/v1/completions", BODY | {"prompt": PROMPTS[0]})["choices"][0]["text"] == undisturbed[0]
        started = time.monotonic()
        cluster.kill_coordinator()  # the worker's next link is one with the new files
        cluster.wait_for(cluster.complete, "the worker is back")
        assert time.monotonic() - started < 30


def test_baton_serve_passes_all_of_it_on_and_asks_with_a_certificate_where_it_must(
    files: Files, authority: Authority, undisturbed: list[str]
) -> None:
    client = authority.sign("client", names="")
    words = (*files.flags(), *files.public_flags(), "--public-tls-client-ca", files.ca,
             "--client-cert", client.cert, "--client-key", client.key)  # fmt: skip
    with Cluster("--dtype", "float32", "--kv-memory", "64MiB", "--no-restart", *words) as cluster:
        assert cluster.url.startswith("https://")
        shows = ["--url", cluster.url, "--ca", files.ca, "--client-cert", client.cert, "--client-key", client.key]

        def baton(*words: str) -> "subprocess.CompletedProcess[str]":
            command = [sys.executable, "-P", "-m", "cli.main", *words]
            return subprocess.run(command, capture_output=True, text=True, timeout=60)

        without = baton("status", *shows[:4])
        assert without.returncode == 1
        assert "does it want a certificate (--client-cert)?" in without.stderr
        answered = baton("complete", *shows, "--temperature", "0", "--max-tokens", "20", "Hello")
        assert answered.returncode == 0, answered.stderr
        assert len(answered.stdout) > 5
