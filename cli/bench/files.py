"""Requests from files that others made: who asked when, for how much, and what is shared.

| kind | is seen by | has |
|---|---|---|
| Azure LLM inference trace (CSV) | header TIMESTAMP,ContextTokens,GeneratedTokens | times, lengths |
| Mooncake trace (JSON lines) | timestamp (ms), input_length, output_length | times, lengths, hash_ids: blocks of 512 |
| ShareGPT (JSON) | a list of conversations: from, value | texts, turns |
| prompts (JSON lines) | prompt, maybe output_tokens | texts |
"""

import csv
import datetime
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from baton.errors import ConfigurationError

BLOCK_TOKENS = 512
"""Of a hash id of Mooncake's."""
CHARACTERS_PER_TOKEN = 4
"""A rough guess, for answers in texts that nobody counted."""
_HUMAN, _MODEL = {"human", "user"}, {"gpt", "assistant", "chatgpt", "bing", "bard"}


class Asked(NamedTuple):
    """A request, or a conversation, of a file."""

    at_s: float | None
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    """What the user says, turn by turn."""
    answers: tuple[int, ...] = ()
    """Tokens of each answer."""


class Read(NamedTuple):
    kind: str
    asked: list[Asked]
    """In the order of their times."""
    left_out: int
    """Longer than was allowed."""


def read(path: str, longest: int, output_tokens: int) -> Read:
    """`longest`: tokens of a request that is taken, 0: any. `output_tokens`: where the file says none.

    Raises ConfigurationError.
    """
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            beginning = file.read(1 << 16).lstrip()
        kind = _kind(beginning)
        asked = list(_READERS[kind](path, output_tokens))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"--file {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    except _Unknown:
        raise ConfigurationError(f"--file {path} is of no kind that is known; see `baton bench --help`") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error)[:120] if isinstance(error, _Wrong) else "a line has no such fields"
        raise ConfigurationError(f"--file {path} begins like {kind}, and is broken: {reason}") from error
    taken = [each for each in asked if not longest or each.input_tokens + each.output_tokens <= longest]
    if not taken:
        raise ConfigurationError(f"--file {path} has no request" + (f" of at most {longest} tokens" if asked else ""))
    if taken[0].at_s is not None:
        taken.sort(key=lambda each: each.at_s or 0.0)
    return Read(kind, taken, len(asked) - len(taken))


class _Unknown(Exception):
    pass


class _Wrong(ValueError):
    """Says where; holds nothing of a text."""


def _kind(beginning: str) -> str:
    first_line = beginning.partition("\n")[0]
    if "ContextTokens" in first_line and "GeneratedTokens" in first_line:
        return "Azure's trace"
    if '"input_length"' in first_line:
        return "Mooncake's trace"
    if beginning.startswith("[") and '"conversations"' in beginning:
        return "ShareGPT"
    if '"prompt"' in first_line:
        return "prompts"
    raise _Unknown


def _azure(path: str, output_tokens: int) -> Iterator[Asked]:
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                # Seconds have seven decimals, one more than datetime takes.
                at_s = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).replace(tzinfo=datetime.UTC).timestamp()
                yield Asked(at_s, max(int(row["ContextTokens"]), 1), max(int(row["GeneratedTokens"]), 1))
            except (ValueError, KeyError, TypeError):
                raise _Wrong(f"line {number} is not a time and two numbers") from None


def _lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, dict(msgspec.json.decode(line))
                except (msgspec.DecodeError, ValueError, TypeError):
                    raise _Wrong(f"line {number} is no JSON object") from None


def _mooncake(path: str, output_tokens: int) -> Iterator[Asked]:
    for number, row in _lines(path):
        try:
            at_s = float(row["timestamp"]) / 1e3
            blocks = tuple(abs(int(each)) for each in row.get("hash_ids", ()))
            yield Asked(at_s, max(int(row["input_length"]), 1), max(int(row["output_length"]), 1), blocks)
        except (ValueError, KeyError, TypeError):
            raise _Wrong(f"line {number} has no timestamp, input_length and output_length as numbers") from None


def _share_gpt(path: str, output_tokens: int) -> Iterator[Asked]:
    """Conversations that a user begins; of each, the turns up to where the order breaks."""
    for entry in msgspec.json.decode(Path(path).read_bytes()):
        said = [(str(each["from"]), str(each["value"])) for each in entry["conversations"]]
        while said and said[0][0] not in _HUMAN:
            said.pop(0)
        turns = list(
            itertools.takewhile(
                lambda pair: pair[0][0] in _HUMAN and pair[1][0] in _MODEL, zip(said[::2], said[1::2], strict=False)
            )
        )
        turns = [(asks, answers) for asks, answers in turns if asks[1]]
        if turns:
            yield _texts([asks[1] for asks, _ in turns], [_about(answers[1]) for _, answers in turns])


def _prompts(path: str, output_tokens: int) -> Iterator[Asked]:
    for number, row in _lines(path):
        if not isinstance(row.get("prompt"), str) or not row["prompt"]:
            raise _Wrong(f"line {number} has no text as its prompt")
        yield _texts([row["prompt"]], [int(row.get("output_tokens") or output_tokens)])


def _texts(texts: list[str], answers: list[int]) -> Asked:
    return Asked(None, sum(map(_about, texts)), sum(answers), texts=tuple(texts), answers=tuple(answers))


def _about(text: str) -> int:
    return max(1, len(text) // CHARACTERS_PER_TOKEN)


_READERS = {"Azure's trace": _azure, "Mooncake's trace": _mooncake, "ShareGPT": _share_gpt, "prompts": _prompts}
