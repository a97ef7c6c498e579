"""OpenAI's response bodies, whole and in chunks. One writer a request holds what its answers have in common."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from baton.errors import InvalidRequestError
from coordinator.delivery import Delta, Position, Request, TokenLogprob, UsageCounts

_encode = msgspec.json.Encoder().encode
TokenBytes = Callable[[int], bytes]


class CachedDetails(Struct):
    cached_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedDetails


class CompletionLogprobs(Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class ChatAlternative(Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatAlternative]


class ChatLogprobs(Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatText(Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET


class ChatChoice(Struct):
    index: int
    message: ChatText
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunkChoice(Struct):
    index: int
    delta: ChatText
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class Answer(Struct):
    """A whole response, or one chunk of it."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[CompletionChoice | ChatChoice | ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str = ""
    """The version of the model that answers."""


class ErrorDetail(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct):
    error: ErrorDetail


def json_body(value: Any) -> bytes:
    return _encode(value)


def sse(value: Any, id: str = "") -> bytes:
    """`id` comes first: a client that has read the data knows where it would go on."""
    name = b"id: %s\n" % id.encode() if id else b""
    return name + b"data: " + _encode(value) + b"\n\n"


SSE_DONE = b"data: [DONE]\n\n"
END = "end"
_CHOICE = r"(?:0e?|[1-9]\d{0,8}e?-[0-9a-f]{8})"


def usage_of(counts: UsageCounts) -> Usage:
    total = counts.prompt + counts.completion
    return Usage(counts.prompt, counts.completion, total, CachedDetails(counts.cached_prompt))


_MARK = "\0"  # a character that nothing else in an event has


class Frame(Struct):
    """An event as it is encoded: all that changes from one token to the next is its text, and what the client has."""

    before: bytes
    between: bytes
    after: bytes

    def event(self, had: str, text: str) -> bytes:
        return b"".join((self.before, had.encode(), self.between, _encode(text), self.after))


