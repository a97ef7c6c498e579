"""Filters between clients and the model: loaded from plugins, run with a deadline, counted (see `baton.filters`).

Input passes through all of them, in order, before it is tokenised. Output passes through them between a choice's text
and whoever reads it:

    tokens -> text, cut at stop strings -> pieces, one a token -> first filter -> ... -> last filter -> deltas

What a client has after n tokens is a function of these n tokens, whoever computes and filters them: a client that comes
back, here or elsewhere, goes on in the same text. A token counts as delivered once its piece has passed. Ids and
logprobs of tokens would tell what text was before: they are withheld, and digests of positions are of what was shown.
"""

import asyncio
import importlib
import logging
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from baton.config import CoordinatorOptions
from baton.errors import ConfigurationError
from baton.filters import Filter, OutputFilter, Refused, Shown, Text
from baton.v1 import worker_link_pb2 as wire
from coordinator.delivery import ABORTED, CONTENT_FILTER, Choice, Delta, Position, Request, check_claim
from coordinator.detokenizer import TextStream
from coordinator.failures import FailureKind, RequestFailed
from coordinator.metrics import Metrics

log = logging.getLogger("baton.filters")
T = TypeVar("T")
WITHHELD = 0
"""In place of each token id."""


class _Failed(Exception):
    """A filter raised, was late, or answered nonsense."""


class _Stage:
    """One filter as it was loaded, and how it is run."""

    def __init__(self, name: str, filter: Filter, options: CoordinatorOptions, metrics: Metrics) -> None:
        self.name = name
        self.filter = filter
        self.answers = filter.output() is not None
        self.fails_open = options.filter_fails == "open"
        self._timeout_s = options.filter_timeout_s
        self._metrics = metrics
        for event in ("failed", "late"):
            metrics.filters.labels(name, event)  # alerts look at them: what begins at 1 has no rate

    def count(self, event: str) -> None:
        self._metrics.filters.labels(self.name, event).inc()

    def nonsense(self) -> _Failed:
        self.count("failed")
        log.error("filter %s returned what is no answer for the texts that it was given", self.name)
        return _Failed()

    async def run(self, work: Awaitable[T]) -> T:
        """Raises Refused or _Failed."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await work
        except Refused:
            raise
        except TimeoutError:
            self.count("late")
            log.error("filter %s did not answer within %g s", self.name, self._timeout_s)
        except Exception as error:  # noqa: BLE001 - whatever a plugin does wrong is its failure, not ours
            # The message of the exception is left out: it might quote a prompt.
            where = "".join(traceback.format_tb(error.__traceback__))
            self.count("failed")
            log.error("filter %s failed on %s\n%s", self.name, type(error).__name__, where)
        raise _Failed


class Filters:
    """All of them. `cut` and `fail` are the dispatcher's: a choice that ends here, a request whose filter failed."""

    def __init__(self, stages: Sequence[_Stage]) -> None:
        self._stages = stages
        self._answers = [stage for stage in stages if stage.answers]
        self.cut: Callable[[Choice, str], None] = lambda choice, reason: None
        self.fail: Callable[[Request, RequestFailed], None] = lambda request, failure: None

    @property
    def filters_answers(self) -> bool:
        return bool(self._answers)

    async def input(self, texts: Sequence[Text]) -> Sequence[str]:
        """What the model may read instead. Raises RequestFailed."""
        given = [each.text for each in texts]
        for stage in self._stages:
            now = [Text(each.role, text) for each, text in zip(texts, given, strict=True)]
            try:
                made = await stage.run(stage.filter.input(now))
                if not isinstance(made, list | tuple) or [type(each) for each in made] != [str] * len(given):
                    raise stage.nonsense()
            except Refused as refusal:
                stage.count("refused")
                raise RequestFailed(FailureKind.FILTERED, str(refusal)) from None
            except _Failed:
                if not stage.fails_open:
                    raise _closed() from None
                made = given
            if list(made) != given:
                stage.count("changed_input")
            given = list(made)
        return given

    def choice(
        self, request: Request, index: int, prompt: list[int], sampling: wire.EngineSampling, text: TextStream,
        show_stop_token: bool,
    ) -> Choice:  # fmt: skip
        """One whose text passes through the filters; of a copy that nobody reads, one whose text does not."""
        if not self._answers or request.shadow:
            return Choice(request, index, prompt, sampling, text, show_stop_token)
        passages = [_Passage(stage) for stage in self._answers]
        return FilteredChoice(self, passages, request, index, prompt, sampling, text, show_stop_token)


