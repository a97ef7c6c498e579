"""Lane `tcp`: blocks over plain sockets, gathered from one pool and scattered into the other without a copy between.

    request   token u64 | num_reads u32 | zero u32 | num_reads x (block u64, generation u64, offset u64, length u64)
    answer    status u32 | zero u32 | block_bytes u64
              the bytes read in the order of the request   } only when the status is OK
              status u32                                   }

The server looks at the generations before it sends and again after the last byte has left the pool; the second
status tells what it found. A request of no reads is a probe. Every number is little-endian. A connection on which
anything goes wrong is closed, because nobody can say which bytes come next.
"""

import contextlib
import logging
import socket
import struct
import threading
import time
from collections.abc import Sequence

import numpy as np

from baton.errors import ConfigurationError, TransferError
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
from kvtransfer.memory import PoolMemory

log = logging.getLogger(__name__)

NAME = "tcp"
MAX_CONNECTIONS = 256  # a server's; each has a thread
MAX_PARALLEL_PULLS = 4  # a client's; each has a connection
MAX_REQUEST_READS = 1024
MAX_REQUEST_BYTES = 64 << 20
_MAX_VECTORS = 64  # memory ranges in one system call
_SEND_STALL_S = 10.0  # a receiver that takes nothing for so long loses its connection
_JOIN_S = 2.0
_LOCAL_BUFFER_BYTES = 256 << 10

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

    def __init__(self, host: str) -> None:
        """`host` is the address that peers reach this process at."""
        self._host = host
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._connections: dict[socket.socket, threading.Thread] = {}
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
            connections = dict(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in connections.values():
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
                if self._closing.is_set() or len(self._connections) >= MAX_CONNECTIONS:
                    log.warning("lane tcp: refused a connection, %d are open", len(self._connections))
                    connection.close()
                    continue
                thread = threading.Thread(
                    target=self._serve, args=(connection, memory), name="lane-tcp-peer", daemon=True
                )
                self._connections[connection] = thread
            thread.start()

    def _serve(self, connection: socket.socket, memory: PoolMemory) -> None:
        try:
            _tune(connection)
            # A host that lost power never closes its connection: keepalive ends the wait for its next request.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(_SEND_STALL_S))
            while _answer(connection, memory):
                pass
        except OSError as error:
            log.debug("lane tcp: a connection ended: %s", error)
        finally:
            with self._lock:
                self._connections.pop(connection, None)
            connection.close()


def _answer(connection: socket.socket, memory: PoolMemory) -> bool:
    """Serve one request; False when the connection is to be closed."""
    head = connection.recv(_REQUEST.size, socket.MSG_WAITALL)
    if len(head) < _REQUEST.size:
        return False
    token, num_reads, _ = _REQUEST.unpack(head)
    status = _OK if token == memory.token else _BAD_TOKEN
    if num_reads > MAX_REQUEST_READS:
        status = status or _BAD_REQUEST
    if status == _OK:
        body = connection.recv(num_reads * _WANTED.itemsize, socket.MSG_WAITALL) if num_reads else b""
        if len(body) < num_reads * _WANTED.itemsize:
            return False
        wanted = np.frombuffer(body, _WANTED)
        status = _OK if _is_inside(wanted, memory) else _BAD_REQUEST
        status = status or _judge(memory, wanted)
    connection.sendall(_ANSWER.pack(status, 0, memory.block_bytes))
    if status != _OK:
        return False
    if num_reads:
        starts = wanted["block"] * np.uint64(memory.block_bytes) + wanted["offset"]
        _send_all(connection, _ranges(memory, starts, wanted["length"]))
        status = _judge(memory, wanted)
    connection.sendall(_STATUS.pack(status))
    return status == _OK


def _is_inside(wanted: np.ndarray, memory: PoolMemory) -> bool:
    """Whether every read lies in a block, and all together are no more than one request may ask for."""
    lengths, block_bytes = wanted["length"], memory.block_bytes
    if not len(wanted):
        return True
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

    def __init__(self, endpoint: LaneEndpoint, local: PoolMemory) -> None:
        host, _, port = endpoint.address.rpartition(":")
        self._address = (host, int(port))
        self._token = endpoint.token
        self._local = local
        self._idle: list[socket.socket] = []
        self._slots = threading.BoundedSemaphore(MAX_PARALLEL_PULLS)

    @classmethod
    def connect(cls, endpoint: LaneEndpoint, local: PoolMemory, deadline: float) -> "TcpLaneClient":
        """Reach the peer and compare the size of a block. Raises TransferError."""
        try:
            client = cls(endpoint, local)
        except ValueError as error:
            raise TransferError(f"lane tcp: '{endpoint.address}' is not host:port") from error
        client._request(Pieces.of([], local), deadline, None)
        return client

    def pull(self, reads: Sequence[BlockRead], deadline: float, cancelled: threading.Event | None = None) -> None:
        pieces = Pieces.of(reads, self._local)
        for part in batches(pieces.lengths, MAX_REQUEST_READS, MAX_REQUEST_BYTES):
            self._request(pieces.part(part), deadline, cancelled)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _request(self, pieces: Pieces, deadline: float, cancelled: threading.Event | None) -> None:
        while not self._slots.acquire(timeout=POLL_S):
            check_still_wanted(deadline, cancelled)
        try:
            connection = self._idle.pop() if self._idle else self._dial(deadline)
            try:
                self._exchange(connection, pieces, deadline, cancelled)
            except (OSError, TransferError):
                connection.close()
                raise
            self._idle.append(connection)
        except OSError as error:
            raise TransferError(f"lane tcp lost the peer: {error}") from error
        finally:
            self._slots.release()

    def _dial(self, deadline: float) -> socket.socket:
        connection = socket.create_connection(self._address, timeout=max(0.001, deadline - time.monotonic()))
        connection.settimeout(None)
        # The kernel's own timeout, not Python's: one system call then fills many blocks, without a poll before each.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(POLL_S))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(1.0))
        _tune(connection)
        return connection

    def _exchange(
        self,
        connection: socket.socket,
        pieces: Pieces,
        deadline: float,
        cancelled: threading.Event | None,
    ) -> None:
        wanted = np.empty(len(pieces.blocks), _WANTED)
        wanted["block"], wanted["generation"] = pieces.blocks, pieces.generations
        wanted["offset"] = pieces.remote_starts - pieces.blocks * self._local.block_bytes
        wanted["length"] = pieces.lengths
        connection.sendall(_REQUEST.pack(self._token, len(wanted), 0) + wanted.tobytes())
        head = bytearray(_ANSWER.size)
        _receive_all(connection, [memoryview(head)], deadline, cancelled)
        status, _, block_bytes = _ANSWER.unpack(head)
        if status != _OK:
            raise TransferError(_REASONS.get(status, f"lane tcp: the peer answered {status}"))
        if block_bytes != self._local.block_bytes:
            raise TransferError(f"a block has {block_bytes} bytes at the peer and {self._local.block_bytes} here")
        ranges = _ranges(self._local, pieces.local_starts, pieces.lengths)
        tail = bytearray(_STATUS.size)
        _receive_all(connection, [*ranges, memoryview(tail)], deadline, cancelled)
        (status,) = _STATUS.unpack(tail)
        if status != _OK:
            raise TransferError(_REASONS.get(status, f"lane tcp: the peer answered {status}"))


def _ranges(memory: PoolMemory, starts: Integers, lengths: Integers) -> list[memoryview]:
    """These bytes of the pool in this order, neighbours joined."""
    runs = coalesce(starts, starts, lengths, MAX_RUN_BYTES)
    ends = runs.local_starts + runs.lengths
    return [memory.buffer[start:end] for start, end in zip(runs.local_starts.tolist(), ends.tolist(), strict=True)]


def _send_all(connection: socket.socket, parts: list[memoryview]) -> None:
    """Write every part; the socket's own timeout ends a stall with BlockingIOError."""
    while parts:
        _advance(parts, connection.sendmsg(parts[:_MAX_VECTORS]))


def _receive_all(
    connection: socket.socket, parts: list[memoryview], deadline: float, cancelled: threading.Event | None
) -> None:
    """Fill every part in order, looking at the clock and the cancellation every POLL_S."""
    while parts:
        check_still_wanted(deadline, cancelled)
        try:
            count = connection.recvmsg_into(parts[:_MAX_VECTORS], 0, socket.MSG_WAITALL)[0]
        except BlockingIOError:  # SO_RCVTIMEO
            continue
        if count == 0:
            raise TransferError("lane tcp: the peer closed the connection")
        _advance(parts, count)


def _advance(parts: list[memoryview], count: int) -> None:
    """Drop the first `count` bytes of `parts`, in place."""
    done = 0
    while done < len(parts) and count >= len(parts[done]):
        count -= len(parts[done])
        done += 1
    del parts[:done]
    if count:
        parts[0] = parts[0][count:]


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if connection.getpeername()[0] == connection.getsockname()[0]:
        # Within one host small buffers stay in cache: 4.4 GB/s against 3.0 with what the kernel chooses. Between
        # hosts the kernel's own tuning follows the delay of the network.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOCAL_BUFFER_BYTES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _LOCAL_BUFFER_BYTES)


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
