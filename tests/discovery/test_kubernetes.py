"""Discovery by the Kubernetes API: the endpoints of a Service are found, through every accident of the API server."""

import asyncio
import logging
import ssl
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from baton.config import DiscoveryOptions, validate
from baton.discovery import Discovery, open_discovery
from baton.discovery import kubernetes as module
from baton.errors import ConfigurationError
from baton.v1 import worker_link_pb2 as wire
from tests.authority import Authority, Files
from tests.discovery.fake_kubernetes import SERVICE, FakeKubernetes, endpoint_slice, fake_kubernetes
from tests.discovery.watching import Seen, running, until
from tests.worker.fake_coordinator import FakeCoordinator
from tests.worker.test_links import linked

A, B, C = "10.0.0.1:50052", "10.0.0.2:50052", "10.0.0.3:50052"


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Authority(tmp_path_factory.mktemp("authority"), "cluster").sign("api", "IP:127.0.0.1")


@dataclass
class Pod:
    """What the kubelet gives a pod, and what API servers of its cluster have."""

    account: Path
    context: ssl.SSLContext
    monkeypatch: pytest.MonkeyPatch

    def discovery(
        self, kubernetes: FakeKubernetes, service: str = SERVICE, fixed: frozenset[str] = frozenset()
    ) -> tuple[Discovery, list[int]]:
        """And a list that has an entry for each of its losses."""
        self.monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        self.monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(kubernetes.port))
        losses: list[int] = []
        options = DiscoveryOptions(discovery=f"kubernetes://{service}")
        validate(options)
        return open_discovery(options, fixed, lambda: losses.append(1)), losses


@pytest.fixture
def pod(tmp_path: Path, signed: Files, monkeypatch: pytest.MonkeyPatch) -> Pod:
    for name, value in (("CALL_TIMEOUT_S", 0.4), ("RETRY_S", (0.02, 0.05)), ("MAX_RETRY_S", 0.1)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "ACCOUNT", tmp_path)
    (tmp_path / "namespace").write_text("models")
    (tmp_path / "token").write_text("first\n")
    (tmp_path / "ca.crt").write_text(Path(signed.ca).read_text())
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(signed.cert, signed.key)
    return Pod(tmp_path, context, monkeypatch)


def test_endpoints_that_come_and_go_are_found_and_not(pod: Pod) -> None:
    async def run() -> None:
        async with fake_kubernetes(pod.context) as kubernetes:
            seen = Seen()
            discovery, losses = pod.discovery(kubernetes)
            async with running(discovery.watch(seen)):
                await seen.becomes()
                kubernetes.put(endpoint_slice("one", "10.0.0.1"))
                await seen.becomes(A)
                kubernetes.put(endpoint_slice("two", "10.0.0.2"))
                await seen.becomes(A, B)
                kubernetes.put(endpoint_slice("one", "10.0.0.1", "10.0.0.3"))
                await seen.becomes(A, B, C)
                kubernetes.delete("two")
                await seen.becomes(A, C)
                kubernetes.put(endpoint_slice("one"))
                await seen.becomes()
                kubernetes.put(endpoint_slice("six", "fd00::1"))
                await seen.becomes("[fd00::1]:50052")
            assert (kubernetes.lists, losses) == (1, [])

    asyncio.run(run())


def test_a_coordinator_that_waits_for_workers_or_terminates_is_found(pod: Pod) -> None:
    async def run() -> None:
        async with fake_kubernetes(pod.context) as kubernetes:
            kubernetes.put(endpoint_slice("waits", "10.0.0.1", ready=False))
            kubernetes.put(endpoint_slice("ends", "10.0.0.2", terminating=True))
            seen = Seen()
            async with running(pod.discovery(kubernetes)[0].watch(seen)):
                await seen.becomes(A, B)

    asyncio.run(run())


def test_only_the_port_named_link_is_dialled(pod: Pod) -> None:
    async def run() -> None:
        async with fake_kubernetes(pod.context) as kubernetes:
            unnamed = endpoint_slice("unnamed", "10.0.0.9")
            unnamed["ports"] = [{"name": "http", "port": 8000}, {"port": 1}, {"name": "link", "port": None}]
            kubernetes.put(unnamed)
            kubernetes.put(endpoint_slice("one", "10.0.0.1", port=7))
            seen = Seen()
            async with running(pod.discovery(kubernetes)[0].watch(seen)):
                await seen.becomes("10.0.0.1:7")

    asyncio.run(run())


