"""Lane `tcp`: blocks over sockets, gathered from one pool and scattered into the other without a copy between.

    request   token u64 | num_reads u32 | number u32 | num_reads x (block u64, generation u64, offset u64, length u64)
    answer    status u32 | number u32 | block_bytes u64
              the bytes read in the order of the request   } only when the status is OK
              status u32                                   }

The server looks at the generations before it sends and again after the last byte has left the pool; the second
status tells what it found. An answer has the number of its request, so that one that comes twice or late is never taken
for the next. A request of no reads is a probe. Every number is little-endian. A connection on which anything goes wrong
is closed, because nobody can say which bytes come next. Requests are bounded, and so are the
connections that a large pull is spread over. With TLS (streams.py) a server talks to nobody without.
"""

import contextlib
import itertools
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import numpy as np

from baton.errors import ConfigurationError, TransferError
from baton.tls import Tls, reason_of
from kvtransfer.lanes.base import (
    ANY_GENERATION,
    POLL_S,
    BlockRead,
    LaneClient,
    LaneEndpoint,
    LaneServer,
    check_still_wanted,
)
from kvtransfer.lanes.copying import MAX_RUN_BYTES, Integers, Pieces, batches, coalesce
from kvtransfer.lanes.streams import SEND_STALL_S, Stream, accept_stream, dial_stream
from kvtransfer.memory import PoolMemory

log = logging.getLogger(__name__)

NAME = "tcp"
MAX_CONNECTIONS = 256  # a server's; each has a thread
MAX_PARALLEL = 4  # requests that a client has under way; each has a connection
MAX_SPREAD = min(MAX_PARALLEL, len(os.sched_getaffinity(0)))  # connections that one pull may take
MAX_REQUEST_READS = 1024
MAX_REQUEST_BYTES = 64 << 20
SPREAD_BYTES = 4 << 20
"""A pull takes another connection for each so many bytes: one is bound by one core, here and at the peer."""
_IDLE_PULSE_S = 5.0
_FIRST_REQUEST_S = 5.0  # a peer probes as soon as it is connected; who does not holds a thread for nothing
_JOIN_S = 2.0

_REQUEST = struct.Struct("<QII")
_ANSWER = struct.Struct("<IIQ")
_STATUS = struct.Struct("<I")
_WANTED = np.dtype([("block", "<u8"), ("generation", "<u8"), ("offset", "<u8"), ("length", "<u8")])
_OK, _BAD_TOKEN, _BAD_REQUEST, _STALE = range(4)
_REASONS = {
    _BAD_TOKEN: "lane tcp: the peer refused the token",
    _BAD_REQUEST: "lane tcp: the peer has no such blocks",
    _STALE: "a block of the peer no longer holds what was offered",
}


class TcpLaneServer(LaneServer):
    name = NAME

    def __init__(self, host: str, tls: Tls | None = None) -> None:
        """`host` is the address that peers reach this process at."""
        self._host = host
        self._tls = tls
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._peers: dict[threading.Thread, Stream | None] = {}  # None before the handshake
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def start(self, memory: PoolMemory) -> LaneEndpoint:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            self._listener = socket.create_server((self._host, 0), family=family, backlog=64)
        except OSError as error:
            raise ConfigurationError(f"lane tcp cannot listen on {self._host}: {error}; change --host") from error
        port = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(
            target=self._accept, args=(self._listener, memory), name="lane-tcp", daemon=True
        )
        self._acceptor.start()
        return LaneEndpoint(NAME, f"{self._host}:{port}", memory.token)

    def close(self) -> None:
        if self._listener is None or self._acceptor is None:
            return
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread out of accept()
        self._acceptor.join(_JOIN_S)
        self._listener.close()
        self._listener = None
        with self._lock:
            peers = dict(self._peers)
            for stream in peers.values():
                if stream is not None:
                    stream.shut_down()
        for thread in peers:
            thread.join(_JOIN_S)

    def _accept(self, listener: socket.socket, memory: PoolMemory) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if not self._closing.wait(0.1):  # out of descriptors, say: breathe, then go on
                    log.warning("lane tcp: cannot accept a connection: %s", error)
                continue
            with self._lock:
                if self._closing.is_set() or len(self._peers) >= MAX_CONNECTIONS:
                    log.warning("lane tcp: refused a connection, %d are open", len(self._peers))
                    connection.close()
                    continue
                thread = threading.Thread(
                    target=self._serve, args=(connection, memory), name="lane-tcp-peer", daemon=True
                )
                self._peers[thread] = None
            thread.start()

    def _serve(self, connection: socket.socket, memory: PoolMemory) -> None:
        me = threading.current_thread()
        stream: Stream | None = None
        try:
            stream = accept_stream(connection, self._tls, _IDLE_PULSE_S)
            with self._lock:
                self._peers[me] = stream
            known = _answer(stream, memory, partial(check_still_wanted, time.monotonic() + _FIRST_REQUEST_S, None))
            while known and _answer(stream, memory, self._check_open):
                pass
        except OSError as error:
            if stream is None and self._tls is not None:
                self._tls.refuse("lane tcp", reason_of(error))
            else:
                log.debug("lane tcp: a connection ended: %s", error)
        except TransferError as error:
            log.debug("lane tcp: a connection ended: %s", error)
        finally:
            with self._lock:
                self._peers.pop(me)
                (stream or connection).close()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise TransferError("the pool is no longer served")


