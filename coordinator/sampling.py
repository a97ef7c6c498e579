"""What a client asks of sampling, judged in one place for HTTP and gRPC, and resolved for the engine."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from baton.errors import InvalidRequestError
from baton.v1 import worker_link_pb2 as wire
from coordinator.model_files import ModelFacts

MAX_CHOICES = 16
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1000
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
_SEED_BITS = 64
_INT32_MAX = 2**31 - 1


class SamplingRequest(msgspec.Struct, frozen=True):
    """As the client wrote it. None: the client did not say, so the model's default or the stated one holds."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = {}
    min_tokens: int | None = None
    max_tokens: int | None = None
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    n: int | None = None
    stop: Sequence[str] = ()


class _Range(NamedTuple):
    low: float
    high: float
    above_low: bool = False

    def holds(self, value: float) -> bool:
        return (self.low < value if self.above_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if self.above_low:
            return f"greater than {self.low:g} and at most {self.high:g}"
        return f"from {self.low:g} to {self.high:g}"


_RANGES = {
    "temperature": _Range(0, 100),
    "top_k": _Range(-1, _INT32_MAX),
    "top_p": _Range(0, 1, above_low=True),
    "min_p": _Range(0, 1),
    "seed": _Range(-(2 ** (_SEED_BITS - 1)), 2**_SEED_BITS - 1),
    "repetition_penalty": _Range(0, 100, above_low=True),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
    "min_tokens": _Range(0, _INT32_MAX),
    "max_tokens": _Range(1, _INT32_MAX),
    "logprobs": _Range(0, MAX_LOGPROBS),
    "n": _Range(1, MAX_CHOICES),
}
_DEFAULTS: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def check(asked: SamplingRequest, vocab_size: int) -> None:
    """Raise InvalidRequestError for the first field out of bounds."""
    for name, bounds in _RANGES.items():
        value = getattr(asked, name)
        if value is not None and not (math.isfinite(value) and bounds.holds(value)):
            raise InvalidRequestError(f"{name} must be {bounds}", name)
    if asked.min_tokens and asked.max_tokens is not None and asked.min_tokens > asked.max_tokens:
        raise InvalidRequestError("min_tokens must not be greater than max_tokens", "min_tokens")
    _check_ends(asked, vocab_size)
    if len(asked.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidRequestError(f"logit_bias has more than {MAX_LOGIT_BIAS} entries", "logit_bias")
    for token_id, bias in asked.logit_bias.items():
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"logit_bias names a token id outside the vocabulary of {vocab_size}", "logit_bias"
            )
        if not (math.isfinite(bias) and -100 <= bias <= 100):
            raise InvalidRequestError("logit_bias values must be from -100 to 100", "logit_bias")


def _check_ends(asked: SamplingRequest, vocab_size: int) -> None:
    if len(asked.stop) > MAX_STOP_STRINGS:
        raise InvalidRequestError(f"stop has more than {MAX_STOP_STRINGS} strings", "stop")
    if not all(asked.stop):
        raise InvalidRequestError("stop holds an empty string, which would end every answer at once", "stop")
    if any(len(stop) > MAX_STOP_CHARACTERS for stop in asked.stop):
        raise InvalidRequestError(f"a stop string is longer than {MAX_STOP_CHARACTERS} characters", "stop")
    if len(asked.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(f"stop_token_ids has more than {MAX_STOP_TOKEN_IDS} entries", "stop_token_ids")
    if not all(0 <= token_id < vocab_size for token_id in asked.stop_token_ids):
        raise InvalidRequestError(
            f"stop_token_ids names a token id outside the vocabulary of {vocab_size}", "stop_token_ids"
        )


def resolve(asked: SamplingRequest, facts: ModelFacts, max_tokens: int) -> wire.EngineSampling:
    """Every default filled in: the client's word, else generation_config.json, else the stated default.

    Without a seed a random one is drawn, so that every attempt at the request draws the same numbers.
    """

    def value(name: str) -> float:
        said = getattr(asked, name)
        return said if said is not None else facts.sampling_defaults.get(name, _DEFAULTS[name])

    ends = [*asked.stop_token_ids, *(() if asked.ignore_eos else facts.eos_token_ids)]
    seed = random.getrandbits(_SEED_BITS) if asked.seed is None else asked.seed
    return wire.EngineSampling(
        temperature=value("temperature"),
        top_k=max(0, int(value("top_k"))),
        top_p=value("top_p"),
        min_p=value("min_p"),
        seed=seed % 2**_SEED_BITS,
        repetition_penalty=value("repetition_penalty"),
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias=asked.logit_bias,
        min_tokens=asked.min_tokens or 0,
        max_tokens=max_tokens,
        stop_token_ids=list(dict.fromkeys(ends)),
        logprobs=asked.logprobs,
    )


def for_choice(sampling: wire.EngineSampling, number: int) -> wire.EngineSampling:
    """The same with the seed of choice `number`, so that choices differ and each can be had again."""
    if number == 0:
        return sampling
    own = wire.EngineSampling()
    own.CopyFrom(sampling)
    own.seed = (sampling.seed + number) % 2**_SEED_BITS
    return own
