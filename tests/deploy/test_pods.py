"""The command lines of the chart's pods, as the kubelet would run them: on a read-only file system, as first process,
with nothing to write to but HOME."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.authority import Authority
from tests.deploy.manifests import BASE, ROOT, Pod, pods
from tests.discovery.fake_kubernetes import SERVICE, endpoint_slice, fake_kubernetes
from tests.ports import free_port

PODS = {pod.name: pod for pod in pods([each for each in yaml.safe_load_all(BASE.read_text()) if each])}
CONTAINER = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "sh", "-c")
READ_ONLY = """
set -e
mount -t tmpfs -o mode=1777 home "$HOME"
if [ -n "$ACCOUNT" ]; then
    mount -t tmpfs run /run
    mkdir -p /run/secrets/kubernetes.io
    cp -r "$ACCOUNT" /run/secrets/kubernetes.io/serviceaccount
    mount -o remount,ro /run
fi
mount -o remount,bind,ro /
exec "$@"
"""


def can_unshare() -> bool:
    if os.getuid() or shutil.which("unshare") is None or os.path.realpath("/var/run") != "/run":
        return False
    return not subprocess.run([*CONTAINER, "mount -o remount,bind,ro /"], check=False, capture_output=True).returncode


needs_unshare = pytest.mark.skipif(not can_unshare(), reason="needs root and the right to make namespaces of its own")


class Running:
    """A pod's container. `changes`: flags that are others here, as all of them are on one host."""

    def __init__(self, pod: Pod, folder: Path, env: dict[str, str], **changes: object) -> None:
        self.monitor = free_port()
        self.log = folder / f"{pod.name}.log"
        home = folder / f"{pod.name}-home"
        home.mkdir()
        own = {"monitor-port": self.monitor} | {name.replace("_", "-"): value for name, value in changes.items()}
        kept = [word for word in pod.words() if word.removeprefix("--").partition("=")[0] not in own]
        words = [*kept, *(f"--{name}={value}" for name, value in own.items() if value is not None)]
        command = [*CONTAINER, READ_ONLY, "container", sys.executable, "-P", "-m", "cli.main", *words]
        own_env = {"HOME": str(home), "TMPDIR": str(home), "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, env=own_env | env, stdout=self.log.open("w"), stderr=subprocess.STDOUT)

    def asked(self, path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.monitor}{path}", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def until(self, promise: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not promise():
            assert self.process.poll() is None, f"ended before {what}:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}\n{self.log.read_text()}"
            time.sleep(0.1)

    def pid(self) -> int:
        """Of the first process inside; 0 before it is there."""
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as file:
            return int((file.read().split() or ["0"])[0])

    def hears(self, number: signal.Signals) -> bool:
        """It has a handler of its own."""
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self.pid()}/status").read_text()
            (caught,) = re.findall(r"^SigCgt:\s*(\w+)$", status, re.M)
            return bool(int(caught, 16) >> (number - 1) & 1)
        return False

    def told_to_end(self) -> int:
        os.kill(self.pid(), signal.SIGTERM)
        return self.process.wait(timeout=60)


@contextlib.contextmanager
def running(pod: Pod, folder: Path, env: dict[str, str] | None = None, **changes: object) -> Iterator[Running]:
    container = Running(pod, folder, env or {}, **changes)
    try:
        yield container
    finally:
        container.process.kill()
        container.process.wait()


@contextlib.contextmanager
def api_server(folder: Path, link: int) -> Iterator[dict[str, str]]:
    """With one coordinator at that port. What the kubelet gives a pod that may ask it."""
    signed = Authority(folder / "authority", "cluster").sign("api", "IP:127.0.0.1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(signed.cert, signed.key)
    account = folder / "account"
    account.mkdir()
    for name, content in (("token", "first"), ("namespace", "models"), ("ca.crt", Path(signed.ca).read_text())):
        (account / name).write_text(content)
    with asyncio.Runner() as runner, contextlib.ExitStack() as stack:
        loop = runner.get_loop()
        emulated = fake_kubernetes(context)
        kubernetes = runner.run(emulated.__aenter__())
        stack.callback(lambda: runner.run(emulated.__aexit__(None, None, None)))
        kubernetes.put(endpoint_slice("one", "127.0.0.1", ready=False, port=link))
        serving = threading.Thread(target=loop.run_forever)
        serving.start()
        stack.callback(serving.join)
        stack.callback(loop.call_soon_threadsafe, loop.stop)
        where = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(kubernetes.port)}
        yield {"ACCOUNT": str(account), **where}


@pytest.mark.slow
@needs_unshare
def test_pods_become_ready_on_a_read_only_file_system_and_go_when_they_are_told_to(tmp_path: Path) -> None:
    assert f"--discovery=kubernetes://{SERVICE}" in PODS["baton-decode"].words()
    port, link = free_port(), free_port()
    front = {"port": port, "grpc-port": free_port(), "link-port": link}
    with (
        api_server(tmp_path, link) as account,
        running(PODS["baton-coordinator"], tmp_path, **front) as coordinator,
        running(PODS["baton-decode"], tmp_path, account, host="127.0.0.1") as decode,
    ):
        coordinator.until(lambda: coordinator.asked("/health") == 200, "the coordinator lives")
        assert coordinator.asked("/ready") in (503, 200)
        decode.until(lambda: decode.asked("/ready") == 200, "the worker is ready")
        coordinator.until(lambda: coordinator.asked("/ready") == 200, "the coordinator is ready")
        body = json.dumps({"model": "demo", "prompt": "Hello", "max_tokens": 4}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] >= 1
        with urllib.request.urlopen(f"http://127.0.0.1:{coordinator.monitor}/metrics", timeout=5) as answer:
            assert 'worker="pod-0"' in answer.read().decode()
        assert decode.told_to_end() == 0
        coordinator.until(lambda: coordinator.asked("/ready") == 503, "nobody decodes")
        assert coordinator.told_to_end() == 0


@needs_unshare
def test_a_pod_that_is_deleted_as_soon_as_it_is_there_goes_at_once(tmp_path: Path) -> None:
    """The kernel drops signals for which a first process has no handler."""
    with running(PODS["baton-decode"], tmp_path, host="127.0.0.1", discovery=None, coordinator="127.0.0.1:9") as pod:
        pod.until(lambda: pod.hears(signal.SIGTERM), "it has a handler")
        assert pod.told_to_end() in (0, 128 + signal.SIGTERM)


def test_a_worker_that_is_told_to_end_while_it_loads_does_so_at_once() -> None:
    loads = "import time; from cli import main, worker; "
    loads += "worker._load = lambda *_: print('loads', flush=True) or time.sleep(100); main.main()"
    command = [sys.executable, "-c", loads, "decode"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loads\n"
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "told to end while the model is loaded" in told
