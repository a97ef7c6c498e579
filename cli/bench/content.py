"""What prompts are made of: token ids, or words that are one token each, drawn by the key of a segment.

The length of a prompt is exact where the tokenizer is known: from a tokenizer.json, or from the server's /tokenize.
Without either the server is asked to count words in an answer's usage, and lengths are about right; what it counts in
the end is in the result in any case.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from baton.errors import ConfigurationError
from cli.bench.workload import Segment

log = logging.getLogger(__name__)
Tokenize = Callable[[str], Awaitable[list[int]]]
"""Token ids of a text, without special tokens. Raises LookupError where the server has no such thing."""
CountWords = Callable[[str], Awaitable[int]]
"""Prompt tokens of a text by the usage of an answer; 0: unknown."""
_TEXT = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what "
    "all were when we there can an your which their said if do will each about how up out them then she many some "
    "so these would other into has more her two like him see time could no make than first been its who now people "
    "my made over did down only way find use may water long little very after words called just where most know "
    "house world school still father keep tree never start city earth eye light thought head under story saw left "
    "few while along might close something seem next hard open example begin life always those both paper together "
    "got group often run"
)
WORDS = _TEXT.split()
_FEWEST = 16
_GUESS = 1.3
"""Tokens of a word, where nobody counts."""


class Content(msgspec.Struct):
    """Crosses to the processes that send."""

    seed: int
    ids: list[int]
    words: list[str]
    tokens_per_word: float

    def token_ids(self, segments: Sequence[Segment]) -> list[int]:
        pool = np.asarray(self.ids)
        return [id for each in segments for id in pool[self._drawn(each.key, len(pool), each.tokens)].tolist()]

    def text(self, segments: Sequence[Segment]) -> str:
        words: list[str] = []
        for each in segments:
            number = max(1, round(each.tokens / self.tokens_per_word))
            words += [self.words[place] for place in self._drawn(each.key, len(self.words), number).tolist()]
        return " ".join(words)

    def _drawn(self, key: tuple[int, ...], below: int, number: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        return np.random.default_rng([self.seed, *key]).integers(below, size=number)


class Prepared(msgspec.Struct):
    content: Content
    source: str
    """How the length of a prompt is known, in words."""


async def prepare(seed: int, tokenizer: str, tokenize: Tokenize, count: CountWords) -> Prepared:
    """Raises ConfigurationError when `tokenizer` is not usable, and what asking the server raises."""
    if tokenizer:
        local = _local(tokenizer)
        ids = await local(" " + " ".join(WORDS))
        return Prepared(await _content(seed, local, ids), f"tokenizer of {tokenizer}")
    try:
        ids = await tokenize(" " + " ".join(WORDS))
    except LookupError:
        half = len(WORDS) // 2
        all_tokens, half_tokens = await count(" ".join(WORDS)), await count(" ".join(WORDS[:half]))
        each = (all_tokens - half_tokens) / (len(WORDS) - half)
        source = "usage of the server" if each > 0 else "a guess: neither /tokenize nor usage says how long prompts are"
        log.warning("prompts are about as long as asked (%s); --tokenizer makes them exact", source)
        return Prepared(Content(seed, [], list(WORDS), each if each > 0 else _GUESS), source)
    return Prepared(await _content(seed, tokenize, ids), "/tokenize of the server")


async def _content(seed: int, tokenize: Tokenize, ids: list[int]) -> Content:
    words = list(WORDS)
    if len(ids) != len(WORDS):
        words = [word for word in WORDS if len(await tokenize(" " + word)) == 1]
    if len(words) < _FEWEST:
        return Content(seed, sorted(set(ids)), list(WORDS), len(ids) / len(WORDS))
    return Content(seed, sorted(set(ids)), words, 1.0)


def _local(path: str) -> Tokenize:
    from tokenizers import Tokenizer  # not needed where the server tokenises

    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
        raise ConfigurationError(f"--tokenizer {file} is not usable: {error}; give a tokenizer.json") from error

    async def tokenize(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return tokenize
