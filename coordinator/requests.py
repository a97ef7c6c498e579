"""From what a client asked to a request that the dispatcher can start: validated, rendered, tokenised, bounded.

HTTP and gRPC both build a `GenerateSpec` and hand it to `Intake.submit`; what holds for one holds for the other.
"""

import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from baton.config import CoordinatorOptions
from baton.errors import InvalidRequestError
from baton.filters import Text
from baton.v1 import worker_link_pb2 as wire
from coordinator.delivery import AnswerForm, Choice, Request, Urgency
from coordinator.detokenizer import TextStream
from coordinator.dispatch import Dispatcher
from coordinator.failures import FailureKind, RequestFailed, unavailable
from coordinator.filters import Filters, strings_in, with_strings
from coordinator.metrics import Metrics
from coordinator.pins import CachePin, Pins
from coordinator.sampling import SamplingRequest, check, for_choice, resolve
from coordinator.tenants.caller import ANYBODY, calling
from coordinator.tokenizer import ModelTokenizer
from coordinator.turns import Turns, stage
from coordinator.workers import WorkerRegistry

MAX_PROMPTS = 64
MAX_SALT_CHARACTERS = 256
_ID_BYTES = 16
_IDS_DRAWN = 64
_ROLES = ("system", "user", "assistant")


class ChatPrompt(msgspec.Struct, frozen=True):
    """Rendered with the model's template."""

    messages: Sequence[Mapping[str, str]]
    """Each with `role` and `content`."""
    template_variables: Mapping[str, Any] = {}

    add_generation_prompt: bool = True
    """False: only what further messages may follow."""

    def texts(self) -> list[Text]:
        """All that the model may read of what the client wrote."""
        texts = [Text(message["role"], message["content"]) for message in self.messages]
        return texts + [Text("variable", each) for each in strings_in(dict(self.template_variables))]

    def with_texts(self, texts: Sequence[str]) -> "ChatPrompt":
        """The same with others in their places."""
        left = iter(texts)
        messages = [{**message, "content": next(left)} for message in self.messages]
        return msgspec.structs.replace(
            self, messages=messages, template_variables=with_strings(dict(self.template_variables), left)
        )


Prompt = str | Sequence[int] | ChatPrompt


class GenerateSpec(msgspec.Struct, frozen=True):
    """A client's call in neither protocol's words."""

    model: str
    prompts: Sequence[Prompt]
    sampling: SamplingRequest
    default_max_tokens: int | None = None
    """None: the rest of the context."""
    keep_special_tokens: bool = False
    max_tokens_name: str = "max_tokens"
    """The field that the client would change."""
    cache_salt: str | None = None
    """Requests of different salts share no KV."""
    chat: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    user: str = ""
    """Whose requests all go to one version of the model, where several share the traffic."""
    urgency: Urgency = Urgency()


class PinSpec(msgspec.Struct, frozen=True):
    """A prefix whose KV a client wants kept."""

    model: str
    prompt: Prompt
    cache_salt: str | None = None
    ttl_s: float | None = None


