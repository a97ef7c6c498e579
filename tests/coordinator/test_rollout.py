"""The file behind --rollout, and the choices that follow from it."""

import asyncio
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import ConfigurationError
from coordinator.rollout import Rollout, parse_rollout
from coordinator.watched_file import WatchedFile

KEYS = [f"request-{number}" for number in range(20_000)]


def file_at(path: Path) -> WatchedFile[Rollout]:
    return WatchedFile("--rollout", path, parse_rollout, poll_s=0.005)


def share(of: str, weights: dict[str, float], keys: list[str] = KEYS) -> float:
    return sum(Rollout().pick(key, weights) == of for key in keys) / len(keys)


@pytest.mark.parametrize("weights", [{"a": 90.0, "b": 10.0}, {"a": 1.0, "b": 2.0, "c": 5.0}, {"a": 0.001, "b": 0.009}])
def test_shares_are_those_of_the_weights(weights: dict[str, float]) -> None:
    for version, weight in weights.items():
        assert share(version, weights) == pytest.approx(weight / sum(weights.values()), abs=0.01)


def test_a_weight_that_grows_only_takes_requests_over() -> None:
    before, after = ({"a": 90.0, "b": 10.0}, {"a": 90.0, "b": 40.0})
    was = {key for key in KEYS if Rollout().pick(key, before) == "b"}
    assert was < {key for key in KEYS if Rollout().pick(key, after) == "b"}


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0.001, 1e6), min_size=2), st.text())
def test_without_a_version_only_its_own_requests_move(weights: dict[str, float], key: str) -> None:
    chosen = Rollout().pick(key, weights)
    for gone in weights.keys() - {chosen}:
        assert Rollout().pick(key, {name: weight for name, weight in weights.items() if name != gone}) == chosen


def test_those_that_move_are_shared_by_weight() -> None:
    weights = {"a": 50.0, "b": 30.0, "c": 20.0}
    moved = [key for key in KEYS if Rollout().pick(key, weights) == "a"]
    assert share("b", {"b": 30.0, "c": 20.0}, moved) == pytest.approx(0.6, abs=0.02)


def test_shadows_are_drawn_by_their_share_whatever_version_serves() -> None:
    drawn = Rollout(shadow={"s": 0.05})
    shadowed = [key for key in KEYS if drawn.wants_shadow(key, "s")]
    assert len(shadowed) / len(KEYS) == pytest.approx(0.05, abs=0.005)
    assert share("b", {"a": 1.0, "b": 1.0}, shadowed) == pytest.approx(0.5, abs=0.05)
    assert not any(Rollout(shadow={"s": 0.0}).wants_shadow(key, "s") for key in KEYS)
    assert all(Rollout(shadow={"s": 1.0}).wants_shadow(key, "s") for key in KEYS)


def test_with_another_salt_it_is_another_choice() -> None:
    weights = {"a": 1.0, "b": 1.0}
    same = sum(Rollout(salt="x").pick(key, weights) == Rollout(salt="y").pick(key, weights) for key in KEYS)
    assert same / len(KEYS) == pytest.approx(0.5, abs=0.02)


def test_a_file_says_what_it_says() -> None:
    said = parse_rollout('salt = "s"\n[weights]\nv1 = 90\n"v2.1" = 9.5\nold = 0\n[shadow]\nv3 = 0.05\n')
    assert said == Rollout({"v1": 90.0, "v2.1": 9.5, "old": 0.0}, {"v3": 0.05}, "s")
    assert [said.forbids(version) for version in ("v1", "old", "v3", "nobody")] == [False, True, True, False]
    assert parse_rollout("") == Rollout()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[weights", "no TOML"),
        ("[weigths]\nv1 = 1", "'weigths' is not known"),
        ("weights = 3", r"\[weights\]"),
        ("[weights]\nv1 = -1", "v1 in .weights. must be a number, 0 or more"),
        ("[weights]\nv1 = 'much'", "must be a number"),
        ("[weights]\nv1 = true", "must be a number"),
        ("[weights]\nv1 = nan", "must be a number"),
        ("[weights]\nv1 = inf", "must be a number"),
        ("[weights]\nv1 = 0", "every weight is 0"),
        ("[weights]\n'v 1' = 1", "a version is"),
        ("[shadow]\nv1 = 5", "0 to 1"),
        ("[shadow]\nv1 = 0.1\n[weights]\nv1 = 1", "weight and a shadow share"),
        ("salt = 4", "salt must be text"),
    ],
)
def test_a_broken_file_says_what_to_change(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        parse_rollout(text)


def test_a_file_that_is_broken_at_the_start_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--rollout .*none.toml: No such file"):
        file_at(tmp_path / "none.toml")
    path = tmp_path / "rollout.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        file_at(path)


def test_a_file_is_read_when_it_changes_and_kept_while_it_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "rollout.toml"
    path.write_text("[weights]\nv1 = 1")

    async def main() -> None:
        file = file_at(path)
        changes: asyncio.Queue[Rollout] = asyncio.Queue()
        errors: asyncio.Queue[None] = asyncio.Queue()
        watching = asyncio.create_task(file.watch(changes.put_nowait, lambda: errors.put_nowait(None)))
        async with asyncio.timeout(10):
            path.write_text("[weights]\nv1 = ")
            await errors.get()
            assert "no TOML" in file.trouble
            assert file.content.weights == {"v1": 1.0}
            path.write_text("[weights]\nv2 = 1")
            assert (await changes.get()).weights == {"v2": 1.0}
            assert file.trouble == ""
            # As a config map is changed: another file is put in its place.
            other = tmp_path / "other.toml"
            other.write_text("[weights]\nv3 = 1")
            os.replace(other, path)
            assert (await changes.get()).weights == {"v3": 1.0}
            path.unlink()
            await errors.get()
            await asyncio.sleep(0.05)
            assert errors.empty(), "said once"
            assert file.content.weights == {"v3": 1.0}
            path.write_text("[weights]\nv3 = 1")
            await changes.get()
        watching.cancel()

    asyncio.run(main())
