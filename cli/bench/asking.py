"""Turns of a session as requests: what was said before, and what is new, in the form that the server wants."""

from typing import Any

import msgspec
from google.protobuf import json_format

from baton.errors import ConfigurationError
from baton.v1 import inference_pb2 as api
from cli.bench.content import Content
from cli.bench.stream import Seen
from cli.bench.workload import Session, Turn

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


class Asking(msgspec.Struct):
    """The form of all requests. `extra`: fields on top of it; None leaves one out."""

    grpc: bool
    chat: bool
    model: str
    ignore_eos: bool
    extra: dict[str, Any]

    def check(self) -> None:
        """Raises ConfigurationError for fields that the form does not have; what a server of OpenAI's has, it says."""
        if self.grpc:
            self.message(api.GenerateRequest(), 1)

    def body(self, prompt: dict[str, Any], max_tokens: int) -> bytes:
        fields = {
            "model": self.model, **prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, "ignore_eos": self.ignore_eos or None, **self.extra,
        }  # fmt: skip
        return msgspec.json.encode({name: value for name, value in fields.items() if value is not None})

    def message(self, request: api.GenerateRequest, max_tokens: int) -> bytes:
        """Raises ConfigurationError for fields that Baton's gRPC does not have."""
        request.model = self.model
        request.sampling.max_tokens, request.sampling.ignore_eos = max_tokens, self.ignore_eos
        request.sampling.temperature = 0.0
        if self.extra:
            try:
                json_format.ParseDict(self.extra, request)
            except json_format.ParseError as error:
                raise ConfigurationError(f"--body does not fit Baton's GenerateRequest: {error}") from None
        return request.SerializeToString()


class Conversation:
    """What was said in one session."""

    def __init__(self, asking: Asking, content: Content, session: Session) -> None:
        self._asking, self._content = asking, content
        alone = len(session.turns) == 1
        texts = asking.chat or any(turn.text for turn in session.turns) or not content.ids
        self._as_ids = not texts and (alone or asking.grpc)
        self._messages: list[dict[str, str]] = []
        self._text = ""
        self._ids: list[int] = []
        self._tokens = 0
        self.goes_on = not alone

    def asked_tokens(self, turn: Turn) -> int:
        """Of the whole prompt, without what a chat template adds; 0 where a text has them."""
        return 0 if turn.text else self._tokens + turn.tokens

    def request(self, turn: Turn) -> bytes:
        """With `turn` behind all that was said."""
        asking = self._asking
        if self._as_ids:
            self._ids += self._content.token_ids(turn.segments)
            if asking.grpc:
                return asking.message(api.GenerateRequest(token_ids=api.TokenIds(ids=self._ids)), turn.output_tokens)
            return asking.body({"prompt": self._ids}, turn.output_tokens)
        text = turn.text or self._content.text(turn.segments)
        if asking.chat:
            self._messages.append({"role": "user", "content": text})
            if asking.grpc:
                chat = api.Chat(messages=[api.ChatMessage(**each) for each in self._messages])
                return asking.message(api.GenerateRequest(chat=chat), turn.output_tokens)
            return asking.body({"messages": self._messages}, turn.output_tokens)
        self._text += f" {text}" if self._text else text
        if asking.grpc:
            return asking.message(api.GenerateRequest(text=self._text), turn.output_tokens)
        return asking.body({"prompt": self._text}, turn.output_tokens)

    def answered(self, seen: Seen) -> None:
        text = "".join(seen.texts)
        self._messages.append({"role": "assistant", "content": text})
        self._text += text
        self._ids += seen.ids
        self._tokens = seen.prompt_tokens + seen.output_tokens
