"""Nothing that a client sends is dialled: requests have no place for an address, and none opens a connection."""

import ast
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import typing
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc as rpc
from coordinator import openai_api
from coordinator.drains import DrainRequest

ROOT = Path(__file__).resolve().parents[2]
PLACE = re.compile(r"(?i)ur[il]|host|addr|endpoint|port|callback|webhook|proxy|peer|server|file|path|link|image|fetch")
FREE = {"metadata": "not read", "chat_template_kwargs": "read by a sandboxed template, which can dial nobody",
        "tools": "refused unless empty", "tool_choice": "refused unless empty", "annotations": "not read"}  # fmt: skip
"""Fields of HTTP that may hold anything."""
DIALS = {
    "create_connection", "open_connection", "create_datagram_endpoint", "open_unix_connection", "sock_connect",
    "create_unix_connection", "connect", "connect_ex", "urlopen", "ClientSession", "insecure_channel", "secure_channel",
    "dial", "getaddrinfo", "create_subprocess_exec", "create_subprocess_shell", "Popen", "system", "sendto",
}  # fmt: skip


# What requests look like


def structs_in(kind: Any) -> Iterator[type[msgspec.Struct]]:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
    for inner in typing.get_args(kind):
        yield from structs_in(inner)


def fields_of(kind: type[msgspec.Struct], seen: set[type]) -> Iterator[tuple[str, Any]]:
    if kind not in seen:
        seen.add(kind)
        for field in msgspec.structs.fields(kind):
            yield field.encode_name, field.type
            for inner in structs_in(field.type):
                yield from fields_of(inner, seen)


def test_no_field_of_a_request_over_http_is_an_address() -> None:
    here = [each for each in vars(openai_api).values() if isinstance(each, type)]
    bodies = [each for each in here if each.__module__ == openai_api.__name__]
    seen: set[type] = set()
    fields = [field for body in (*bodies, DrainRequest) for field in fields_of(body, seen)]
    assert len(fields) > 50
    assert {each.__name__ for each in seen} >= {"ChatRequest", "CompletionRequest", "PinRequest", "DrainRequest"}
    assert [name for name, _ in fields if PLACE.search(name)] == []
    free = {name for name, kind in fields if Any in (kind, *typing.get_args(kind)) or "Any" in str(kind)}
    assert free == set(FREE)
    for kind in seen:
        assert kind.__struct_config__.forbid_unknown_fields or kind.__name__ == "ResponseFormat", kind


def test_no_field_of_a_request_over_grpc_is_an_address() -> None:
    inputs = [each.input_type for each in api.DESCRIPTOR.services_by_name["Inference"].methods]
    seen: dict[str, Any] = {}

    def walk(message: Any) -> None:
        if message.full_name not in seen:
            seen[message.full_name] = message
            for field in message.fields:
                if field.message_type is not None:
                    walk(field.message_type)

    for each in inputs:
        walk(each)
    names = [f"{message.name}.{field.name}" for message in seen.values() for field in message.fields]
    assert len(names) > 40
    assert [name for name in names if PLACE.search(name.partition(".")[2])] == []


def test_the_coordinator_has_no_code_that_dials() -> None:
    """Workers dial it. etcd and the Kubernetes API are dialled by `baton.discovery`, which knows of no request, and the
    collector of traces by OpenTelemetry's library: their addresses are flags."""
    for path in (ROOT / "coordinator").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                local = path.name == "limits.py" and name == "getaddrinfo"  # of --host
                assert name not in DIALS or local, f"{path.name}:{node.lineno} calls {name}"


# What a process does

TRIPWIRE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <arpa/inet.h>
#include <netinet/in.h>