def _answer(stream: Stream, memory: PoolMemory, check_open: Callable[[], None]) -> bool:
    """Serve one request; False when the connection is to be closed."""
    head = bytearray(_REQUEST.size)
    stream.receive([memoryview(head)], check_open)
    token, num_reads, number = _REQUEST.unpack(head)
    status = _OK if token == memory.token else _BAD_TOKEN
    if num_reads > MAX_REQUEST_READS:
        status = status or _BAD_REQUEST
    wanted = np.empty(num_reads if status == _OK else 0, _WANTED)
    if len(wanted):
        stream.receive([wanted.data.cast("B")], partial(check_still_wanted, time.monotonic() + SEND_STALL_S, None))
        status = _OK if _is_inside(wanted, memory) else _BAD_REQUEST
        status = status or _judge(memory, wanted)
    answer = memoryview(_ANSWER.pack(status, number, memory.block_bytes))
    if status != _OK:
        stream.send([answer])
        return False
    starts = wanted["block"] * np.uint64(memory.block_bytes) + wanted["offset"]
    stream.send([answer, *_ranges(memory, starts, wanted["length"])])
    status = _judge(memory, wanted)
    stream.send([memoryview(_STATUS.pack(status))])
    return status == _OK


def _is_inside(wanted: np.ndarray, memory: PoolMemory) -> bool:
    """Whether every read lies in a block, and all together are no more than one request may ask for."""
    lengths, block_bytes = wanted["length"], memory.block_bytes
    if wanted["block"].max() >= memory.num_blocks or lengths.min() == 0 or lengths.max() > block_bytes:
        return False
    within = wanted["offset"] <= np.uint64(block_bytes) - lengths  # never offset + length, which could wrap round
    return bool(within.all()) and int(lengths.sum()) <= max(MAX_REQUEST_BYTES, block_bytes)


def _judge(memory: PoolMemory, wanted: np.ndarray) -> int:
    fits = memory.generations[wanted["block"]] == wanted["generation"]
    fits |= wanted["generation"] == ANY_GENERATION
    return _OK if bool(fits.all()) else _STALE


