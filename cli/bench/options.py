"""Settings of `baton bench`, judged in one place. A message says what to change."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from baton.config import setting, validate
from baton.errors import ConfigurationError
from cli.bench.measuring import OBJECTIVES

DEFAULT_STREAMS = 16
DEFAULT_SECONDS = 30.0


@dataclass(frozen=True)
class LoadOptions:
    """When requests are sent, and how many."""

    rate: float = setting(
        0.0, "sessions that begin a second (open loop; a session is one request unless --turns is more), inf: all at "
        "once; 0: each stream asks again when it has its answer (closed loop), or the times of --file",
    )  # fmt: skip
    burstiness: float = setting(
        1.0, "of --rate: 1 is a Poisson process, less comes in bursts (shape of gamma-distributed gaps), inf evenly"
    )
    concurrency: int = setting(
        0, f"streams side by side in a closed loop (0: {DEFAULT_STREAMS}); in an open loop the most at once: others "
        "wait in the client, and their wait is shown (0: no limit, as real users are)",
    )  # fmt: skip
    requests: int = setting(0, "end after so many requests; 0: no matter how many")
    duration_s: float = setting(
        0.0, "send nothing new after so long, and wait for what runs; 0: no limit, or, where neither --requests nor "
        f"--file says when to end, {DEFAULT_SECONDS:g}",
    )  # fmt: skip
    warmup: int = setting(0, "requests that are sent, and ended, before anything is measured")
    clients: int = setting(1, "processes that send; more where the report says that one cannot keep up")
    request_timeout_s: float = setting(600.0, "longest that one request may take")
    retry_after: bool = setting(
        False, "ask again after a 429 when its Retry-After says; the wait is part of the latency, as a user has it"
    )
    seed: int = setting(
        -1, "of prompts and arrivals; -1: another one each time, because a server that has cached the prompts of the "
        "last run answers sooner. It is in the JSON",
    )  # fmt: skip


@dataclass(frozen=True)
class WorkloadOptions:
    """What is asked."""

    api: str = setting(
        "completions", "completions has token ids as prompts where it can, chat has messages", ("completions", "chat")
    )
    model: str = setting("", "its name; empty: the first one that the server lists")
    input_tokens: int = setting(512, "of a prompt, behind its shared prefix")
    output_tokens: int = setting(128, "of an answer")
    length_spread: float = setting(
        0.0, "both lengths are drawn evenly from so much below and above: 0.5 is half to one and a half"
    )
    prefix_tokens: int = setting(0, "that a prompt shares with others, before its own")
    prefixes: int = setting(1, "different ones of these, one of which is drawn for every session")
    turns: int = setting(1, "of a session; each asks with all that was said before, and --input-tokens more")
    think_s: float = setting(0.0, "mean of the time between an answer and the next turn, exponentially distributed")
    file: str = setting(
        "", "requests from a file: Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens), Mooncake's JSON lines "
        "(timestamp, input_length, output_length, hash_ids), ShareGPT's JSON (conversations), or JSON lines with "
        "prompt and output_tokens; its kind is seen from its beginning",
    )  # fmt: skip
    speed: float = setting(1.0, "of the times of --file: 2 is twice as fast")
    tick_s: float = setting(
        0.0, "times of --file are on a grid of so many seconds (Mooncake's conversations: 3): spread them over it"
    )
    longest: int = setting(0, "leave out requests of --file with more tokens than this, prompt and answer; 0: none")
    tokenizer: str = setting(
        "", "tokenizer.json, or a folder with one, to make prompts of exact length with; empty: the server's "
        "/tokenize, and without one, what it counts in an answer",
    )  # fmt: skip
    stop_at_eos: bool = setting(
        False, "let the model end its answer: ignore_eos is then not sent, which servers other than vLLM, SGLang and "
        "Baton may not know",
    )  # fmt: skip
    body: str = setting(
        "", "JSON that every body gets on top, such as '{\"temperature\": 0.8}'; null leaves a field out"
    )


@dataclass(frozen=True)
class OutputOptions:
    percentiles: str = setting("50,90,95,99,99.9", "shown and written of every latency")
    json: str = setting("", "write the result there, in the schema of `vllm bench serve`, and more under `baton`")
    html: str = setting("", "write a report with plots there, one file that needs no network")
    detailed: bool = setting(
        False, "the JSON has every request: lengths, times, gaps between tokens (4 bytes of memory each), errors"
    )
    label: str = setting("", "name of this run in the JSON and the report")


def parse_objectives(words: "list[str]", where: str = "--goodput") -> dict[str, float]:
    """Milliseconds by name, from 'ttft:500', 'tpot:50', 'e2el:20000'; commas may stand in place of spaces."""
    return _pairs(words, where, OBJECTIVES, "milliseconds")


def parse_gates(words: "list[str]", names: "tuple[str, ...]") -> dict[str, float]:
    return _pairs(words, "--fail-if", names, "ratio")


def _pairs(words: "list[str]", where: str, names: "tuple[str, ...]", what: str) -> dict[str, float]:
    result: dict[str, float] = {}
    for word in filter(None, re.split(r"[,\s]+", " ".join(words))):
        name, _, number = word.partition(":")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if name not in names or not value >= 0:
            shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
            raise ConfigurationError(f"{where} has '{word}'; write NAME:{what.upper()}, the name one of {shown}")
        result[name] = value
    return result


def parse_percentiles(text: str) -> list[float]:
    try:
        result = sorted({float(word) for word in text.split(",")})
    except ValueError:
        result = [math.nan]
    if not all(0 <= each <= 100 for each in result):
        raise ConfigurationError(f"--percentiles is '{text}'; write numbers from 0 to 100 with commas between them")
    return result


def parse_body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigurationError(f"--body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise ConfigurationError("--body is no JSON object; write it in braces, such as '{\"temperature\": 0.8}'")
    return body


def is_grpc(url: str) -> bool:
    return urlsplit(url).scheme in ("grpc", "grpcs")


def check(url: str, load: LoadOptions, workload: WorkloadOptions, output: OutputOptions) -> None:
    """Raises ConfigurationError for what cannot work."""
    for options in (load, workload, output):
        validate(options)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https", "grpc", "grpcs") or not parts.hostname or "," in url:
        raise ConfigurationError(f"--url is '{url}'; write one http://host:port, or grpc://host:port for Baton's gRPC")
    if parts.scheme.startswith("grpc") and not parts.port:
        raise ConfigurationError(f"--url is '{url}'; gRPC needs a port, such as grpc://{parts.hostname}:50051")
    at_least: Mapping[str, tuple[float, float]] = {
        "rate": (load.rate, 0), "concurrency": (load.concurrency, 0), "requests": (load.requests, 0),
        "warmup": (load.warmup, 0), "clients": (load.clients, 1), "input_tokens": (workload.input_tokens, 1),
        "output_tokens": (workload.output_tokens, 1), "prefix_tokens": (workload.prefix_tokens, 0),
        "prefixes": (workload.prefixes, 1), "turns": (workload.turns, 1), "think_s": (workload.think_s, 0),
        "tick_s": (workload.tick_s, 0), "longest": (workload.longest, 0), "seed": (load.seed, -1),
    }  # fmt: skip
    for name, (value, least) in at_least.items():
        if not value >= least:
            raise ConfigurationError(f"--{name.replace('_', '-')} is {value}; it must be at least {least:g}")
    if not load.burstiness > 0 or not workload.speed > 0:
        raise ConfigurationError("--burstiness and --speed must be greater than 0")
    if not 0 <= workload.length_spread < 1:
        raise ConfigurationError(f"--length-spread is {workload.length_spread}; it must be 0 or more, and less than 1")
    if load.concurrency and load.clients > load.concurrency:
        raise ConfigurationError("--clients is more than --concurrency: a stream cannot be shared by processes")
    if workload.turns > 1 and workload.file and not workload.file.endswith(".json"):
        raise ConfigurationError("--turns of a --file are those of ShareGPT's JSON; leave --turns out")
    if math.isinf(load.rate) and not load.requests and not workload.file:
        raise ConfigurationError("--rate inf sends all at once: say how many with --requests")
    parse_percentiles(output.percentiles)
    parse_body(workload.body)