static void note(const char *what, const struct sockaddr *to) {
    char text[INET6_ADDRSTRLEN] = "?"; int port = 0;
    if (to && to->sa_family == AF_INET) {
        inet_ntop(AF_INET, &((struct sockaddr_in *)to)->sin_addr, text, sizeof text);
        port = ntohs(((struct sockaddr_in *)to)->sin_port);
    } else if (to && to->sa_family == AF_INET6) {
        inet_ntop(AF_INET6, &((struct sockaddr_in6 *)to)->sin6_addr, text, sizeof text);
        port = ntohs(((struct sockaddr_in6 *)to)->sin6_port);
    } else return;
    FILE *file = fopen(getenv("TRIPWIRE"), "a");
    if (file) { fprintf(file, "%s %s %d\n", what, text, port); fclose(file); }
}
int connect(int fd, const struct sockaddr *to, socklen_t size) {
    static int (*real)(int, const struct sockaddr *, socklen_t);
    if (!real) real = dlsym(RTLD_NEXT, "connect");
    note("connect", to);
    return real(fd, to, size);
}
ssize_t sendto(int fd, const void *data, size_t bytes, int flags, const struct sockaddr *to, socklen_t size) {
    static ssize_t (*real)(int, const void *, size_t, int, const struct sockaddr *, socklen_t);
    if (!real) real = dlsym(RTLD_NEXT, "sendto");
    note("sendto", to);
    return real(fd, data, bytes, flags, to, size);
}
int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    static int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
    if (!real) real = dlsym(RTLD_NEXT, "getaddrinfo");
    FILE *file = fopen(getenv("TRIPWIRE"), "a");
    if (file) { fprintf(file, "getaddrinfo %s\n", node ? node : "-"); fclose(file); }
    return real(node, service, hints, found);
}
"""
"""Between a process and libc, whoever calls: Python, libuv, gRPC's own C++."""


@pytest.fixture(scope="module")
def tripwire(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("tripwire")
    (folder / "tripwire.c").write_text(TRIPWIRE)
    words = [compiler, "-x", "c", "-shared", "-fPIC", "-o", folder / "tripwire.so", folder / "tripwire.c", "-ldl"]
    subprocess.run(words, check=True, timeout=60)
    return folder / "tripwire.so"


def environment(tripwire: Path, record: Path) -> dict[str, str]:
    return {**os.environ, "LD_PRELOAD": str(tripwire), "TRIPWIRE": str(record)}


def test_the_tripwire_sees_python_libuv_and_grpc_dial(tripwire: Path, tmp_path: Path) -> None:
    record = tmp_path / "record"
    script = """
import asyncio, socket, uvloop, grpc
try: socket.create_connection(("127.0.0.1", 1), 1)
except OSError: pass
async def main():
    try: await asyncio.open_connection("127.0.0.1", 2)
    except OSError: pass
uvloop.run(main())
channel = grpc.insecure_channel("127.0.0.1:3")
try: grpc.channel_ready_future(channel).result(2)
except grpc.FutureTimeoutError: pass
"""
    subprocess.run([sys.executable, "-c", script], env=environment(tripwire, record), check=True, timeout=60)
    seen = set(record.read_text().replace("::ffff:", "").splitlines())
    assert seen >= {"connect 127.0.0.1 1", "connect 127.0.0.1 2", "connect 127.0.0.1 3"}


@contextlib.contextmanager
def coordinator(tripwire: Path, record: Path) -> Iterator[dict[str, int]]:
    read, write = os.pipe()
    words = ["coordinator", "--port", "0", "--grpc-port", "0", "--link-port", "0", "--parent-pid", str(os.getpid())]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cli.main", *words, "--announce-fd", str(write)],
        pass_fds=[write], env=environment(tripwire, record),
    )  # fmt: skip
    os.close(write)
    try:
        with os.fdopen(read) as pipe:
            yield json.load(pipe)
    finally:
        process.terminate()
        process.wait(30)


def worker(link: int) -> "subprocess.Popen[bytes]":
    words = ["fake", "--role", "mixed", "--coordinator", f"127.0.0.1:{link}", "--parent-pid", str(os.getpid())]
    return subprocess.Popen([sys.executable, "-P", "-m", "cli.main", *words])


