"""Where the model is (the bundled one, a folder, or a hub id), and how many threads it deserves."""

import os
from pathlib import Path

import engine
from baton.config import EngineOptions, ModelOptions
from baton.model_folder import resolve_model

SMALL_MODEL_BYTES = 64 << 20
"""Weights below this are computed faster by one thread: waking another costs more than it takes over."""
DEMO_FOLDER = Path(engine.__file__).parent / "demo_model"


def model_folder(options: ModelOptions) -> Path:
    """Raises ModelError when there is none to be had."""
    return resolve_model(options, DEMO_FOLDER)


def threads_for(options: EngineOptions, folder: Path, num_workers: int = 1) -> int:
    """CPU threads of one of `num_workers` workers that share this machine."""
    weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    share = 1 if weight_bytes < SMALL_MODEL_BYTES else max(1, len(os.sched_getaffinity(0)) // num_workers)
    return options.threads or share
