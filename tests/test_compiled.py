"""Libraries in C++ are compiled once, and whatever keeps them from it is said."""

import ctypes
import shutil
from pathlib import Path

import pytest

from baton.compiled import Unavailable, compiled

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return ANSWER; }')
    return path


def test_a_library_is_compiled_once_for_each_source_and_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = compiled(source, ["-DANSWER=1"])
    made = first.stat().st_mtime_ns
    other = compiled(source, ["-DANSWER=2"])
    assert compiled(source, ["-DANSWER=1"]) == first
    assert first.stat().st_mtime_ns == made
    assert [ctypes.CDLL(str(each)).answer() for each in (first, other)] == [1, 2]
    source.write_text('extern "C" int answer() { return 10 + ANSWER; }')
    assert ctypes.CDLL(str(compiled(source, ["-DANSWER=1"]))).answer() == 11


@pytest.mark.parametrize(
    ("compiler", "cache", "says"),
    [
        ("no-such-compiler", "cache", "install g\\+\\+"),
        ("false", "cache", "could not compile answer.cpp"),
        ("g++", "file", "could not compile answer.cpp"),
    ],
)
def test_whatever_keeps_a_library_from_being_compiled_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path, compiler: str, cache: str, says: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
    # Where the cache is a file and no folder, the fallback folder is one that cannot hold anything either.
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "file"))
    with pytest.raises(Unavailable, match=says):
        compiled(source, ["-DANSWER=1"])
