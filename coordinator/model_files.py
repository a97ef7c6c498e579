"""What the coordinator reads of a model folder beside the tokenizer: defaults of sampling, ends, vocabulary."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.errors import ModelError

_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts of the model that every request needs."""

    vocab_size: int
    """Token ids below this have an embedding."""
    eos_token_ids: tuple[int, ...]
    sampling_defaults: dict[str, float] = field(default_factory=dict)
    """Of generation_config.json. Like vLLM we take what the file gives, whatever its do_sample says."""


def read_json(path: Path, required: bool = False) -> dict[str, Any]:
    """The object in a JSON file; {} if the file is absent and not required. Raises ModelError."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        if required:
            raise ModelError(f"{path} is missing; --model must be a complete Hugging Face model folder") from None
        return {}
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return content


def read_facts(folder: Path, tokenizer_vocab_size: int, tokenizer_eos_id: int | None) -> ModelFacts:
    """Of config.json and generation_config.json.

    Ends of sequence are those of generation_config.json, else config.json, and the tokenizer's own as well: fine-tuned
    models often set only one of them, and a stream that runs past its end of turn helps nobody.
    """
    config_path = folder / "config.json"
    config = read_json(config_path, required=True)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path)
    text_config = config.get("text_config")
    vocab_size = (text_config if isinstance(text_config, dict) else config).get("vocab_size", tokenizer_vocab_size)
    if not _is_int(vocab_size) or vocab_size < 1:
        raise ModelError(f"{config_path}: vocab_size must be a positive integer")
    ends = _token_ids(generation_path, generation) or _token_ids(config_path, config)
    if tokenizer_eos_id is not None:
        ends.append(tokenizer_eos_id)
    defaults: dict[str, float] = {}
    for name in _SAMPLING_FIELDS:
        value = generation.get(name)
        if value is not None:
            if not _is_int(value) and not isinstance(value, float):
                raise ModelError(f"{generation_path}: {name} must be a number")
            defaults[name] = value
    return ModelFacts(vocab_size, tuple(dict.fromkeys(ends)), defaults)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _token_ids(path: Path, config: dict[str, Any]) -> list[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(_is_int(item) and item >= 0 for item in ids):
        raise ModelError(f"{path}: eos_token_id must be a token id or a list of token ids")
    return list(ids)
