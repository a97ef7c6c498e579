"""Where the model is (the bundled one, a folder, or a hub id), and how many threads and cores it deserves."""

import os
from pathlib import Path

import engine
from baton.config import EngineOptions, ModelOptions, parse_cores
from baton.errors import ConfigurationError
from baton.model_folder import resolve_model

SMALL_MODEL_BYTES = 64 << 20
"""Weights below this are computed faster by one thread: waking another costs more than it takes over."""
DEMO_FOLDER = Path(engine.__file__).parent / "demo_model"


def model_folder(options: ModelOptions, weights: bool = True) -> Path:
    """Raises ModelError when there is none to be had. A coordinator needs one without weights."""
    return resolve_model(options, DEMO_FOLDER, weights)


def threads_for(options: EngineOptions, folder: Path, num_workers: int = 1) -> int:
    """CPU threads of one of `num_workers` workers that share this machine."""
    weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    share = 1 if weight_bytes < SMALL_MODEL_BYTES else max(1, len(os.sched_getaffinity(0)) // num_workers)
    return options.threads or share


def cores_for(options: EngineOptions) -> frozenset[int]:
    """Those of `--cores`; none when nobody chose. Raises ConfigurationError when this process may not use them."""
    cores = parse_cores(options.cores) if options.cores else frozenset()
    if missing := cores - (allowed := os.sched_getaffinity(0)):
        raise ConfigurationError(f"--cores names {sorted(missing)}; this process may use {sorted(allowed)}")
    return cores


def own_cores(num_workers: int, num_threads: int) -> list[str]:
    """`--cores` of each worker, neighbours, when together they take the whole machine; else empty: whoever leaves
    cores free leaves it to the system where there is room, as another program may have chosen the same ones.
    """
    cores = sorted(os.sched_getaffinity(0))
    if num_workers * num_threads != len(cores):
        return [""] * num_workers
    return [",".join(map(str, cores[start : start + num_threads])) for start in range(0, len(cores), num_threads)]
