"""What `baton bench` and the processes that send say to each other: msgpack over pipes, its length before each."""

import asyncio
from typing import Any

import msgspec

from cli.bench.asking import Asking
from cli.bench.content import Content
from cli.bench.load import Measured
from cli.bench.measuring import Record
from cli.bench.options import LoadOptions, WorkloadOptions

_LENGTH_BYTES = 4
MAX_FRAME_BYTES = 1 << 30


class Target(msgspec.Struct):
    """Where requests go, and with what."""

    url: str
    ca: str
    client_cert: str
    client_key: str
    authorization: str


class Job(msgspec.Struct, tag=True):
    number: int
    target: Target
    load: LoadOptions
    workload: WorkloadOptions
    asking: Asking
    content: Content
    seed: int
    detailed: bool


class Go(msgspec.Struct, tag=True):
    start_at: float
    """By the monotonic clock, which all processes of a machine share."""


class Stop(msgspec.Struct, tag=True):
    """Cut off what runs, and say what was measured."""


class Ready(msgspec.Struct, tag=True):
    """Warm, and the first bodies are made. `errors`: of the warm-up, by kind; `example`: one, in the server's words."""

    errors: dict[str, int]
    example: str = ""


class Ended(msgspec.Struct, tag=True):
    """Requests that ended since the last time, and how many there are of what kind."""

    records: list[Record]
    sent: int
    running: int
    waiting: int


class Done(msgspec.Struct, tag=True):
    measured: Measured


_decode = msgspec.msgpack.Decoder(Job | Go | Stop | Ready | Ended | Done).decode
Frame = Job | Go | Stop | Ready | Ended | Done


def packed(frame: Frame) -> bytes:
    data = msgspec.msgpack.encode(frame)
    return len(data).to_bytes(_LENGTH_BYTES, "big") + data


async def next_frame(reader: asyncio.StreamReader) -> Any:
    """Raises EOFError when the other side is gone."""
    try:
        length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
        if length > MAX_FRAME_BYTES:
            raise EOFError
        return _decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        raise EOFError from None