class Intake:
    def __init__(
        self,
        options: CoordinatorOptions,
        model_name: str,
        tokenizer: ModelTokenizer,
        registry: WorkerRegistry,
        dispatcher: Dispatcher,
        metrics: Metrics,
    ) -> None:
        self._max_requests = options.max_requests
        self.model_name = model_name
        self.tokenizer = tokenizer
        self.registry = registry
        self.dispatcher = dispatcher
        self.metrics = metrics
        self.pins = Pins(registry, metrics)
        self.turns = Turns()
        metrics.requests_in_line.set_function(self.turns.__len__)
        self.needs_key = False
        """A call that came by no gate is refused, whatever door somebody may build."""
        self.created_unix_s = int(time.time())
        self.filters: Filters | None = None
        """Set by the coordinator."""
        self.on_started: Callable[[Request], None] = lambda request: None
        """Set by the shadows."""

    @property
    def ready(self) -> bool:
        """New requests can be served."""
        return self.dispatcher.versions.serves and not self.dispatcher.leaving

    def check_model(self, name: str) -> None:
        """Empty means the only model served. Raises RequestFailed."""
        if name and name != self.model_name:
            raise RequestFailed(
                FailureKind.UNKNOWN_MODEL, f"the model does not exist here; '{self.model_name}' is served"
            )
        if self.needs_key and calling.get() is ANYBODY:
            raise RequestFailed(FailureKind.UNAUTHENTICATED, "an API key is needed here")  # who forgot the gate?
        calling.get().check_model(self.model_name)

    async def submit(
        self, spec: GenerateSpec, request_id: str, resume_s: float = 0.0, asked_again: bool = False
    ) -> Request:
        """Start a request, kept for `resume_s` when its client hangs up. `asked_again`: it has some of the answer.

        Raises InvalidRequestError, or RequestFailed if it cannot be taken now.
        """
        came_s = time.monotonic()
        await self.turns.begin()
        try:
            return await self._submit(spec, request_id, came_s, resume_s, asked_again)
        except InvalidRequestError:
            self._refused("invalid_request")
            raise
        except RequestFailed as failure:
            self._refused(failure.kind.value)
            raise

    def _refused(self, reason: str) -> None:
        self.metrics.refused.labels(reason).inc()
        calling.get().refused(reason)

    async def _submit(
        self, spec: GenerateSpec, request_id: str, came_s: float, resume_s: float, asked_again: bool
    ) -> Request:
        self.check_model(spec.model)
        self.dispatcher.admission.check(spec.urgency)
        check(spec.sampling, self.tokenizer.facts.vocab_size)
        if not 1 <= len(spec.prompts) <= MAX_PROMPTS:
            raise InvalidRequestError(f"prompt must hold 1 to {MAX_PROMPTS} prompts", "prompt")
        n = spec.sampling.n or 1
        num_streams = n * len(spec.prompts)
        if num_streams > self._max_requests:
            message = f"the request asks for {num_streams} choices, of which {self._max_requests} fit at all"
            raise InvalidRequestError(message, "n")
        for prompt in spec.prompts:
            if isinstance(prompt, ChatPrompt):
                _check_messages(prompt)
        if spec.sampling.logprobs is not None and self.filters is not None and self.filters.filters_answers:
            raise InvalidRequestError("logprobs are not given here: answers are filtered", "logprobs")
        caller = calling.get()
        salt = caller.salt(check_salt(spec.cache_salt))
        caller.check_limits(num_streams)
        # Refused before the work of tokenising, and again by `start`, because others may have come meanwhile.
        self.dispatcher.check_capacity(num_streams)
        stop = tuple(spec.sampling.stop)
        form = AnswerForm(spec.chat, spec.include_usage, spec.keep_special_tokens, stop, n, spec.continuous_usage)
        request = Request(request_id, salt, form, resume_s)
        request.user, request.started_s = spec.user, came_s
        request.urgency, request.asked_again = spec.urgency, asked_again
        request.version = self.dispatcher.choose_version(spec.user or request_id)
        prompts = [(prompt, await self.token_ids(prompt)) for prompt in await self._filtered(spec.prompts)]
        await stage()
        try:
            for index, (prompt, token_ids) in enumerate(prompts):
                param = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
                max_tokens = self._max_tokens(spec, len(token_ids), param, request.version)
                self.add_choices(request, index, token_ids, resolve(spec.sampling, self.tokenizer.facts, max_tokens))
            await stage()
            with caller.admitting(request):
                self.dispatcher.start(request)
        except BaseException:
            request.forget()
            raise
        self.on_started(request)
        return request

    async def _filtered(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """What the filters make of them. Raises InvalidRequestError or RequestFailed."""
        if self.filters is None:
            return prompts
        parts = [
            prompt.texts() if isinstance(prompt, ChatPrompt)
            else [Text("prompt", prompt if isinstance(prompt, str) else self.text(prompt))]
            for prompt in prompts
        ]  # fmt: skip
        left = iter(await self.filters.input([text for part in parts for text in part]))
        result: list[Prompt] = []
        for prompt, part in zip(prompts, parts, strict=True):
            texts = [next(left) for _ in part]
            if isinstance(prompt, ChatPrompt):
                result.append(prompt.with_texts(texts))
            elif isinstance(prompt, str):
                result.append(texts[0])
            elif texts[0] != part[0].text:  # what begins a text is in it already
                result.append(await self.tokenizer.encode(texts[0], add_special_tokens=False))
            else:
                result.append(prompt)
        return result

    def copy_choices(self, request: Request, copy: Request) -> None:
        """Give `copy` the choices that `request` has."""
        for first in request.choices[:: request.form.choices_per_prompt]:
            self.add_choices(copy, first.prompt_index, first.prompt, first.sampling)

    async def token_ids(self, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        """Tokens of any kind of prompt, checked against the vocabulary. Raises InvalidRequestError."""
        if isinstance(prompt, ChatPrompt):
            _check_messages(prompt)
            text = self.tokenizer.render_chat(prompt.messages, prompt.template_variables, prompt.add_generation_prompt)
            token_ids, param = await self.tokenizer.encode(text, add_special_tokens=False), "messages"
        elif isinstance(prompt, str):
            token_ids = await self.tokenizer.encode(prompt, add_special_tokens) if prompt else []
            param = "prompt"
        else:
            token_ids, param = list(prompt), "prompt"
        if not token_ids:
            raise InvalidRequestError(f"{param} is empty", param)
        if self.tokenizer.may_exceed_model or not isinstance(prompt, str | ChatPrompt):
            self._check_token_ids(token_ids, param)
        return token_ids

    async def pin(self, spec: PinSpec) -> CachePin:
        """Keep the KV of a prefix. Raises InvalidRequestError, or RequestFailed when it cannot be kept."""
        self.check_model(spec.model)
        salt = calling.get().salt(check_salt(spec.cache_salt))
        (prompt,) = await self._filtered([spec.prompt])
        token_ids = await self.token_ids(prompt)
        context = self.registry.context_tokens
        if context and len(token_ids) >= context:
            raise InvalidRequestError(
                f"the prefix has {len(token_ids)} tokens and the context length is {context}; shorten it"
            )
        return self.pins.create(token_ids, salt, spec.ttl_s)

    def text(self, token_ids: Sequence[int]) -> str:
        """Of tokens, special ones included. Raises InvalidRequestError for one outside the vocabulary."""
        if token_ids:
            self._check_token_ids(token_ids, "tokens")
        return self.tokenizer.decode(list(token_ids), keep_special_tokens=True)

    def _check_token_ids(self, token_ids: Sequence[int], param: str) -> None:
        vocab_size = self.tokenizer.facts.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            raise InvalidRequestError(f"{param} has a token id outside the vocabulary of {vocab_size}", param)

    def add_choices(self, request: Request, index: int, prompt: list[int], sampling: wire.EngineSampling) -> None:
        """All choices of one prompt; `sampling` is that of the first."""
        form, new_choice = request.form, Choice if self.filters is None else self.filters.choice
        request.prompt_tokens += len(prompt)
        for number in range(form.choices_per_prompt):
            detokenizer = self.tokenizer.detokenizer(prompt, form.keep_special_tokens)
            text = TextStream(detokenizer, form.stop, sampling.min_tokens)
            new_choice(request, index, prompt, for_choice(sampling, number), text, form.keep_special_tokens)

    def _max_tokens(self, spec: GenerateSpec, num_prompt_tokens: int, param: str, version: str) -> int:
        context = self.registry.context_tokens_of(version)
        if not context:
            raise unavailable("no worker that can decode is connected; try again later")
        room = context - num_prompt_tokens
        if room < 1:
            raise InvalidRequestError(
                f"the prompt has {num_prompt_tokens} tokens and the context length is {context}; shorten it", param
            )
        asked = spec.sampling.max_tokens
        if asked is None:
            max_tokens = room if spec.default_max_tokens is None else min(room, spec.default_max_tokens)
        elif asked > room:
            raise InvalidRequestError(
                f"the prompt has {num_prompt_tokens} tokens and {spec.max_tokens_name} is {asked}, together more than "
                f"the context length of {context}; lower one of them",
                spec.max_tokens_name,
            )
        else:
            max_tokens = asked
        if (spec.sampling.min_tokens or 0) > max_tokens:
            raise InvalidRequestError(
                f"min_tokens is greater than the {max_tokens} tokens that the answer may have", "min_tokens"
            )
        return max_tokens


def check_salt(salt: str | None) -> str:
    """The salt in a request's KV, empty for none. Raises InvalidRequestError, without the salt, which is a secret."""
    if salt is None:
        return ""
    if not 1 <= len(salt) <= MAX_SALT_CHARACTERS:
        raise InvalidRequestError(
            f"cache_salt must have 1 to {MAX_SALT_CHARACTERS} characters; leave it out to share KV with everybody",
            "cache_salt",
        )
    return salt


def _check_messages(prompt: ChatPrompt) -> None:
    if not prompt.messages:
        raise InvalidRequestError("messages is empty", "messages")
    for at, message in enumerate(prompt.messages):
        if message["role"] not in _ROLES:
            raise InvalidRequestError(f"messages[{at}].role must be one of {', '.join(_ROLES)}", f"messages[{at}].role")


def check_request_id(id: str) -> str:
    """One that a client chose. Raises InvalidRequestError."""
    if not re.fullmatch(r"[A-Za-z0-9-]{16,64}", id):
        raise InvalidRequestError(
            "a request id must be 16 to 64 letters, digits and dashes; leave X-Request-Id out to get one", "request_id"
        )
    return id


def new_request_id(prefix: str) -> str:
    """Unguessable, because whoever knows it may read and abort the request."""
    return f"{prefix}-{next(_unguessable)}"


def _drawn() -> Iterator[str]:
    """Each time for many ids: asking the kernel takes as long as for one."""
    while True:
        data = secrets.token_bytes(_ID_BYTES * _IDS_DRAWN)
        yield from (data[at : at + _ID_BYTES].hex() for at in range(0, len(data), _ID_BYTES))


_unguessable = _drawn()
