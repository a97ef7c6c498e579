"""From what --model says to a folder on this machine."""

import json
from pathlib import Path

import xxhash

from baton.config import ModelOptions
from baton.errors import ModelError

# Many repositories hold the weights several times: in other formats, in subfolders, in Mistral's own layout.
_NEEDED_FILES = ["*.json", "*.jinja"]
_WEIGHTS = ["*.safetensors"]
_UNNEEDED_FILES = ["*/*", "consolidated*"]
_ETAG_TIMEOUT_S = 10.0
VERSION_DIGITS = 12
"""Of a fingerprint of weights, in the label of a model version that nobody named."""


def served_name(options: ModelOptions) -> str:
    """The name clients use: --served-name, else the last part of --model."""
    if options.served_name:
        return options.served_name
    path = Path(options.model).expanduser()
    return path.resolve().name if options.model != "demo" and path.is_dir() else path.name


def tokenizer_fingerprint(folder: Path) -> str:
    """Equal for folders whose tokenizers turn the same text into the same tokens; empty without a tokenizer.json.

    Hashed is what the file says, not how it is written: saved again by another version of a library it may have other
    spaces. What a training run left of cutting and filling up is not used here.
    """
    try:
        content = json.loads((folder / "tokenizer.json").read_bytes())
    except (OSError, ValueError):
        return ""  # a worker needs none; a coordinator says what is wrong when it loads it
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if name not in ("truncation", "padding")}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True))


def resolve_model(options: ModelOptions, demo_folder: Path, weights: bool = True) -> Path:
    """The folder that holds the model: `demo_folder` for 'demo', an existing folder, else one fetched from the hub,
    where `weights` are not wanted without them.

    The hub library shows its progress bar and honours HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. Raises
    ModelError that says what to change.
    """
    if options.model == "demo":
        return demo_folder
    path = Path(options.model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"--model {options.model} is a file; give the folder that holds it")
    if path.is_absolute() or options.model.startswith((".", "~")) or options.model.count("/") > 1:
        raise ModelError(f"--model {options.model} does not exist; give a model folder, a hub id or 'demo'")
    return _fetch(options, [*_NEEDED_FILES, *(_WEIGHTS if weights else [])])


def _fetch(options: ModelOptions, patterns: list[str]) -> Path:
    # Imported here: it takes a third of a second, and most starts need no hub.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"--model {options.model}"
    try:
        return Path(
            snapshot_download(
                options.model,
                revision=options.revision or None,
                allow_patterns=patterns,
                ignore_patterns=_UNNEEDED_FILES,
                etag_timeout=_ETAG_TIMEOUT_S,
            )
        )
    except HFValidationError as error:
        raise ModelError(f"{name} is neither a folder nor a hub id: {error}") from error
    except GatedRepoError as error:
        raise ModelError(f"{name} is gated; accept its licence on the hub, then set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision '{options.revision}'; change --revision") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name} is neither a folder nor a model on {constants.ENDPOINT}; if it is private, set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise ModelError(f"{name} is not in the local cache and HF_HUB_OFFLINE is set; unset it once") from error
        raise ModelError(f"{name} is not in the local cache and {constants.ENDPOINT} cannot be reached") from error
    except HfHubHTTPError as error:
        raise ModelError(
            f"{name} cannot be fetched from {constants.ENDPOINT}: {error.server_message or error}"
        ) from error
    except OSError as error:
        raise ModelError(f"{name} cannot be fetched from {constants.ENDPOINT}: {error}") from error