def test_a_namespace_can_be_named(pod: Pod) -> None:
    (pod.account / "namespace").unlink()

    async def run() -> None:
        async with fake_kubernetes(pod.context) as kubernetes:
            kubernetes.put(endpoint_slice("one", "10.0.0.1"))
            seen = Seen()
            async with running(pod.discovery(kubernetes, f"models/{SERVICE}")[0].watch(seen)):
                await seen.becomes(A)

    asyncio.run(run())


def test_a_watch_that_the_server_ends_goes_on_from_the_last_version(pod: Pod) -> None:
    async def run() -> None:
        async with fake_kubernetes(pod.context) as kubernetes:
            seen = Seen()
            discovery, losses = pod.discovery(kubernetes)
            async with running(discovery.watch(seen)):
                await until(lambda: kubernetes.num_watches == 1)
                kubernetes.put(endpoint_slice("one", "10.0.0.1"))
                await seen.becomes(A)
                kubernetes.end_watches()
                await until(lambda: kubernetes.watched_from == [100, 101])
                await until(lambda: kubernetes.num_watches == 1)
                kubernetes.bookmark()
                kubernetes.end_watches()
                await until(lambda: kubernetes.watched_from == [100, 101, 151])
                kubernetes.put(endpoint_slice("two", "10.0.0.2"))
                await seen.becomes(A, B)
            assert (kubernetes.lists, losses) == (1, [])

    asyncio.run(run())


def test_the_server_is_asked_to_end_each_watch_and_after_some_of_them_all_is_listed_anew(pod: Pod) -> None:
    pod.monkeypatch.setattr(module, "WATCH_S", 0.5)  # which is a second, as the API takes whole ones
    pod.monkeypatch.setattr(module, "CALL_TIMEOUT_S", 5.0)
    pod.monkeypatch.setattr(module, "WATCHES", 1)

    async def run() -> None:
        async with fake_kubernetes(pod.context) as kubernetes:
            seen = Seen()
            discovery, losses = pod.discovery(kubernetes)
            async with running(discovery.watch(seen)):
                await until(lambda: kubernetes.num_watches == 1)
                kubernetes.slices["unsaid"] = endpoint_slice("unsaid", "10.0.0.1")  # an event that never comes
                kubernetes.slices["unsaid"]["metadata"]["resourceVersion"] = "3"
                await seen.becomes(A)
                assert kubernetes.lists == 2
            assert losses == []

    asyncio.run(run())


@pytest.mark.parametrize("how", ["event", "status"])
def test_a_version_that_is_too_old_is_listed_again_and_is_no_loss(pod: Pod, how: str) -> None:
    async def run() -> None:
        async with fake_kubernetes(pod.context) as kubernetes:
            seen = Seen()
            discovery, losses = pod.discovery(kubernetes)
            async with running(discovery.watch(seen)):
                await until(lambda: kubernetes.num_watches == 1)
                kubernetes.slices["one"] = endpoint_slice("one", "10.0.0.1")
                kubernetes.slices["one"]["metadata"]["resourceVersion"] = "500"
                kubernetes.version = 500
                if how == "event":
                    kubernetes.fail_watches(410, "too old resource version")
                else:
                    kubernetes.oldest = 500
                    kubernetes.end_watches()
                await seen.becomes(A)
                await until(lambda: kubernetes.watched_from[-1] == 500)
                assert not discovery.trouble
            assert (kubernetes.lists, losses) == (2, [])

    asyncio.run(run())


def test_an_api_that_is_gone_for_a_while_changes_nothing_and_what_came_meanwhile_is_found(
    pod: Pod, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "baton.events")

    async def run() -> None:
        seen, kept = Seen(), FakeKubernetes()
        async with fake_kubernetes(pod.context, kept) as kubernetes:
            kubernetes.put(endpoint_slice("one", "10.0.0.1"))
            discovery, losses = pod.discovery(kubernetes)
            task = asyncio.create_task(discovery.watch(seen))
            await seen.becomes(A)
            assert not discovery.trouble
        async with asyncio.timeout(20):
            await until(lambda: bool(discovery.trouble))
            times = seen.times
            await asyncio.sleep(0.4)
            assert (seen.now, seen.times) == ({A}, times)
            kept.put(endpoint_slice("one", "10.0.0.2"))
            async with fake_kubernetes(pod.context, kept, kept.port):
                await seen.becomes(B)
                await until(lambda: not discovery.trouble)
                task.cancel()
                await asyncio.wait({task})
        assert losses == [1]

    asyncio.run(run())
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "INFO"]