def test_hostile_requests_open_no_connection(tripwire: Path, tmp_path: Path) -> None:
    record = tmp_path / "record"
    with socket.create_server(("127.0.0.1", 0)) as bait, coordinator(tripwire, record) as ports:
        fake = worker(ports["link"])
        try:
            wait_ready(ports["http"])
            before = record.read_text() if record.exists() else ""
            place = f"127.0.0.1:{bait.getsockname()[1]}"
            seen = [ask(ports["http"], *hostile) for hostile in hostile_requests(f"http://{place}/x", place)]
            assert 200 in seen
            assert 400 in seen
            by_grpc(ports["grpc"], f"http://{place}/x")
            bait.settimeout(0.3)
            with pytest.raises(TimeoutError):
                bait.accept()
            new = (record.read_text() if record.exists() else "")[len(before) :]
            assert new == "", "the coordinator dialled, or asked for a name"
        finally:
            fake.terminate()
            fake.wait(30)


def wait_ready(port: int, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while ask(port, "GET", "/ready", {}, None) != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ask(port: int, method: str, path: str, headers: dict[str, str], body: Any) -> int:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def hostile_requests(url: str, place: str) -> Iterator[tuple[str, str, dict[str, str], Any]]:
    chat, complete = "/v1/chat/completions", "/v1/completions"
    said = {"messages": [{"role": "user", "content": url}], "max_tokens": 2}
    yield "POST", complete, {}, {"prompt": url, "max_tokens": 2, "user": url, "metadata": {"callback": url}}
    yield "POST", chat, {}, said | {"metadata": {"webhook_url": url}, "cache_salt": url, "stream": True}
    yield "POST", chat, {}, said | {"chat_template_kwargs": {"url": url, "documents_url": url}}
    for content in ({"type": "image_url", "image_url": {"url": url}}, {"type": "file", "file": {"file_data": url}}):
        yield "POST", chat, {}, {"messages": [{"role": "user", "content": [content]}]}
    for field in ("base_url", "callback_url", "kv_transfer_params", "bootstrap_host", "model", "service_class"):
        yield "POST", chat, {}, said | {field: url}
    yield "POST", chat, {}, said | {"tools": [{"type": "mcp", "server_url": url}]}
    host, _, port = place.partition(":")
    transfer = {"remote_host": host, "remote_port": int(port), "do_remote_prefill": True}  # as vLLM's
    yield "POST", complete, {}, {"prompt": "x", "kv_transfer_params": transfer}
    for name in ("Host", "X-Forwarded-For", "X-Forwarded-Host", "Forwarded", "Referer", "Origin", "X-Original-URL",
                 "X-Request-Id", "Last-Event-ID", "Via", "traceparent"):  # fmt: skip
        yield "POST", complete, {name: place if name == "Host" else url}, {"prompt": "x", "max_tokens": 1}
    yield "GET", f"/v1/models/{url}", {}, None
    yield "GET", f"/v1/streams/{place}?last_event_id={url}", {}, None
    yield "GET", f"//{place}/x", {}, None
    yield "POST", "/drain", {}, {"workers": [place]}
    yield "POST", "/v1/cache/pins", {}, {"prompt": url}
    yield "POST", "/tokenize", {}, {"prompt": url}


def by_grpc(port: int, url: str) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = rpc.InferenceStub(channel)
        for request in (api.GenerateRequest(text=url, cache_salt=url), api.GenerateRequest(text="x", model=url)):
            request.sampling.max_tokens = 1
            with contextlib.suppress(grpc.RpcError):
                list(stub.Generate(request, timeout=30, metadata=[("host", url), ("x-callback", url)]))
        with contextlib.suppress(grpc.RpcError):
            list(stub.Resume(api.ResumeRequest(request_id=url), timeout=10))
