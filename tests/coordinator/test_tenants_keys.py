"""The file behind --keys, and `baton key create`: what is wrong is named, and no key is ever repeated."""

import math
import re
import stat
import tomllib
from pathlib import Path

import pytest
from tenant_files import SECRET, entry

from baton.client import read_api_key
from baton.errors import ConfigurationError
from cli.main import main
from coordinator.tenants.keys import Secret, digest_of, key_id, new_key, parse_keys
from coordinator.watched_file import WatchedFile

KEY = "sk-baton-" + 43 * "k"  # the same in every process: it is in the names of tests


def test_a_file_says_what_it_says() -> None:
    keys = parse_keys(
        SECRET
        + """
        [tenants.acme]
        scopes = ["infer", "pins"]
        models = ["demo"]
        requests_per_minute = 600
        tokens_per_minute = 100_000
        max_streams = 8
        priority = -2
        weight = 2
        kv_share = 0.5
        cache_group = "family"
        price_input = 0.15
        [tenants.plain]
        """
        + entry("acme", KEY, "expires = 2027-01-01T00:00:00Z\nnote = 'of the team'")
    )
    acme, plain = keys.tenants["acme"], keys.tenants["plain"]
    assert (acme.scopes, acme.models) == ({"infer", "pins"}, {"demo"})
    assert (acme.requests_per_minute, acme.tokens_per_minute, acme.max_streams) == (600, 100_000, 8)
    assert (acme.priority, acme.weight, acme.kv_share, acme.cache_group) == (-2, 2.0, 0.5, "family")
    assert (acme.price_input, acme.price_cached, acme.price_output) == (0.15, None, 0.0)
    assert (plain.scopes, plain.models, plain.weight) == ({"infer"}, frozenset(), 1.0)
    found = keys.by_digest[digest_of(KEY)]
    assert (found.tenant, found.id, found.expires_at) == ("acme", key_id(digest_of(KEY)), 1798761600.0)
    assert digest_of(KEY[:-1]) not in keys.by_digest
    assert parse_keys(SECRET).tenants == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", 'there is no secret; write secret = "…" above all tables'),
        ("secret = 3", "secret: Expected `text in quotes`, got `whole number`"),
        ('secret = "short"', "the secret has 5 characters; give it 32"),
        ("[tenants.a]\n" + SECRET, "there is no secret"),
        (SECRET + "[tenants", "no TOML"),
        (SECRET + "[tenant.acme]", "'tenant' is not known here; known are secret, tenants, keys"),
        (
            SECRET + "[tenants.acme]\nscope = ['infer']",
            r"\[tenants.acme\]: 'scope' is not known here; known are scopes",
        ),
        (SECRET + "[tenants.acme]\nscopes = ['root']", "no such scope; choose of infer, pins, operate"),
        (SECRET + "[tenants.acme]\nscopes = []", "scopes is empty"),
        (SECRET + "[tenants.acme]\nmodels = 'demo'", r"models: Expected `list`, got `text in quotes`"),
        (SECRET + "[tenants.acme]\nrequests_per_minute = 0", r"\[tenants.acme\] requests_per_minute: Expected `whole"),
        (SECRET + "[tenants.acme]\ntokens_per_minute = 0.5", "Expected `whole number`, got `number`"),
        (SECRET + "[tenants.acme]\nmax_streams = true", "Expected `whole number`, got `bool`"),
        (SECRET + "[tenants.acme]\npriority = 1001", "priority: Expected `whole number` <= 1000"),
        (SECRET + "[tenants.acme]\nweight = 0", "weight: Expected `number` >= 0.001"),
        (SECRET + "[tenants.acme]\nweight = nan", "weight: Expected `number` >= 0.001"),
        (SECRET + "[tenants.acme]\nweight = inf", "weight: Expected `number` <= 1"),
        (SECRET + "[tenants.acme]\nkv_share = 1.5", "kv_share: Expected `number` <= 1.0"),
        (SECRET + "[tenants.acme]\nprice_input = -1", "price_input: Expected `number` >= 0.0"),
        (SECRET + "[tenants.acme]\ncache_group = 'a b'", "cache_group .* is no name"),
        (SECRET + "[tenants.'a b']", "tenant .* is no name: write 1 to 64 letters"),
        (SECRET + "[tenants]\nacme = 3", "Expected `table`, got `whole number`"),
        (SECRET + "keys = 3", "keys: Expected `list`"),
        (SECRET + "[[keys]]\ntenant = 'acme'", r"\[\[keys\]\] number 1: hash is missing"),
        (SECRET + "[[keys]]\nhash = 'x'", r"\[\[keys\]\] number 1: tenant is missing"),
        (SECRET + "[[keys]]\ntenant = 'acme'\nhash = 'sha256:00'", "must be sha256: and 64 hexadecimal digits"),
        (SECRET + entry("acme", KEY), r"number 1 is of tenant 'acme': add \[tenants.acme\]"),
        (SECRET + "[tenants.acme]\n" + 2 * entry("acme", KEY), "number 2 has the hash of an earlier one"),
        (SECRET + "[tenants.acme]\n" + entry("acme", KEY, "expires = 2027-01-01T00:00:00"), "needs a time zone"),
        (SECRET + "[tenants.acme]\n" + entry("acme", KEY, "expires = 3"), "expires: Expected `datetime`"),
    ],
)
def test_every_mistake_has_an_error_that_says_what_to_change(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        parse_keys(text)


@pytest.mark.parametrize(
    "text",
    [
        f"[tenants.acme]\n[[keys]]\ntenant = 'acme'\nhash = '{KEY}'",
        f"[[keys]]\ntenant = '{KEY}'\nhash = 'sha256:{'0' * 64}'",
        f"[tenants.'{KEY}']",
        f"[tenants.acme]\n{KEY} = 3",
        f"[tenants.acme]\ncache_group = '{KEY} '",
        f"[tenants.acme]\nscopes = ['{KEY}']",
        f"[tenants.acme]\n{KEY} = 1\n{KEY} = 1",
        f"[tenants.{KEY}.x]\na=1\n[tenants.{KEY}.x]",
        f"[{KEY}]",
    ],
)
def test_a_key_in_the_wrong_place_is_not_repeated(text: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse_keys(SECRET + text)
    assert KEY not in str(raised.value)
    assert SECRET not in str(raised.value)


def test_keys_are_256_random_bits_and_what_is_kept_of_them_is_a_digest() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    for key in keys:
        assert re.fullmatch(r"sk-baton-[A-Za-z0-9_-]{43}", key)  # 43 letters of 6 bits: 256, and 2 that are 0
    assert KEY not in repr(parse_keys(SECRET + "[tenants.a]\n" + entry("a", KEY)))
    assert "0123456789" not in repr(parse_keys(SECRET))


def test_salts_differ_by_tenant_group_client_and_secret() -> None:
    one, other = Secret(b"1" * 32), Secret(b"2" * 32)
    salts = [
        secret.salt(tenant, group, client)
        for secret in (one, other)
        for tenant, group in (("a", ""), ("b", ""), ("", "a"), ("", "b"))
        for client in ("", "x", "a", "b")
    ]
    assert len(set(salts)) == len(salts)
    assert one.salt("a", "g", "x") == one.salt("b", "g", "x")
    assert one.opaque("a") != other.opaque("a") != one.opaque("b")


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(SECRET)
    path.chmod(0o604)
    with pytest.raises(ConfigurationError, match=r"--keys .*every user of this machine may read it; say chmod 600"):
        WatchedFile("--keys", path, parse_keys, secret=True)
    path.chmod(0o640)
    assert WatchedFile("--keys", path, parse_keys, secret=True).content.tenants == {}


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["baton", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_a_created_key_is_shown_once_and_its_hash_is_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.toml"
    create = ["key", "create", "--keys", str(path), "--tenant"]
    assert command(monkeypatch, *create, "acme", "--scopes", "infer,pins", "--days", "30", "--note", "the team's") == 0
    first = capsys.readouterr().out.strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    by_hand = path.read_text() + "# a remark, and no line end"
    path.write_text(by_hand)
    inode = path.stat().st_ino
    assert command(monkeypatch, *create, "acme") == 0
    second = capsys.readouterr().out.strip()
    assert command(monkeypatch, *create, "other") == 0
    third = capsys.readouterr().out.strip()
    text = path.read_text()
    assert text.startswith(by_hand)
    assert path.stat().st_ino == inode
    keys = parse_keys(text)
    assert {keys.by_digest[digest_of(key)].tenant for key in (first, second)} == {"acme"}
    assert keys.by_digest[digest_of(third)].tenant == "other"
    assert keys.tenants["acme"].scopes == {"infer", "pins"}
    assert math.isfinite(keys.by_digest[digest_of(first)].expires_at)
    assert tomllib.loads(text)["keys"][0]["note"] == "the team's"
    assert not [key for key in (first, second, third) if key in text]

    for words, says in (
        (["acme", "--scopes", "infer"], "has tenant acme already"),
        (["new", "--scopes", "root"], "no such scope"),
        (["new", "--days", "-1"], "--days is -1"),
        (["a b"], "is no name"),
        (["new", "--note", 'a"b'], "without quotation marks"),
    ):
        assert command(monkeypatch, *create, *words) == 2
        assert says in capsys.readouterr().err
        assert path.read_text() == text
    path.chmod(0o644)
    assert command(monkeypatch, *create, "acme") == 2
    assert "chmod 600" in capsys.readouterr().err
    assert command(monkeypatch, "key", "create", "--tenant", "a", "--keys", str(tmp_path / "no" / "file")) == 2
    assert "No such file" in capsys.readouterr().err


def test_without_a_file_the_entry_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "key", "create", "--tenant", "acme") == 0
    key, _, printed = capsys.readouterr().out.partition("\n")
    assert parse_keys(SECRET + "[tenants.acme]\n" + printed).by_digest[digest_of(key)].tenant == "acme"


def test_no_command_takes_a_key_as_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["complete", "hi"], ["chat", "hi"], ["status"], ["drain", "decode-0"]):
        assert command(monkeypatch, *words, "--api-key", KEY) == 2
        assert "takes a file with the key" in (said := capsys.readouterr().err)
        assert KEY not in said
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    path.chmod(0o604)
    assert command(monkeypatch, "status", "--api-key-file", str(path)) == 2
    assert "chmod 600" in capsys.readouterr().err
    path.chmod(0o600)
    assert read_api_key(str(path)) == KEY
    path.write_text(f"{KEY} {KEY}")
    with pytest.raises(ConfigurationError, match="holds no API key") as raised:
        read_api_key(str(path))
    assert KEY not in str(raised.value)