@pytest.mark.parametrize("when", ["list", "watch"])
def test_an_api_that_is_stopped_is_silent_and_noticed(pod: Pod, when: str) -> None:
    pod.monkeypatch.setattr(module, "WATCH_S", 1.0)

    async def run() -> None:
        async with fake_kubernetes(pod.context) as kubernetes:
            kubernetes.put(endpoint_slice("one", "10.0.0.1"))
            seen = Seen()
            discovery, losses = pod.discovery(kubernetes)
            if when == "list":
                kubernetes.awake.clear()
            async with running(discovery.watch(seen)):
                if when == "watch":
                    await until(lambda: kubernetes.num_watches == 1)
                    kubernetes.awake.clear()
                    kubernetes.put(endpoint_slice("two", "10.0.0.2"))
                await until(lambda: bool(losses) and discovery.trouble == "silent")
                assert seen.now == ({A} if when == "watch" else set())
                kubernetes.awake.set()
                await until(lambda: not discovery.trouble)
                await seen.becomes(*((A, B) if when == "watch" else (A,)))
            assert losses == [1]

    asyncio.run(run())


def test_a_token_that_the_kubelet_replaced_is_used(pod: Pod) -> None:
    async def run() -> None:
        async with fake_kubernetes(pod.context) as kubernetes:
            seen = Seen()
            discovery, losses = pod.discovery(kubernetes)
            async with running(discovery.watch(seen)):
                await until(lambda: kubernetes.num_watches == 1)
                kubernetes.token = "second"
                (pod.account / "token").write_text("second")
                kubernetes.end_watches()
                await until(lambda: len(kubernetes.watched_from) == 2)
                assert losses == []
                kubernetes.token = "third"
                kubernetes.end_watches()
                await until(lambda: "does not take the token" in discovery.trouble)
                (pod.account / "token").write_text("third")
                await until(lambda: not discovery.trouble)

    asyncio.run(run())


def test_a_service_account_without_the_right_to_watch_is_told_so(pod: Pod) -> None:
    async def run() -> None:
        async with fake_kubernetes(pod.context) as kubernetes:
            kubernetes.status = 403
            discovery, _ = pod.discovery(kubernetes)
            async with running(discovery.watch(Seen())):
                await until(lambda: "give it a Role" in discovery.trouble)

    asyncio.run(run())


def test_only_an_api_server_of_the_clusters_authority_is_believed(pod: Pod, tmp_path: Path, signed: Files) -> None:
    stranger = Authority(tmp_path / "strangers", "stranger").sign("api", "IP:127.0.0.1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(stranger.cert, stranger.key)
    authority = Path(stranger.ca).read_text()

    async def run() -> None:
        async with fake_kubernetes(context) as kubernetes:
            kubernetes.put(endpoint_slice("one", "10.0.0.1"))
            seen = Seen()
            discovery, _ = pod.discovery(kubernetes)
            async with running(discovery.watch(seen)):
                await until(lambda: "certificate" in discovery.trouble.lower())
                assert not seen.now
                (pod.account / "ca.crt").write_text(authority)  # is read again
                await seen.becomes(A)

    asyncio.run(run())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b'{"metadata": {}, "items": []}',
        b'{"metadata": {"resourceVersion": "1"}, "items": [7]}',
        b'{"metadata": {"resourceVersion": "1"}, "items": []}' + b" " * module.MAX_ANSWER_BYTES,
    ],
    ids=range(6),
)
def test_a_list_that_makes_no_sense_is_asked_for_again(pod: Pod, body: bytes) -> None:
    async def run() -> None:
        async with fake_kubernetes(pod.context) as kubernetes:
            kubernetes.put(endpoint_slice("one", "10.0.0.1"))
            kubernetes.body = body
            seen = Seen()
            discovery, losses = pod.discovery(kubernetes)
            async with running(discovery.watch(seen)):
                await until(lambda: bool(losses))
                assert discovery.trouble
                assert not seen.times
                kubernetes.body = None
                await seen.becomes(A)

    asyncio.run(run())


