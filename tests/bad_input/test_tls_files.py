"""TLS files that cannot be used: what is said names the flag and what to change, and nothing of a key."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.client import trusting
from baton.config import PublicTlsOptions, TlsOptions, validate
from baton.errors import ConfigurationError
from baton.tls import COORDINATOR_NAME, inside, outside
from cli.serve import trusted
from tests.authority import Authority, Files, openssl


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "ours")


@pytest.fixture(scope="module")
def good(authority: Authority) -> Files:
    return authority.sign("good")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (TlsOptions(tls_cert="c"), "--tls-key and --tls-ca is missing"),
        (TlsOptions(tls_cert="c", tls_key="k"), "--tls-ca is missing"),
        (TlsOptions(tls_ca="a"), "--tls-cert and --tls-key is missing"),
        (PublicTlsOptions(public_tls_cert="c"), "--public-tls-key is missing"),
        (PublicTlsOptions(public_tls_key="k"), "--public-tls-cert is missing"),
        (PublicTlsOptions(public_tls_client_ca="a"), "--public-tls-client-ca needs --public-tls-cert"),
    ],
)
def test_half_of_the_flags_is_an_error_that_names_the_others(options: object, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        validate(options)


def locked(good: Files, folder: Path) -> Files:
    key = folder / "locked.key"
    openssl("ec", "-in", good.key, "-aes256", "-passout", "pass:secret", "-out", key)
    return good._replace(key=str(key))


def readable(good: Files, folder: Path) -> Files:
    key = folder / "readable.key"
    shutil.copy(good.key, key)
    key.chmod(0o644)
    return good._replace(key=str(key))


def cut(good: Files, folder: Path) -> Files:
    cert = folder / "cut.pem"
    cert.write_bytes(Path(good.cert).read_bytes()[:200])
    return good._replace(cert=str(cert))


ROWS: dict[str, tuple[Callable[[Files, Path], Files], str, str]] = {
    "no certificate": (lambda good, _: good._replace(cert="/no/such"), "tls-cert '/no/such' cannot be read", "both"),
    "no key": (lambda good, _: good._replace(key="/no/such"), "tls-key '/no/such' cannot be read", "both"),
    "key is a folder": (lambda good, folder: good._replace(key=str(folder)), "tls-key .* is no file", "both"),
    "key for everybody": (readable, "tls-key .* may be read by every user of this machine; say chmod 600", "both"),
    "key with a password": (locked, "tls-key .* cannot be used: .*the key without a password", "both"),
    "cut off": (cut, "tls-cert .* cannot be used", "both"),
    "key as certificate": (lambda good, _: good._replace(cert=good.key), "tls-cert .* cannot be used", "both"),
    "key of another": (
        lambda good, folder: good._replace(key=Authority(folder, "other").sign("x").key),
        "tls-cert .* and --.*tls-key .* cannot be used: key values mismatch; they are PEM files of one pair",
        "both",
    ),
    "expired": (lambda good, folder: Authority(folder, "old").sign("old", days=-1), "certificate has expired", "both"),
    "of another authority": (
        lambda good, folder: Authority(folder, "other").sign("x")._replace(ca=good.ca),
        "--tls-cert .* does not pass for --tls-ca",
        "inside",
    ),
    "no authority": (lambda good, _: good._replace(ca="/no/such"), "--tls-ca '/no/such' cannot be read", "inside"),
    "key as authority": (lambda good, _: good._replace(ca=good.key), "--tls-ca .* cannot be used", "inside"),
    "not a coordinator's": (
        lambda good, folder: Authority(folder, "mine").sign("worker", names="DNS:worker-1"),
        "it needs the name DNS:coordinator.baton, see docs/security.md",
        "coordinator",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_files_that_cannot_be_used_are_refused_at_the_start(row: str, good: Files, tmp_path: Path) -> None:
    spoil, says, sides = ROWS[row]
    files = spoil(good, tmp_path)
    for side in ("inside", "public") if sides == "both" else (sides,):
        name = COORDINATOR_NAME if side == "coordinator" else ""
        with pytest.raises(ConfigurationError, match=says) as refused:
            _ = outside(files.public()) if side == "public" else inside(files.options(), name)
        text = Path(good.key).read_text()
        assert not [line for line in text.splitlines() if len(line) > 20 and line in str(refused.value)]


def test_a_client_is_told_which_of_its_files_is_no_good(good: Files) -> None:
    for words in ({"ca": "/no/such"}, {"ca": good.key}, {"cert": good.key}, {"cert": good.cert, "key": good.cert}):
        with pytest.raises(ConfigurationError, match="cannot be used for TLS"):
            trusting(**words)


def test_baton_serve_needs_a_certificate_for_itself_where_clients_need_one(good: Files) -> None:
    for options, cert, key in (
        (good.public(good.ca), "", ""),
        (good.public(good.ca), good.cert, ""),
        (good.public(), good.cert, good.key),
    ):
        with pytest.raises(ConfigurationError, match="--client-cert and --client-key of `baton serve` belong together"):
            trusted(options, cert, key)
    assert trusted(good.public(good.ca), good.cert, good.key) is not None
    assert trusted(PublicTlsOptions(), "", "") is None


def test_without_flags_there_is_no_tls() -> None:
    assert inside(TlsOptions()) is None
    assert outside(PublicTlsOptions()) is None
