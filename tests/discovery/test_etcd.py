"""Discovery in etcd: what was announced is found, through every accident of the store and of the way to it."""

import asyncio
import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.config import DiscoveryOptions, validate
from baton.discovery import Discovery, open_discovery
from baton.discovery import etcd as module
from baton.errors import ConfigurationError
from tests.discovery.fake_etcd import FOLDER, FakeEtcd, fake_etcd
from tests.discovery.watching import Seen, running, until

A, B = "10.0.0.1:50052", "10.0.0.2:50052"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CALL_TIMEOUT_S", 0.3), ("BEAT_S", 0.1), ("RETRY_S", (0.02, 0.05))):
        monkeypatch.setattr(module, name, value)


def at(*etcds: FakeEtcd, fixed: frozenset[str] = frozenset(), **options: Any) -> tuple[Discovery, list[int]]:
    """A discovery, and a list that has an entry for each of its losses."""
    endpoints = ",".join(f"127.0.0.1:{etcd.port}" for etcd in etcds)
    losses: list[int] = []
    given = DiscoveryOptions(discovery=f"etcd://{endpoints}", **{"discovery_ttl_s": 1, **options})
    validate(given)
    return open_discovery(given, fixed, lambda: losses.append(1)), losses


def test_what_is_announced_is_found_and_what_is_retracted_is_not() -> None:
    async def run() -> None:
        async with fake_etcd() as etcd:
            seen = Seen()
            async with running(at(etcd)[0].watch(seen)):
                await seen.becomes()
                async with running(at(etcd)[0].announce(A)):
                    await seen.becomes(A)
                    async with running(at(etcd)[0].announce(B)):
                        await seen.becomes(A, B)
                    await seen.becomes(A)
                await seen.becomes()
            assert not etcd.leases

    asyncio.run(run())


def test_a_lease_is_kept_alive_and_one_that_was_lost_is_followed_by_another() -> None:
    async def run() -> None:
        async with fake_etcd() as etcd:
            seen = Seen()
            discovery, losses = at(etcd)
            async with running(at(etcd)[0].watch(seen), discovery.announce(A)):
                await seen.becomes(A)
                await asyncio.sleep(0.8)  # two thirds of its time: twice renewed
                assert etcd.granted == 1
                etcd.end_leases()
                await seen.becomes()
                await seen.becomes(A)
                assert etcd.granted == 2
                assert losses == [1]
                await until(lambda: not discovery.trouble)

    asyncio.run(run())


def test_a_store_that_is_gone_for_a_while_changes_nothing_and_what_came_meanwhile_is_found(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "baton.events")

    async def run() -> None:
        seen = Seen()
        kept = FakeEtcd()
        async with fake_etcd(kept) as etcd:
            etcd.put(A)
            discovery, losses = at(etcd)
            task = asyncio.create_task(discovery.watch(seen))
            await seen.becomes(A)
            assert not discovery.trouble
        async with asyncio.timeout(20):
            await until(lambda: bool(discovery.trouble))
            times = seen.times
            await asyncio.sleep(0.3)
            assert (seen.now, seen.times) == ({A}, times)
            kept.put(B)
            async with fake_etcd(kept, kept.port):
                await seen.becomes(A, B)
                await until(lambda: not discovery.trouble)
                task.cancel()
                await asyncio.wait({task})
        assert losses == [1]

    asyncio.run(run())
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "INFO"]


def test_a_store_that_is_stopped_is_silent_and_noticed() -> None:
    async def run() -> None:
        async with fake_etcd() as etcd:
            seen = Seen()
            watching, announcing = at(etcd)[0], at(etcd)[0]
            async with running(watching.watch(seen), announcing.announce(A)):
                await seen.becomes(A)
                etcd.awake.clear()
                await until(lambda: bool(watching.trouble and announcing.trouble))
                assert seen.now == {A}
                etcd.end_leases()
                etcd.awake.set()
                await until(lambda: not watching.trouble and not announcing.trouble)
                await seen.becomes(A)

    asyncio.run(run())


def test_a_store_that_came_back_empty_is_listed_anew_although_its_revisions_are_lower() -> None:
    async def run() -> None:
        seen = Seen()
        kept = FakeEtcd()
        kept.revision = 1000
        async with fake_etcd(kept) as etcd:
            watching, announcing = at(etcd)[0], at(etcd)[0]
            tasks = [asyncio.create_task(watching.watch(seen)), asyncio.create_task(announcing.announce(A))]
            await seen.becomes(A)
        kept.empty()
        async with asyncio.timeout(20), fake_etcd(kept, kept.port):
            await until(lambda: kept.addresses == {A})
            await seen.becomes(A)
            kept.put(B)
            assert kept.revision < 1000
            await seen.becomes(A, B)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    asyncio.run(run())


def test_a_revision_that_is_compacted_between_list_and_watch_is_listed_again() -> None:
    async def run() -> None:
        async with fake_etcd() as etcd:
            etcd.put(A)
            etcd.compacted_to = 1000
            seen = Seen()
            discovery, losses = at(etcd)
            async with running(discovery.watch(seen)):
                await until(lambda: etcd.watches == 1)
                assert losses == [1]
                etcd.put(B)
                await seen.becomes(A, B)

    asyncio.run(run())