@pytest.mark.parametrize(
    "line",
    [b"\n", b"{}\n", b'{"type": "ADDED", "object": {}}\n', b'{"type": "ERROR", "object": {"code": 500}}\n', b'{"type"'],
)
def test_a_watch_that_makes_no_sense_is_listed_again(pod: Pod, line: bytes) -> None:
    async def run() -> None:
        async with fake_kubernetes(pod.context) as kubernetes:
            kubernetes.put(endpoint_slice("one", "10.0.0.1"))
            seen = Seen()
            discovery, losses = pod.discovery(kubernetes)
            async with running(discovery.watch(seen)):
                await until(lambda: kubernetes.num_watches == 1)
                kubernetes.send(line)
                kubernetes.end_watches()
                await until(lambda: losses == [1] and kubernetes.lists == 2)
                assert seen.now == {A}
                await until(lambda: not discovery.trouble)

    asyncio.run(run())


def test_fixed_addresses_are_found_without_the_api_and_stay(pod: Pod) -> None:
    async def run() -> None:
        async with fake_kubernetes(pod.context) as kubernetes:
            kubernetes.awake.clear()
            seen = Seen()
            async with running(pod.discovery(kubernetes, fixed=frozenset({B}))[0].watch(seen)):
                await seen.becomes(B)
                kubernetes.awake.set()
                kubernetes.put(endpoint_slice("one", "10.0.0.1"))
                await seen.becomes(A, B)

    asyncio.run(run())


def test_a_coordinator_announces_nothing_and_has_no_trouble(pod: Pod) -> None:
    async def run() -> None:
        async with fake_kubernetes(pod.context) as kubernetes:
            discovery, _ = pod.discovery(kubernetes)
            async with running(discovery.announce(A)):
                await until(lambda: not discovery.trouble)
            assert (kubernetes.lists, kubernetes.slices) == (0, {})

    asyncio.run(run())


@pytest.mark.parametrize(
    "text", ["kubernetes://", "kubernetes://a/b/c", "kubernetes://A", "kubernetes://a:80", "k8s://a"]
)
def test_what_names_no_service_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"kubernetes://\[namespace/\]service"):
        validate(DiscoveryOptions(discovery=text))


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [
        ("host", "needs a pod"),
        ("token", "token is mounted"),
        ("ca.crt", "token is mounted"),
        ("namespace", "namespace"),
    ],
)
def test_outside_of_a_pod_the_start_says_what_is_missing(pod: Pod, missing: str, complaint: str) -> None:
    if missing == "host":
        pod.monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    else:
        pod.monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        (pod.account / missing).unlink()
    with pytest.raises(ConfigurationError, match=complaint):
        open_discovery(DiscoveryOptions(discovery="kubernetes://a"))


def test_a_token_is_kept_out_of_messages(pod: Pod) -> None:
    pod.monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    (pod.account / "token").write_text("SECRET\nSECRET")
    with pytest.raises(ConfigurationError, match="holds no token") as refused:
        open_discovery(DiscoveryOptions(discovery="kubernetes://a"))
    assert "SECRET" not in str(refused.value)


def test_a_worker_links_to_the_endpoints_and_keeps_its_links_while_the_api_is_gone(pod: Pod) -> None:
    async def run() -> None:
        async with AsyncExitStack() as api, FakeCoordinator().up() as one, FakeCoordinator().up() as two:
            kubernetes = await api.enter_async_context(fake_kubernetes(pod.context))
            ports = [int(each.address.rpartition(":")[2]) for each in (one, two)]
            kubernetes.put(endpoint_slice("one", "127.0.0.1", ready=False, port=ports[0]))
            discovery, losses = pod.discovery(kubernetes)
            async with linked(discovery) as (links, recorder):
                await one.hears("heartbeat")
                kubernetes.put(endpoint_slice("two", "127.0.0.1", port=ports[1]))
                await two.hears("heartbeat")
                kubernetes.delete("two")
                await api.aclose()
                await until(lambda: bool(losses))
                links.send_all(wire.WorkerMessage(progress=wire.Progress()))
                for each in (one, two):
                    await each.hears("progress")
                    assert each.connections == 1
                assert not recorder.lost.is_set()

    asyncio.run(run())
