"""Text to tokens and back, and chats to text, from the files of a Hugging Face model folder."""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from baton.errors import InvalidRequestError, ModelError
from coordinator.chat_template import ChatTemplate
from coordinator.detokenizer import ByteLevelDetokenizer, Detokenizer, TokenTexts, WindowDetokenizer
from coordinator.encoder import Encoder
from coordinator.failures import FailureKind, RequestFailed
from coordinator.model_files import ModelFacts, read_facts, read_json

# One text at a time: to hand it to the library's own threads would take longer than a tenth of it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_ENCODING = 256
"""Long texts that may wait for a thread, each as large as a body may be."""
_INLINE_CHARACTERS = {"tokenizers": 4096, "fastokens": 16384}
"""By library: longer texts are encoded in a thread, as a millisecond here is one for every stream."""


class ModelTokenizer:
    """Raises ModelError, naming file and field, if the folder's tokenizer cannot be used. `on_fallback`: as `Encoder`
    has it."""

    def __init__(self, folder: Path, on_fallback: Callable[[str], None] = lambda reason: None) -> None:
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path)
        self._tokenizer = _load(folder / "tokenizer.json")
        self._encoder = Encoder(self._tokenizer, on_fallback)
        special = _special_tokens(config_path, config)
        self._template = _chat_template(folder, config, special)
        self._byte_values = _byte_alphabet() if isinstance(self._tokenizer.decoder, ByteLevel) else None
        """Of the characters of a byte-level vocabulary."""
        self._texts = TokenTexts(partial(self._text, keep_special_tokens=False))
        self._texts_and_special = TokenTexts(partial(self._text, keep_special_tokens=True))
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        eos = special.get("eos_token")
        self.facts: ModelFacts = read_facts(
            folder,
            self._tokenizer.get_vocab_size(with_added_tokens=True),
            self._tokenizer.token_to_id(eos) if eos is not None else None,
        )
        tokens = self._tokenizer.get_vocab(with_added_tokens=True)
        self.may_exceed_model = max(tokens.values(), default=0) >= self.facts.vocab_size
        """It knows tokens that the model has not."""
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenizer")
        self._num_encoding = 0

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Raises RequestFailed when too many long texts wait already."""
        if len(text) <= _INLINE_CHARACTERS[self._encoder.library]:
            return self._encoder.encode(text, add_special_tokens)
        if self._num_encoding >= MAX_ENCODING:
            message = "too many long prompts wait to be turned into tokens; try again later"
            raise RequestFailed(FailureKind.OVERLOADED, message)
        loop = asyncio.get_running_loop()
        self._num_encoding += 1
        try:
            return await loop.run_in_executor(self._threads, self._encoder.encode, text, add_special_tokens)
        finally:
            self._num_encoding -= 1

    @property
    def encoded_by(self) -> str:
        """The library that turns text into tokens."""
        return self._encoder.library

    def decode(self, token_ids: Sequence[int], keep_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=not keep_special_tokens)

    def detokenizer(self, prompt: Sequence[int], keep_special_tokens: bool) -> Detokenizer:
        """Turns the tokens that follow `prompt` into text."""
        if self._byte_values is not None:
            return ByteLevelDetokenizer(self._texts_and_special if keep_special_tokens else self._texts)
        decode = partial(self._tokenizer.decode, skip_special_tokens=not keep_special_tokens)
        return WindowDetokenizer(decode, prompt, () if keep_special_tokens else self.special_ids)

    def _text(self, token_id: int, keep_special_tokens: bool) -> str | bytes:
        """Of a byte-level vocabulary."""
        if token_id in self.special_ids and not keep_special_tokens:
            return ""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], extra: Mapping[str, Any], add_generation_prompt: bool = True
    ) -> str:
        """Raises InvalidRequestError if the model has no template or its template refuses the messages."""
        if self._template is None:
            raise InvalidRequestError("this model has no chat template; use /v1/completions", "messages")
        return self._template.render(messages, extra, add_generation_prompt)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, which need not be whole characters."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if (values := self._byte_values) is not None:
            mapped = all(character in values for character in token)  # else somebody added it as it is
            return bytes(values[character] for character in token) if mapped else token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()


def _load(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ModelError(f"{path} is missing; models with only a tokenizer.model must be converted to tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
        raise ModelError(f"{path} is not a usable tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _special_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    special: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if value is None:
            continue
        if not isinstance(value, str):
            raise ModelError(f"{path}: {name} must be a string or an object with a string field 'content'")
        special[name] = value
    return special


def _chat_template(folder: Path, config: Mapping[str, Any], special: Mapping[str, str]) -> ChatTemplate | None:
    """chat_template.jinja, else the field of tokenizer_config.json: a string, or a list with one named 'default'."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), str(path), special)
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
    source = config.get("chat_template")
    origin = f"{folder / 'tokenizer_config.json'}: chat_template"
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
        if source is None:
            raise ModelError(f"{origin} is a list without an entry named 'default'")
    if source is None:
        return None
    if not isinstance(source, str):
        raise ModelError(f"{origin} must be a string or a list of named templates")
    return ChatTemplate(source, origin, special)


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level vocabularies write for each byte (GPT-2): printable ones stand for
    themselves, the others are numbered from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(0x100 + at): byte for at, byte in enumerate(others)}