def test_a_watch_that_the_store_cancels_is_begun_again() -> None:
    async def run() -> None:
        async with fake_etcd() as etcd:
            seen = Seen()
            async with running(at(etcd)[0].watch(seen)):
                await until(lambda: etcd.watches == 1)
                etcd.break_watches("etcdserver: no leader")
                await until(lambda: etcd.watches == 2)
                etcd.put(A)
                await seen.becomes(A)
                etcd.delete(f"{FOLDER}{A}".encode())
                await seen.becomes()

    asyncio.run(run())


def test_of_several_members_one_is_enough() -> None:
    async def run() -> None:
        async with fake_etcd() as gone:
            pass
        async with fake_etcd() as stopped, fake_etcd() as etcd:
            stopped.awake.clear()
            seen = Seen()
            members = (gone, stopped, etcd)
            async with running(at(*members)[0].watch(seen), at(*members)[0].announce(A)):
                await seen.becomes(A)
            assert not etcd.keys, "retracted"

    asyncio.run(run())


def test_fixed_addresses_are_found_without_the_store_and_stay() -> None:
    async def run() -> None:
        async with fake_etcd() as etcd:
            etcd.awake.clear()
            seen = Seen()
            async with running(at(etcd, fixed=frozenset({B}))[0].watch(seen)):
                await seen.becomes(B)
                etcd.awake.set()
                etcd.put(A)
                await seen.becomes(A, B)

    asyncio.run(run())


def test_a_user_and_password_come_from_a_file(tmp_path: Path) -> None:
    async def run() -> None:
        async with fake_etcd() as etcd:
            etcd.password = "secret:with:colons"
            login = tmp_path / "login"
            login.write_text("baton:wrong\n")
            login.chmod(0o600)
            seen = Seen()
            discovery = at(etcd, discovery_login=str(login))[0]
            async with running(discovery.watch(seen), at(etcd, discovery_login=str(login))[0].announce(A)):
                await until(lambda: "authentication failed" in discovery.trouble)
                login.write_text("baton:secret:with:colons\n")  # is read again
                await seen.becomes(A)

    asyncio.run(run())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
def test_with_tls_both_sides_are_who_their_certificates_say(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-subj", "/CN=etcd", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True, timeout=20)

    async def run() -> None:
        pair = [(key.read_bytes(), cert.read_bytes())]
        credentials = grpc.ssl_server_credentials(pair, cert.read_bytes(), require_client_auth=True)
        async with fake_etcd(credentials=credentials) as etcd:
            seen = Seen()
            files = {"discovery_ca": str(cert), "discovery_cert": str(cert), "discovery_key": str(key)}
            nobody, plain = at(etcd, discovery_ca=str(cert))[0], at(etcd)[0]
            async with running(
                at(etcd, **files)[0].watch(seen), at(etcd, **files)[0].announce(A),
                nobody.announce(B), plain.announce(B),
            ):  # fmt: skip
                await seen.becomes(A)
                await until(lambda: "UNAVAILABLE" in nobody.trouble and "UNAVAILABLE" in plain.trouble)
                assert seen.now == {A}

    asyncio.run(run())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"discovery": "http://a:1"}, "etcd://host:port"),
        ({"discovery": "etcd://a"}, "write host:port"),
        ({"discovery": "etcd://a:1,b:99999/x"}, "'b:99999'"),
        ({"discovery": "etcd://a:1", "discovery_cert": "c.pem"}, "belong together"),
        ({"discovery": "etcd://a:1", "discovery_ttl_s": 0}, "discovery-ttl-s"),
        ({"discovery": "etcd://a:1", "discovery_ca": "/nowhere/ca.pem"}, "/nowhere/ca.pem"),
        ({"discovery": "etcd://a:1", "discovery_login": "/nowhere/login"}, "/nowhere/login"),
    ],
)
def test_options_that_cannot_work_are_refused_with_what_to_change(options: dict[str, Any], complaint: str) -> None:
    def start() -> None:
        given = DiscoveryOptions(**options)
        validate(given)
        open_discovery(given)

    with pytest.raises(ConfigurationError, match=complaint):
        start()


@pytest.mark.parametrize(
    ("content", "mode", "complaint"),
    [("baton:SECRET", 0o644, "--discovery-login .* chmod 600"), ("SECRET", 0o600, "must hold user:password")],
)
def test_a_login_is_kept_from_others_and_out_of_messages(
    tmp_path: Path, content: str, mode: int, complaint: str
) -> None:
    login = tmp_path / "login"
    login.write_text(content)
    login.chmod(mode)
    with pytest.raises(ConfigurationError, match=complaint) as refused:
        open_discovery(DiscoveryOptions(discovery="etcd://a:1", discovery_login=str(login)))
    assert "SECRET" not in str(refused.value)
    with pytest.raises(ConfigurationError, match="--discovery-login") as refused:
        validate(DiscoveryOptions(discovery="etcd://baton:SECRET@a:1"))
    assert "SECRET" not in str(refused.value)
