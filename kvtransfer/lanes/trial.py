"""Trying lanes out: one process serves a pool of known bytes by every lane it can, another one pulls and times.

    1. The pulling side connects to the trial's own port and is told, as one line of JSON, the shape of the pool and
       each lane's endpoint, or why there is none. The connection ends there.
    2. It pulls by each lane, scattered, and checks every byte.

Nothing of a real pool is involved, so the port asks nobody who they are.
"""

import contextlib
import json
import logging
import socket
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from baton.errors import ConfigurationError, TransferError
from kvtransfer.lanes.base import BlockRead, LaneClient, LaneEndpoint
from kvtransfer.lanes.registry import Lane
from kvtransfer.memory import PoolMemory

log = logging.getLogger(__name__)

WORD_BYTES: Final = 8
MAX_POOL_BYTES: Final = 1 << 30
SMALL_BYTES: Final = 4096
_MAX_REPLY_BYTES: Final = 64 << 10
_REPLY_S: Final = 10.0
_PULL_S: Final = 30.0
_MAX_SMALL_PULLS: Final = 200


@dataclass(frozen=True, slots=True)
class Served:
    """What a trial's server offers. `unavailable`: lane to the reason why it is not in `endpoints`."""

    num_blocks: int
    block_bytes: int
    endpoints: dict[str, LaneEndpoint]
    unavailable: dict[str, str]


class TrialServer:
    """Serves a pool in which word i, as uint64, is i."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        """Raises ConfigurationError."""
        if block_bytes % WORD_BYTES or not 0 < num_blocks * block_bytes <= MAX_POOL_BYTES:
            raise ConfigurationError(
                f"{num_blocks} blocks of {block_bytes} bytes cannot be tried; a block is a multiple of {WORD_BYTES} "
                f"bytes, and all together are at most {MAX_POOL_BYTES >> 20} MiB"
            )
        self._memory = PoolMemory.create(num_blocks, block_bytes)
        words = self._memory.blocks.view(np.uint64)
        words[:] = np.arange(words.size, dtype=np.uint64).reshape(words.shape)
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._memory.close)

    def start(self, lanes: Sequence[Lane], host: str, port: int) -> str:
        """Serve `lanes` at `host`; returns the address for `ask`. Raises ConfigurationError when none can be served."""
        served = Served(self._memory.num_blocks, self._memory.block_bytes, {}, {})
        for lane in lanes:
            server = lane.serve(host)
            try:
                served.endpoints[lane.name] = server.start(self._memory)
            except ConfigurationError as error:
                served.unavailable[lane.name] = str(error)
            else:
                self._stack.callback(server.close)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise ConfigurationError(f"nothing can be served at {host}:{port}: {error}") from error
        line = json.dumps(
            {
                "num_blocks": served.num_blocks,
                "block_bytes": served.block_bytes,
                "endpoints": {name: [each.address, each.token] for name, each in served.endpoints.items()},
                "unavailable": served.unavailable,
            }
        ).encode()
        thread = threading.Thread(target=_tell, args=(listener, line), name="lane-trial", daemon=True)
        thread.start()
        self._stack.callback(thread.join, _REPLY_S)
        self._stack.callback(listener.shutdown, socket.SHUT_RDWR)
        return f"{host}:{listener.getsockname()[1]}"

    def close(self) -> None:
        self._stack.close()


def _tell(listener: socket.socket, line: bytes) -> None:
    with listener:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError as error:
                log.debug("the trial ended: %s", error)
                return
            with peer, contextlib.suppress(OSError):
                peer.settimeout(1.0)
                peer.sendall(line)


def ask(address: str) -> Served:
    """What the server at host:port offers. Raises TransferError."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_REPLY_S) as connection:
            return _parse(_read_all(connection, time.monotonic() + _REPLY_S))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise TransferError(
            f"no trial of lanes answers at {address} ({error}); start one there with `baton doctor --serve {address}`"
        ) from error


