"""The public ports where clients must show a certificate: who is let in, and that the others harm nobody."""

import ssl
from pathlib import Path

import aiohttp
import grpc
import pytest
from coordinator_harness import DEMO_FOLDER, OPTIONS

from baton.config import CoordinatorOptions, DiscoveryOptions, ModelOptions, TlsOptions
from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc as rpc
from coordinator.server import Coordinator
from tests.authority import Authority, Files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def server(folder: Path) -> Files:
    return Authority(folder, "servers").sign("server")


@pytest.fixture(scope="module")
def clients(folder: Path) -> Authority:
    return Authority(folder, "clients")


def credentials_of(ca: str, files: Files | None) -> grpc.ChannelCredentials:
    key, cert = (Path(files.key).read_bytes(), Path(files.cert).read_bytes()) if files else (None, None)
    return grpc.ssl_channel_credentials(Path(ca).read_bytes(), key, cert)


def test_only_clients_with_a_good_certificate_are_let_in(
    run, server: Files, clients: Authority, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = clients.sign("good", names="")
    shown: dict[str, Files | None] = {
        "none": None,
        "of the server's authority": server,
        "of nobody's": Authority(folder, "nobody").sign("client", names=""),
        "expired": clients.sign("expired", names="", days=-1),
    }

    refused = ("baton_tls_refused_total", {"side": "public"})

    async def http(port: int, files: Files | None) -> int:
        context = ssl.create_default_context(cafile=server.ca)
        if files is not None:
            context.load_cert_chain(files.cert, files.key)
        url = f"https://127.0.0.1:{port}/status"
        timeout = aiohttp.ClientTimeout(total=10)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url, ssl=context) as answer:
            return answer.status

    async def by_grpc(port: int, files: Files | None) -> str:
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials_of(server.ca, files)) as channel:
            return (await rpc.InferenceStub(channel).ListModels(api.ListModelsRequest(), timeout=10)).models[0].id

    async def scenario() -> None:
        coordinator = Coordinator(
            CoordinatorOptions(**OPTIONS), ModelOptions(), DEMO_FOLDER, DiscoveryOptions(), TlsOptions(),
            server.public(clients.ca),
        )  # fmt: skip
        ports = await coordinator.start()
        try:
            for files in shown.values():
                before = coordinator.metrics.registry.get_sample_value(*refused) or 0.0
                with pytest.raises((aiohttp.ClientError, OSError)):
                    await http(ports.http, files)
                assert coordinator.metrics.registry.get_sample_value(*refused) > before
                with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                    await by_grpc(ports.grpc, files)
                # and the others are served
                assert await http(ports.http, good) == 200, "TLS changes nothing in who may see the status"
                assert await by_grpc(ports.grpc, good) == "demo"
        finally:
            await coordinator.stop()

    run(scenario())
    assert caplog.text.count("http: a peer was refused: certificate has expired") == 1
    assert caplog.text.count("http: a peer was refused: peer did not return a certificate") == 1
