"""One identity of a process: files that are replaced, and peers that are refused."""

import contextlib
import logging
import shutil
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import pytest

from baton.tls import COORDINATOR_NAME, Tls, inside, outside
from tests.authority import Authority, Files


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "ours")


@pytest.fixture
def own(authority: Authority, tmp_path: Path) -> Files:
    """Copies, for the test to replace."""
    return install(authority.sign("first"), tmp_path)


def install(files: Files, folder: Path) -> Files:
    target = Files(str(folder / "cert.pem"), str(folder / "key.pem"), str(folder / "ca.pem"))
    for source, to in zip(files, target, strict=True):
        shutil.copy(source, folder / "part")
        (folder / "part").replace(to)
    return target


def of(files: Files, side: str) -> Tls:
    tls = inside(files.options()) if side == "inside" else outside(files.public())
    assert tls is not None
    return tls


@pytest.mark.parametrize("side", ["inside", "public"])
def test_replaced_files_are_used_once_they_rest_and_are_good(
    own: Files, side: str, authority: Authority, tmp_path: Path
) -> None:
    tls = of(own, side)
    first = tls.material
    tls.look()
    assert tls.material is first
    # 1. the certificate is new and its key has not come yet
    second = authority.sign("second")
    install(second._replace(key=authority.sign("first").key), tmp_path)
    tls.look()
    install(second, tmp_path)
    tls.look()
    assert (tls.material, tls.counters) == (first, {}), "they may not be complete"
    # 2. nothing has changed since
    tls.look()
    assert tls.material.cert == Path(second.cert).read_bytes()
    assert tls.counters == {"tls_reloads": 1}
    tls.look()
    assert tls.counters == {"tls_reloads": 1}


@pytest.mark.parametrize("bad", ["gone", "cut off", "expired", "another key"])
def test_new_files_that_are_no_good_leave_the_old_ones_in_use(
    own: Files, bad: str, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tls = of(own, "inside")
    first = tls.material
    match bad:
        case "gone":
            Path(own.cert).unlink()
        case "cut off":
            Path(own.cert).write_bytes(first.cert[:100])
        case "expired":
            install(authority.sign("late", days=-1), tmp_path)
        case "another key":
            shutil.copy(authority.sign("another").key, own.key)
    for _ in range(4):
        tls.look()
    assert tls.material is first
    assert tls.counters == {"tls_reload_failures": 1}
    assert caplog.text.count("new TLS files are not used, the old ones stay") == 1
    install(authority.sign("good"), tmp_path)
    tls.look()
    tls.look()
    assert tls.counters == {"tls_reload_failures": 1, "tls_reloads": 1}


def test_every_refused_peer_is_counted_and_each_reason_said_once(own: Files, caplog: pytest.LogCaptureFixture) -> None:
    tls = of(own, "inside")
    for number in range(50):
        tls.refuse("link", "no TLS" if number % 2 else "no certificate")
    assert tls.counters == {"tls_refused": 50}
    assert len(caplog.records) == 2


def test_a_certificate_that_ends_soon_is_warned_of_every_day(
    authority: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING):
        tls = of(authority.sign("short", days=3), "inside")
        tls.look()
        assert caplog.text.count("ends in 3.0 days") == 1
        tomorrow = time.monotonic() + 86401
        monkeypatch.setattr(time, "monotonic", lambda: tomorrow)
        tls.look()
        tls.look()
    assert caplog.text.count("ends in 3.0 days") == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("version", "taken"), [("TLSv1_1", False), ("TLSv1_2", True), ("TLSv1_3", True)])
def test_clients_need_tls_1_2(own: Files, authority: Authority, version: str, taken: bool) -> None:
    context = ssl.create_default_context(cafile=str(authority.ca))
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion[version]
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    theirs, ours = socket.socketpair()
    server = of(own, "public").server

    def accept() -> None:
        with ours, contextlib.suppress(OSError):
            server.wrap_socket(ours, server_side=True).close()

    thread = threading.Thread(target=accept)
    thread.start()
    with theirs:
        try:
            connection = context.wrap_socket(theirs, server_hostname="localhost")
            got = connection.version()
        except OSError:
            got = None
    thread.join(10)
    assert (got is not None) is taken


def test_the_commands_of_the_page_make_files_that_work(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    page = (Path(__file__).parents[1] / "docs" / "security.md").read_text()
    commands = page.split("```")[1]
    subprocess.run(["bash", "-ec", commands], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    files = Files(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"), str(tmp_path / "ca.pem"))
    assert inside(files.options(), COORDINATOR_NAME) is not None
