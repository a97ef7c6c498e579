"""Where the model is: the bundled one, a folder, or a hub id."""

from pathlib import Path

import engine
from baton.config import ModelOptions
from baton.model_folder import resolve_model

DEMO_FOLDER = Path(engine.__file__).parent / "demo_model"


def model_folder(options: ModelOptions) -> Path:
    """Raises ModelError when there is none to be had."""
    return resolve_model(options, DEMO_FOLDER)