def _read_all(connection: socket.socket, deadline: float) -> bytes:
    text = b""
    while part := connection.recv(_MAX_REPLY_BYTES):
        text += part
        if len(text) > _MAX_REPLY_BYTES or time.monotonic() > deadline:
            raise ValueError("it sends something else")
    return text


def _parse(text: bytes) -> Served:
    reply: dict[str, Any] = json.loads(text)
    num_blocks, block_bytes = int(reply["num_blocks"]), int(reply["block_bytes"])
    if block_bytes <= 0 or block_bytes % WORD_BYTES or not 0 < num_blocks * block_bytes <= MAX_POOL_BYTES:
        raise ValueError("it states an impossible pool")
    endpoints = {
        str(name): LaneEndpoint(str(name), str(address), int(token))
        for name, (address, token) in reply["endpoints"].items()
    }
    unavailable = {str(name): str(reason) for name, reason in reply["unavailable"].items()}
    return Served(num_blocks, block_bytes, endpoints, unavailable)


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds of every repetition; a pull and a memcpy of as many bytes took turns. `small`: one read of 4 KiB."""

    num_bytes: int
    pulls: list[float]
    copies: list[float]
    small: list[float]

    @property
    def best_gbs(self) -> float:
        return self.num_bytes / min(self.pulls) / 1e9

    @property
    def memcpy_gbs(self) -> float:
        return self.num_bytes / min(self.copies) / 1e9

    @property
    def small_us(self) -> float:
        return statistics.median(self.small) * 1e6


def measure(lane: Lane, served: Served, repeat: int, budget_s: float) -> Figures:
    """Pull half of the blocks `repeat` times, ever others in ever new orders; fewer times where `budget_s` runs out.

    The first pull, which opens what is opened at first use, is not counted. Raises TransferError, also for bytes that
    arrive wrong.
    """
    local = PoolMemory.create(served.num_blocks, served.block_bytes)
    try:
        client = lane.connect(served.endpoints[lane.name], local, time.monotonic() + _PULL_S)
        try:
            return _measure(client, local, repeat, time.monotonic() + budget_s)
        finally:
            client.close()
    finally:
        local.close()


def _measure(client: LaneClient, local: PoolMemory, repeat: int, until: float) -> Figures:
    moved = -(-local.num_blocks // 2)
    num_bytes = moved * local.block_bytes
    source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    draw = np.random.default_rng(0)
    figures = Figures(num_bytes, [], [], [])
    for number in range(repeat + 1):
        theirs, ours = draw.permutation(local.num_blocks)[:moved], draw.permutation(local.num_blocks)[:moved]
        reads = [BlockRead(there, 0, here) for there, here in zip(theirs.tolist(), ours.tolist(), strict=True)]
        took = _seconds(lambda reads=reads: client.pull(reads, time.monotonic() + _PULL_S))  # type: ignore[misc]
        copied = _seconds(lambda: np.copyto(target, source))
        if number:
            figures.pulls.append(took)
            figures.copies.append(copied)
            if time.monotonic() > until:
                break
    _check(local, theirs, ours)
    small = [BlockRead(0, 0, 0, num_bytes=min(SMALL_BYTES, local.block_bytes))]
    while len(figures.small) < _MAX_SMALL_PULLS and (not figures.small or time.monotonic() < until):
        figures.small.append(_seconds(lambda: client.pull(small, time.monotonic() + _PULL_S)))
    return figures


def _check(local: PoolMemory, theirs: "np.ndarray[Any, Any]", ours: "np.ndarray[Any, Any]") -> None:
    words = local.blocks.view(np.uint64)
    first = theirs.astype(np.uint64) * np.uint64(words.shape[1])
    inside = np.arange(words.shape[1], dtype=np.uint64)
    for block, start in zip(ours.tolist(), first.tolist(), strict=True):
        if not np.array_equal(words[block], inside + np.uint64(start)):
            raise TransferError("the lane delivered wrong bytes")


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