def strings_in(value: Any, is_outermost: bool = True) -> Iterator[str]:
    """Of a value from JSON, in its order: all but the names of its outermost fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not is_outermost:
                yield key
            yield from strings_in(inner, False)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_in(inner, False)


def with_strings(value: Any, strings: Iterator[str], is_outermost: bool = True) -> Any:
    """The same value with these in their places."""
    if isinstance(value, str):
        return next(strings)
    if isinstance(value, dict):
        return {
            key if is_outermost else next(strings): with_strings(inner, strings, False) for key, inner in value.items()
        }
    if isinstance(value, list):
        return [with_strings(inner, strings, False) for inner in value]
    return value


def _closed() -> RequestFailed:
    return RequestFailed(FailureKind.FILTER_FAILED, "a filter that requests pass here has failed; try again later", 1.0)


def load(options: CoordinatorOptions, metrics: Metrics) -> Filters | None:
    """Of --filter; None without. Raises ConfigurationError."""
    names = [name.strip() for name in options.filter.split(",") if name.strip()]
    stages = [_Stage(name, _made(name), options, metrics) for name in names]
    return Filters(stages) if stages else None


def _made(name: str) -> Filter:
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise ConfigurationError(f"--filter is '{name}'; write MODULE:FACTORY, several with commas between them")
    try:
        factory = getattr(importlib.import_module(module), attribute)
        made = factory()
    except Exception as error:
        raise ConfigurationError(
            f"--filter {name} cannot be loaded ({type(error).__name__}: {error}); is it installed, or on PYTHONPATH?"
        ) from error
    if not isinstance(made, Filter):
        raise ConfigurationError(f"--filter {name} made a {type(made).__name__}; it must be a baton.filters.Filter")
    return made


class _Passed(NamedTuple):
    """What a filter lets on, and whether that is the end of it."""

    text: str
    end: bool


class _Passage:
    """One choice's text on its way through one filter."""

    def __init__(self, stage: _Stage) -> None:
        hook = stage.filter.output()
        assert hook is not None, "a filter says once whether it looks at answers"
        self._stage = stage
        self._hook: OutputFilter | None = hook
        self._held = ""

    async def push(self, text: str, final: bool) -> "_Passed":
        """Raises _Failed."""
        self._held += text
        held, hook = self._held, self._hook
        if hook is None:
            self._held = ""
            return _Passed(held, False)
        if not (text or final):
            return _Passed("", False)
        try:
            shown = await self._stage.run(hook(held, final))
            if not (isinstance(shown, Shown) and 0 <= shown.decided <= len(held) and isinstance(shown.text, str)):
                raise self._stage.nonsense()
        except (_Failed, Refused):
            if not self._stage.fails_open:
                raise _Failed from None
            self._held, self._hook = "", None  # nobody knows what it would have made of the rest
            return _Passed(held, False)
        if shown.text != held[: shown.decided]:
            self._stage.count("changed_output")
        self._held = held[shown.decided :]
        if shown.end:
            self._stage.count("cut")
        return _Passed(shown.text, shown.end)


class FilteredChoice(Choice):
    """A choice whose text passes through filters, by a task that runs while there is any to pass."""

    __slots__ = ("_filters", "_passages", "_passed", "_passing", "_verdict")

    def __init__(self, filters: Filters, passages: Sequence[_Passage], *others: Any) -> None:
        super().__init__(*others)
        self._filters = filters
        self._passages = passages
        self._passed: list[str] = []
        """Of each of `pieces` what it lets show; and then what the end does."""
        self._verdict: str | None = None
        """The finish reason, once all has passed."""
        self._passing: asyncio.Task[None] | None = None
        self.request.unfiltered += 1

    @property
    def plain(self) -> bool:
        return False

    @property
    def _num_ready(self) -> int:
        """Tokens that may be taken."""
        return min(len(self._passed), len(self.stream.tokens))

    def _touch(self) -> None:
        """New text, an end, or a new reader."""
        if self._passing is None and self._verdict is None:
            self._passing = asyncio.get_running_loop().create_task(self._pass())
        self._say()

    def _say(self) -> None:
        if self._verdict is not None or self._num_ready > self._taken:
            super()._touch()

    async def _pass(self) -> None:
        try:
            while self._verdict is None and self.request.failure is None:
                at = len(self._passed)
                if self.request.unwanted:
                    self._decide(ABORTED)
                elif at < len(self.pieces):
                    text, end = await self._push(self.pieces[at], False)
                    self._passed.append(text)
                    if end:
                        self._decide(CONTENT_FILTER)
                elif self.finish_reason is not None:
                    text, end = await self._push("", True)
                    self._passed.append(text)
                    self._decide(CONTENT_FILTER if end else self.finish_reason)
                else:
                    return
                self._say()
        except _Failed:
            failure = _closed()
            self._filters.fail(self.request, failure)
            if self.request.failure is None:  # its workers had finished
                self.request.failure = failure
                self.request.wake()
        finally:
            self._passing = None

    async def _push(self, text: str, final: bool) -> _Passed:
        """Through all of them. Behind one that ends the answer, the others get the last of it."""
        end = False
        for passage in self._passages:
            text, ended = await passage.push(text, final or end)
            end |= ended
        return _Passed(text, end)

    def _decide(self, verdict: str) -> None:
        self._verdict = verdict
        self.request.unfiltered -= 1
        if verdict == CONTENT_FILTER:
            self._filters.cut(self, verdict)
        self.request.wake()

    def take(self) -> Delta | None:
        self._dirty = False
        if self._claimed is not None:
            self._check(self._claimed)
            self._claimed = None
        if self._muted:
            return None
        first, self._taken = self._taken, max(self._taken, self._num_ready)
        # Once there is a verdict all that has passed is taken, with what came after the last token.
        text = "".join(self._passed[first : None if self._verdict is not None else self._taken])
        self.digest.update(text.encode())
        ids = [WITHHELD] * (self._taken - first)
        digest = self.digest.hexdigest()
        return Delta(self.number, self.prompt_index, first, ids, text, [], self._verdict, digest)

    def _check(self, claimed: Position) -> None:
        ended = self._verdict is not None and self._num_ready == claimed.num_tokens
        passed = self._passed[: None if claimed.ended and ended else claimed.num_tokens]
        self.digest.update("".join(passed).encode())
        check_claim(claimed, self._num_ready, self.digest.hexdigest(), ended)
