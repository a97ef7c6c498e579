"""Compiles native.cpp for this processor, once; `python -m kernels.cpu.build` does it ahead of the first start.

The library is kept in the user's cache under a name made of everything that it depends on: source, flags, compiler
and processor. Without a compiler, or on a processor without the instructions, there is none, and torch does the work.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-march=native", "-ffp-contract=off")
"""No contraction: every copy of a template must round alike, or a row's bits would depend on its neighbours."""
NEEDED = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"})
COMPILE_TIMEOUT_S = 120.0


class Unavailable(Exception):
    """There is no native library here; the message says why."""


@functools.cache
def processor_flags() -> frozenset[str]:
    """Of the first processor, as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def library() -> Path:
    """Path of the compiled library, compiling it if need be. Raises Unavailable."""
    missing = NEEDED - processor_flags()
    if missing:
        raise Unavailable(f"the processor has no {', '.join(sorted(missing))}")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise Unavailable("there is no C++ compiler; install g++, or name one in CXX")
    try:
        return _compiled(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        # Neither a full or read-only disk nor a broken compiler may keep a worker from starting.
        raise Unavailable(f"{compiler} could not compile the native kernels: {error}") from error


def _compiled(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    key = "\n".join((SOURCE.read_text(), *FLAGS, version, platform.machine(), *sorted(processor_flags())))
    path = _cache() / f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        _compile(compiler, path)
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


def _compile(compiler: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        object_file, result = Path(scratch) / "native.o", Path(scratch) / "native.so"
        # Linked without -fopenmp: its symbols come from the OpenMP runtime that torch has loaded.
        commands = (
            [compiler, *FLAGS, "-fopenmp", "-c", str(SOURCE), "-o", str(object_file)],
            [compiler, "-shared", str(object_file), "-o", str(result)],
        )
        for command in commands:
            subprocess.run(command, capture_output=True, timeout=COMPILE_TIMEOUT_S, check=True)
        os.replace(result, path)  # several workers may get here at the same time


if __name__ == "__main__":
    try:
        print(f"native CPU kernels: {library()}")
    except Unavailable as reason:
        print(f"no native CPU kernels, torch does the work: {reason}", file=sys.stderr)
