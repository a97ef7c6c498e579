"""Libraries in C++, compiled for this processor when they are first needed.

A library is kept in the user's cache under a name made of everything that it depends on: source, flags, compiler and
processor. Whoever wants one can do without: there may be no compiler, or no place to keep what it makes.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_FLAGS: Final = ("-std=c++17", "-fPIC", "-march=native")
TIMEOUT_S: Final = 120.0


class Unavailable(Exception):
    """There is no such library here; the message says why."""


@functools.cache
def processor_flags() -> frozenset[str]:
    """Of the first processor, as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def compiled(source: Path, flags: Sequence[str]) -> Path:
    """Path of the library made of `source`, compiling it if need be. Raises Unavailable."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise Unavailable("there is no C++ compiler; install g++, or name one in CXX")
    try:
        return _compiled(compiler, source, (*_FLAGS, *flags))
    except (OSError, subprocess.SubprocessError) as error:
        # Neither a full or read-only disk nor a broken compiler may keep a process from starting.
        raise Unavailable(f"{compiler} could not compile {source.name}: {error}") from error


def _compiled(compiler: str, source: Path, flags: Sequence[str]) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    key = "\n".join((source.read_text(), *flags, version, platform.machine(), *sorted(processor_flags())))
    path = _cache() / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        _compile(compiler, source, flags, path)
    return path


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"baton-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise Unavailable(f"{folder} belongs to somebody else") from None
    return folder


def _compile(compiler: str, source: Path, flags: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        object_file, result = Path(scratch) / "library.o", Path(scratch) / "library.so"
        # Linked without these flags: the symbols of -fopenmp come from the OpenMP runtime that torch has loaded.
        commands = (
            [compiler, *flags, "-c", str(source), "-o", str(object_file)],
            [compiler, "-shared", str(object_file), "-o", str(result)],
        )
        for command in commands:
            subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=True)
        os.replace(result, path)  # several processes may get here at the same time