class AnswerWriter:
    """Turns the deltas of one request, of a client that has what `positions` say, into bodies.

    The id of an event is that of the request and what the client has with it: of each choice the number of tokens,
    with `e` once it knows how it ended and a digest of these tokens, or `end` for everything. So it says the same
    whoever reads it, and whoever computes the request once more knows whether it goes on from the same tokens.
    """

    __slots__ = (
        "_chat",
        "_continuous_usage",
        "_frames",
        "_had",
        "_include_usage",
        "_introduced",
        "_model",
        "_num_tokens",
        "_request",
        "_token_bytes",
    )  # fmt: skip

    def __init__(
        self, request: Request, model: str, token_bytes: TokenBytes, positions: Sequence[Position] = ()
    ) -> None:
        self._request = request
        self._model = model
        self._chat = request.form.chat
        self._include_usage, self._continuous_usage = request.form.include_usage, request.form.continuous_usage
        self._token_bytes = token_bytes
        had = [*positions, *[Position()] * len(request.choices)][: len(request.choices)]
        self._frames: dict[int, Frame] = {}
        """By choice: of its events that carry text and nothing else."""
        self._introduced = {number for number, position in enumerate(had) if position != Position()}
        self._had = [_written(*position) for position in had]
        self._num_tokens = [position.num_tokens for position in had]
        """That the client has with the last event, by choice."""

    def whole(self, deltas: Sequence[Delta]) -> bytes:
        """`deltas` are all deltas of the request."""
        choices = [_merge(choice.number, deltas) for choice in self._request.choices]
        kind = "chat.completion" if self._chat else "text_completion"
        if self._chat:
            bodies: Sequence[Any] = [
                ChatChoice(
                    delta.choice, ChatText("assistant", delta.text, None), self._logprobs(delta), delta.finish_reason
                )
                for delta in choices
            ]
        else:
            bodies = [self._completion(delta) for delta in choices]
        return _encode(self._answer(kind, bodies, usage_of(self._request.usage())))

    def chunk(self, delta: Delta) -> bytes:
        """An event, or nothing for a delta that shows nothing (half a character, or text held back)."""
        first = delta.choice not in self._introduced
        num_tokens = delta.first_index + len(delta.token_ids)
        self._num_tokens[delta.choice] = num_tokens
        self._had[delta.choice] = _written(num_tokens, delta.finish_reason is not None, delta.digest)
        plain = delta.text and not delta.finish_reason and not delta.logprobs and not (first and self._chat)
        if plain and not self._continuous_usage:
            frame = self._frames.get(delta.choice) or self._frame(delta.choice)
            return frame.event(".".join(self._had), delta.text)
        if not (delta.text or delta.finish_reason or delta.logprobs or (first and self._chat)):
            return b""
        usage = self._usage()
        if not self._chat:
            return sse(self._answer("text_completion", [self._completion(delta)], usage), self._event_id())
        self._introduced.add(delta.choice)
        text = ChatText("assistant" if first else UNSET, delta.text if delta.text or first else UNSET)
        body = ChatChunkChoice(delta.choice, text, self._logprobs(delta), delta.finish_reason)
        return sse(self._answer("chat.completion.chunk", [body], usage), self._event_id())

    def plain_frame(self) -> Frame | None:
        """Of what all that follow have in common, where events of the only choice carry text and nothing else."""
        has_begun = len(self._had) == 1 and (not self._chat or self._introduced)
        return (self._frames.get(0) or self._frame(0)) if has_begun and not self._continuous_usage else None

    def _frame(self, choice: int) -> Frame:
        usage = self._usage()
        if self._chat:
            kind = "chat.completion.chunk"
            body: Any = ChatChunkChoice(choice, ChatText(content=_MARK), None, None)
        else:
            kind, body = "text_completion", CompletionChoice(choice, _MARK, None, None)
        before, rest = sse(self._answer(kind, [body], usage), f"{self._request.id}:{_MARK}").split(_MARK.encode())
        frame = self._frames[choice] = Frame(before, *rest.split(_encode(_MARK)))
        return frame

    def _usage(self) -> Usage | UnsetType | None:
        """Of an event that is not the last one."""
        if self._continuous_usage:
            return usage_of(msgspec.structs.replace(self._request.usage(), completion=sum(self._num_tokens)))
        return None if self._include_usage else UNSET

    def _event_id(self) -> str:
        return f"{self._request.id}:{'.'.join(self._had)}"

    def last(self) -> bytes:
        """The events that end a stream."""
        if not self._include_usage:
            return SSE_DONE
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        usage = self._answer(kind, [], usage_of(self._request.usage()))
        return sse(usage, f"{self._request.id}:{END}") + SSE_DONE

    def _answer(self, kind: str, choices: Sequence[Any], usage: Usage | UnsetType | None) -> Answer:
        request = self._request
        return Answer(request.id, kind, request.created_unix_s, self._model, choices, usage, request.version)

    def _completion(self, delta: Delta) -> CompletionChoice:
        logprobs = None
        if delta.logprobs:
            logprobs = CompletionLogprobs(
                tokens=[self._text(entry.token_id) for entry in delta.logprobs],
                token_logprobs=[entry.logprob for entry in delta.logprobs],
                top_logprobs=[self._top(entry) for entry in delta.logprobs],
                text_offset=[entry.text_offset for entry in delta.logprobs],
            )
        return CompletionChoice(delta.choice, delta.text, logprobs, delta.finish_reason)

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By text; of tokens with one text the likeliest. The chosen token is always among them."""
        top = {self._text(token_id): logprob for token_id, logprob in reversed(entry.alternatives)}
        top.setdefault(self._text(entry.token_id), entry.logprob)
        return top

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        return ChatLogprobs([self._chat_token(entry) for entry in delta.logprobs]) if delta.logprobs else None

    def _chat_token(self, entry: TokenLogprob) -> ChatTokenLogprob:
        data = self._token_bytes(entry.token_id)
        alternatives = [self._alternative(token_id, logprob) for token_id, logprob in entry.alternatives]
        return ChatTokenLogprob(data.decode(errors="replace"), entry.logprob, list(data), alternatives)

    def _alternative(self, token_id: int, logprob: float) -> ChatAlternative:
        data = self._token_bytes(token_id)
        return ChatAlternative(data.decode(errors="replace"), logprob, list(data))

    def _text(self, token_id: int) -> str:
        return self._token_bytes(token_id).decode(errors="replace")


def positions_of(event_id: str, request_id: str) -> list[Position] | None:
    """What a client has whose last event was this, of no event if empty; None for everything.

    Raises InvalidRequestError.
    """
    if not event_id:
        return []
    id, _, written = event_id.rpartition(":")
    if id == request_id and written == END:
        return None
    if id != request_id or not re.fullmatch(rf"{_CHOICE}(\.{_CHOICE})*", written, re.ASCII):
        raise InvalidRequestError("the last event id must be the id of an event of this stream", "last_event_id")
    found = [each.partition("-") for each in written.split(".")]
    return [Position(int(had.rstrip("e")), had.endswith("e"), digest) for had, _, digest in found]


def _written(num_tokens: int, ended: bool, digest: str) -> str:
    """A `Position`."""
    end = "e" if ended else ""
    return f"{num_tokens}{end}-{digest}" if num_tokens else f"0{end}"


def _merge(choice: int, deltas: Sequence[Delta]) -> Delta:
    own = [delta for delta in deltas if delta.choice == choice]
    merged = Delta(choice, own[0].prompt_index, 0)
    merged.text = "".join(delta.text for delta in own)
    merged.finish_reason = own[-1].finish_reason
    for delta in own:
        merged.logprobs += delta.logprobs
    return merged