class TcpLaneClient(LaneClient):
    name = NAME

    def __init__(self, endpoint: LaneEndpoint, local: PoolMemory, tls: Tls | None) -> None:
        host, _, port = endpoint.address.rpartition(":")
        self._address = (host, int(port))
        self._token = endpoint.token
        self._local = local
        self._tls = tls
        self._idle: list[Stream] = []
        self._numbers = itertools.cycle(range(1, 1 << 32))
        self._slots = threading.BoundedSemaphore(MAX_PARALLEL)
        self._helpers = ThreadPoolExecutor(MAX_PARALLEL - 1, thread_name_prefix="lane-tcp-pull")

    @classmethod
    def connect(
        cls, endpoint: LaneEndpoint, local: PoolMemory, deadline: float, tls: Tls | None = None
    ) -> "TcpLaneClient":
        """Reach the peer and compare the size of a block. Raises TransferError."""
        try:
            client = cls(endpoint, local, tls)
        except ValueError as error:
            raise TransferError(f"lane tcp: '{endpoint.address}' is not host:port") from error
        client._request(Pieces.of([], local), partial(check_still_wanted, deadline, None), deadline)
        return client

    def pull(self, reads: Sequence[BlockRead], deadline: float, cancelled: threading.Event | None = None) -> None:
        check_still_wanted(deadline, cancelled)
        pieces = Pieces.of(reads, self._local)
        share = max(SPREAD_BYTES, -(-int(pieces.lengths.sum()) // MAX_SPREAD))
        parts = [
            pieces.part(where) for where in batches(pieces.lengths, MAX_REQUEST_READS, min(share, MAX_REQUEST_BYTES))
        ]
        failures: list[TransferError] = []

        def go_on() -> None:
            check_still_wanted(deadline, cancelled)
            if failures:
                raise failures[0]

        def request(part: Pieces) -> None:
            try:
                self._request(part, go_on, deadline)
            except TransferError as error:
                failures.append(error)

        helping = [self._helpers.submit(request, part) for part in parts[1:]]
        try:
            for part in parts[:1]:
                request(part)
        finally:
            wait(helping)  # nothing is written once this returns
        for help_given in helping:
            help_given.result()
        if failures:
            raise failures[0]

    def close(self) -> None:
        self._helpers.shutdown()
        while self._idle:
            self._idle.pop().close()

    def _request(self, pieces: Pieces, go_on: Callable[[], None], deadline: float) -> None:
        go_on()
        while not self._slots.acquire(timeout=POLL_S):
            go_on()
        try:
            stream = self._connection(deadline)
            try:
                self._exchange(stream, pieces, go_on)
            except (OSError, TransferError):
                stream.close()
                raise
            self._idle.append(stream)
        except OSError as error:
            raise TransferError(f"lane tcp lost the peer: {error}") from error
        finally:
            self._slots.release()

    def _connection(self, deadline: float) -> Stream:
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        return dial_stream(self._address, self._tls, POLL_S, max(0.001, deadline - time.monotonic()))

    def _exchange(self, stream: Stream, pieces: Pieces, go_on: Callable[[], None]) -> None:
        wanted = np.empty(len(pieces.blocks), _WANTED)
        wanted["block"], wanted["generation"] = pieces.blocks, pieces.generations
        wanted["offset"] = pieces.remote_starts - pieces.blocks * self._local.block_bytes
        wanted["length"] = pieces.lengths
        number = next(self._numbers)
        stream.send([memoryview(_REQUEST.pack(self._token, len(wanted), number) + wanted.tobytes())])
        head, tail = bytearray(_ANSWER.size), bytearray(_STATUS.size)
        ranges = _ranges(self._local, pieces.local_starts, pieces.lengths)
        try:
            stream.receive([memoryview(head), *ranges, memoryview(tail)], go_on)
        except TransferError:
            _check_status(_ANSWER.unpack(head)[0])  # a refusal has no more than its head
            raise
        status, answered, block_bytes = _ANSWER.unpack(head)
        _check_status(status)
        if answered != number:
            raise TransferError("lane tcp: the peer answered another request than the one sent")
        if block_bytes != self._local.block_bytes:
            raise TransferError(f"a block has {block_bytes} bytes at the peer and {self._local.block_bytes} here")
        _check_status(*_STATUS.unpack(tail))


def _check_status(status: int) -> None:
    if status != _OK:
        raise TransferError(_REASONS.get(status, f"lane tcp: the peer answered {status}"))


def _ranges(memory: PoolMemory, starts: Integers, lengths: Integers) -> list[memoryview]:
    """These bytes of the pool in this order, neighbours joined."""
    runs = coalesce(starts, starts, lengths, MAX_RUN_BYTES)
    ends = runs.local_starts + runs.lengths
    return [memory.buffer[start:end] for start, end in zip(runs.local_starts.tolist(), ends.tolist(), strict=True)]
