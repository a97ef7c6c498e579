"""OpenAI's request bodies: what is understood, what is ignored, and what is refused, as types.

A field that is not here is refused by name: a misspelt `max_token` that is silently ignored costs its user an evening.
Numbers are bounded in `coordinator.sampling`, for HTTP and gRPC alike.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from baton.errors import InvalidRequestError
from coordinator.delivery import Urgency
from coordinator.requests import ChatPrompt, GenerateSpec, PinSpec, Prompt
from coordinator.sampling import MAX_LOGIT_BIAS, SamplingRequest

T = TypeVar("T", bound=msgspec.Struct)

COMPLETION_DEFAULT_TOKENS = 16  # OpenAI's default for /v1/completions
_MAX_DETAIL = 200
_RESERVED_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt"}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    # Beyond OpenAI, as in vLLM: what was used so far, in every event.
    continuous_usage_stats: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=False):
    type: str


class _Sampled(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that completions and chats share."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Beyond OpenAI, named as in vLLM and SGLang.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    cache_salt: str | None = None
    # How soon the answer is needed.
    service_class: str | None = None
    max_ttft_s: float | None = None
    deadline_s: float | None = None
    # Where versions of the model share the traffic, the same user always gets the same one.
    user: str | None = None
    # Accepted, and without effect here.
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def urgency(self) -> Urgency:
        return Urgency(self.service_class or "", self.max_ttft_s, self.deadline_s)

    def sampling(self, max_tokens: int | None, logprobs: int | None) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options needs stream to be true", "stream_options")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return SamplingRequest(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=_logit_bias(self.logit_bias) if self.logit_bias else {},
            min_tokens=self.min_tokens,
            max_tokens=max_tokens,
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=self.stop_token_ids or (),
            logprobs=logprobs,
            n=self.n,
            stop=stop or (),
        )


class CompletionRequest(_Sampled, forbid_unknown_fields=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def spec(self) -> GenerateSpec:
        if self.echo:
            raise InvalidRequestError("echo is not supported; the prompt is known to the client", "echo")
        if self.suffix is not None:
            raise InvalidRequestError("suffix is not supported; put everything before the answer into prompt", "suffix")
        if self.best_of not in (None, self.n or 1):
            raise InvalidRequestError("best_of is not supported; ask for n choices and choose", "best_of")
        sampling = self.sampling(self.max_tokens, self.logprobs)
        return GenerateSpec(
            self.model or "", _prompts(self.prompt), sampling, COMPLETION_DEFAULT_TOKENS, cache_salt=self.cache_salt,
            include_usage=self.include_usage, continuous_usage=self.continuous_usage, user=self.user or "",
            urgency=self.urgency,
        )  # fmt: skip


class TextPart(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """With the empty fields of an answer of ours, which clients send back as it came."""

    role: str
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class ChatRequest(_Sampled, forbid_unknown_fields=True, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    def spec(self) -> GenerateSpec:
        if self.tools or self.tool_choice not in (None, "none", "auto"):
            raise InvalidRequestError("tools are not supported", "tools")
        if self.response_format is not None and self.response_format.type != "text":
            raise InvalidRequestError("response_format other than text is not supported", "response_format")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequestError("give max_completion_tokens or max_tokens, not both", "max_tokens")
        completion = self.max_completion_tokens
        return GenerateSpec(
            model=self.model or "",
            prompts=[ChatPrompt(as_messages(self.messages), _variables(self.chat_template_kwargs))],
            sampling=self.sampling(
                self.max_tokens if completion is None else completion,
                (self.top_logprobs or 0) if self.logprobs else None,
            ),
            max_tokens_name="max_tokens" if completion is None else "max_completion_tokens",
            cache_salt=self.cache_salt,
            chat=True,
            include_usage=self.include_usage,
            continuous_usage=self.continuous_usage,
            urgency=self.urgency,
        )


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True

    def prompt_or_chat(self) -> Prompt:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("give either prompt or messages", "prompt")
        return self.prompt if self.prompt is not None else ChatPrompt(as_messages(self.messages or []))


class PinRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Of `POST /v1/cache/pins`, which OpenAI does not have; fields are named as those of the other requests."""

    model: str | None = None
    prompt: str | list[int] | None = None
    messages: list[Message] | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    ttl_s: float | None = None

    def spec(self) -> PinSpec:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("give either prompt or messages", "prompt")
        if self.tools:
            raise InvalidRequestError("tools are not supported", "tools")
        prompt: Prompt
        if self.prompt is not None:
            prompt = self.prompt
        else:
            variables = _variables(self.chat_template_kwargs)
            prompt = ChatPrompt(as_messages(self.messages or []), variables, add_generation_prompt=False)
        return PinSpec(self.model or "", prompt, self.cache_salt, self.ttl_s)


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    tokens: list[int]
    model: str | None = None


def as_messages(messages: Sequence[Message]) -> list[Mapping[str, str]]:
    """Parts of one message become lines; `developer` is OpenAI's newer word for `system`."""
    return [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.content
            if isinstance(message.content, str)
            else "\n".join(part.text for part in message.content),
        }
        for message in messages
    ]


def parse(body: bytes, type: type[T]) -> T:
    """The request in a body. Raises InvalidRequestError that names the field and repeats no text of it."""
    try:
        return msgspec.json.decode(body, type=type)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        param = path.removesuffix("`").lstrip(".") or None
        unknown = re.fullmatch(r"Object (?:contains unknown|missing required) field `(.*)`", message, re.DOTALL)
        if unknown:
            param = f"{param}.{unknown[1]}"[:_MAX_DETAIL] if param else unknown[1][:_MAX_DETAIL]
        if message.startswith("Invalid value"):
            message = "Unsupported value"
        where = f" (in {param})" if param else ""
        raise InvalidRequestError(f"{message[:_MAX_DETAIL]}{where}", param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            detail = "it is not UTF-8"
        elif isinstance(error, RecursionError):
            detail = "it is nested too deeply"
        else:
            detail = re.sub(r"^JSON is malformed: ", "", str(error))[:_MAX_DETAIL]
        raise InvalidRequestError(f"the body is not valid JSON: {detail}") from None


def _variables(asked: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What a client may set in the chat template."""
    variables = asked or {}
    if not _RESERVED_VARIABLES.isdisjoint(variables):
        raise InvalidRequestError(
            f"chat_template_kwargs must not set {', '.join(sorted(_RESERVED_VARIABLES))}", "chat_template_kwargs"
        )
    return variables


def _logit_bias(biases: Mapping[str, float]) -> dict[int, float]:
    if len(biases) > MAX_LOGIT_BIAS:
        raise InvalidRequestError(f"logit_bias has more than {MAX_LOGIT_BIAS} entries", "logit_bias")
    if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in biases):
        raise InvalidRequestError("keys of logit_bias must be token ids, written as strings of digits", "logit_bias")
    return {int(key): bias for key, bias in biases.items()}


def _prompts(prompt: str | list[str | int | list[int]]) -> list[Prompt]:
    """One prompt or several: a text, texts, token ids, or lists of token ids. Never a mixture."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequestError("prompt is empty", "prompt")
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise InvalidRequestError("prompt mixes texts, token ids and lists of token ids", "prompt")
    if kinds == {int}:
        return [[item for item in prompt if isinstance(item, int)]]
    return [item for item in prompt if not isinstance(item, int)]
