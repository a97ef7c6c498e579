"""Lane `ucx`: blocks as UCX messages, through ucxx, over whatever transport UCX finds: InfiniBand, shared memory, TCP.

    tag REQUEST   num_reads u64 | num_reads x (block u64, generation u64, offset u64, length u64)
    tag ANSWER    status u64
    tag BLOCKS    a message for the bytes of each read, in order                 } only when the status is OK
    tag STATUS    status u64, once no message reads the pool any more            }

Tags of messages to the server carry the number that the peer gave itself when it greeted. The server is one thread
with one UCX worker for all its peers, asleep when none of them wants anything. It looks at the generations before the
first message of blocks and after the last one. A session on which anything goes wrong is closed.

Nothing of UCX's ever writes into the local pool: messages arrive in memory of the session's own and are copied from
there by the thread that pulls. A receive that has begun can neither be cancelled nor, where UCX cuts messages into
pieces as it does for TCP, be ended by closing its endpoint: it stays begun for ever, and so do its worker and a dozen
descriptors. Such a session is put aside with its memory, counted, and after MAX_UNFINISHED of them the lane is closed
to this process. It takes a peer that stalls in the middle of a message; a pull that is merely no longer wanted gets
time to end (GRACE_S).

RNDV_SCHEME is get_zcopy: large messages are fetched by the side that receives them. With put, the peer would write
into this process's memory, also long after it was stopped and given up.

UCX reports neither a peer that stalls nor, over some transports, one that died: deadlines are this lane's own, and
the connection of the greeting tells of deaths.
"""

import contextlib
import functools
import importlib
import logging
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from baton.errors import ConfigurationError, TransferError
from kvtransfer.lanes.base import ANY_GENERATION, LaneClient, LaneEndpoint, LaneServer
from kvtransfer.lanes.copying import Integers, Pieces
from kvtransfer.lanes.sessions import (
    GRACE_S,
    MAX_BATCH_BYTES,
    MAX_BATCH_READS,
    MAX_PEERS,
    Door,
    Session,
    SessionClient,
    finish,
    greet,
    has_ended,
)
from kvtransfer.memory import PoolMemory

log = logging.getLogger(__name__)

NAME = "ucx"
PACKAGES = ("ucxx",)
_CONFIG = {
    "RNDV_SCHEME": "get_zcopy",
    # Over TCP UCX cuts messages into 8 KiB: 1.2 GB/s for blocks of 256 KiB within a host, 3.0 with these.
    "TCP_TX_SEG_SIZE": "64k",
    "TCP_RX_SEG_SIZE": "64k",
}
_SEND_STALL_S = 10.0  # a receiver that takes nothing for so long is left
_WAIT_MS = 5  # between two looks at the clock while a pull waits
MAX_UNFINISHED = 8  # sessions of this process that could not be ended
_ANSWER, _BLOCKS, _STATUS = 1, 2, 3
_NUMBER = struct.Struct("<Q")  # of the peer; the address of its worker follows
_POOL = struct.Struct("<QQ")  # num_blocks, block_bytes; the address of the server's worker follows
_WANTED = np.dtype([("block", "<u8"), ("generation", "<u8"), ("offset", "<u8"), ("length", "<u8")])
_REQUEST = np.dtype([("num_reads", "<u8"), ("reads", _WANTED, MAX_BATCH_READS)])
Wanted = npt.NDArray[np.void]
Bytes = npt.NDArray[np.uint8]
_OK, _BAD_REQUEST, _STALE = range(3)
_REASONS = {
    _BAD_REQUEST: "lane ucx: the peer has no such blocks",
    _STALE: "a block of the peer no longer holds what was offered",
}


class UcxLaneServer(LaneServer):
    name = NAME

    def __init__(self, host: str) -> None:
        """`host` is the address that peers greet this process at; UCX's own traffic goes where it finds a way."""
        self._door = Door(NAME, host)
        self._service: _Service | None = None

    def start(self, memory: PoolMemory) -> LaneEndpoint:
        try:
            self._service = _Service(memory)
        except TransferError as error:
            raise ConfigurationError(f"{error}; lane ucx is not served") from error
        answer = _POOL.pack(memory.num_blocks, memory.block_bytes) + self._service.worker.address()
        return LaneEndpoint(NAME, self._door.open(memory.token, answer, self._service.enter), memory.token)

    def close(self) -> None:
        self._door.close()
        if self._service is not None:
            self._service.stop()
            self._service = None


class _Service:
    """The serving thread. It alone touches the worker and the peers."""

    def __init__(self, memory: PoolMemory) -> None:
        self.worker = _Worker()
        self._memory = memory
        self._newcomers: deque[tuple[bytes, socket.socket]] = deque()
        self._peers: dict[int, _Peer] = {}
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="lane-ucx-serve", daemon=True)
        self._thread.start()

    def enter(self, said: bytes, connection: socket.socket) -> None:
        """A peer has greeted. Called on the door's thread."""
        self._newcomers.append((said, connection))
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._serve()
        except TransferError as error:
            log.error("lane ucx is served no longer: %s", error)
        finally:
            for peer in self._peers.values():
                peer.close()
            for _, connection in self._newcomers:
                connection.close()
            self.worker.destroy()

    def _serve(self) -> None:
        self.worker.progress()
        while self._newcomers:
            self._admit(*self._newcomers.popleft())
        for number, peer in list(self._peers.items()):
            try:
                peer.step()
            except TransferError as error:
                log.debug("lane ucx: a peer left: %s", error)
                del self._peers[number]
                peer.close()
        # Without end while nobody asks for anything; the clock matters while somebody takes nothing.
        timeout_ms = 1000 if any(peer.is_sending for peer in self._peers.values()) else None
        self.worker.wait([self._wake, *(peer.connection for peer in self._peers.values())], timeout_ms)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _admit(self, said: bytes, connection: socket.socket) -> None:
        try:
            if len(said) <= _NUMBER.size or len(self._peers) >= MAX_PEERS:
                raise TransferError(f"it said {len(said)} bytes, and {len(self._peers)} are connected")
            (number,) = _NUMBER.unpack_from(said)
            if number in self._peers:
                raise TransferError("it has the number of another peer")
            self._peers[number] = _Peer(self.worker, said[_NUMBER.size :], number, connection, self._memory)
        except TransferError as error:
            log.warning("lane ucx: a peer was not let in: %s", error)
            connection.close()


class _Peer:
    """A peer of the server: one request at a time, a step further whenever something has arrived or left."""

    def __init__(
        self, worker: "_Worker", address: bytes, number: int, connection: socket.socket, memory: PoolMemory
    ) -> None:
        self.connection = connection
        self._memory = memory
        self._endpoint = worker.connect(address)
        self._number = number
        self._request = np.zeros(1, _REQUEST)
        self._arriving = self._endpoint.receive(self._request, number)
        self._wanted = self._request["reads"][0][:0]
        self._leaving: deque[_Message] = deque()
        self._moved_at = 0.0

    @property
    def is_sending(self) -> bool:
        return bool(self._leaving)

    def step(self) -> None:
        """As far as it goes now. Raises TransferError when the peer is to be left."""
        if has_ended(self.connection):
            raise TransferError("its connection ended")
        while not self._is_waiting():
            if len(self._wanted):
                self._end()
            else:
                self._begin()

    def _is_waiting(self) -> bool:
        """Whether the next thing to do is the peer's: to take what leaves, or to ask for something."""
        before = len(self._leaving)
        while self._leaving and self._leaving[0].has_ended():
            self._leaving.popleft()
        if len(self._leaving) < before:
            self._moved_at = time.monotonic()
        elif self._leaving and time.monotonic() - self._moved_at > _SEND_STALL_S:
            raise TransferError(f"it took nothing for {_SEND_STALL_S:.0f} s")
        return bool(self._leaving) or not (len(self._wanted) or self._arriving.has_ended())

    def _begin(self) -> None:
        """A request is here: say whether it can be served, and serve it."""
        num_reads = int(self._request["num_reads"][0])
        self._wanted = self._request["reads"][0][: min(num_reads, MAX_BATCH_READS)].copy()
        fits = num_reads <= MAX_BATCH_READS and _is_inside(self._memory, self._wanted)
        status = _judge(self._memory, self._wanted) if fits else _BAD_REQUEST
        self._arriving = self._endpoint.receive(self._request, self._number)
        self._moved_at = time.monotonic()
        self._say(status, _ANSWER)
        if status != _OK:
            self._wanted = self._wanted[:0]
            return
        starts = self._wanted["block"] * np.uint64(self._memory.block_bytes) + self._wanted["offset"]
        for part in _ranges(self._memory, starts, self._wanted["length"]):
            self._leaving.append(self._endpoint.send(part, _BLOCKS))

    def _end(self) -> None:
        """The blocks have left: no message reads the pool any more."""
        self._say(_judge(self._memory, self._wanted), _STATUS)
        self._wanted = self._wanted[:0]

    def _say(self, status: int, tag: int) -> None:
        self._leaving.append(self._endpoint.send(np.array([status], "<u8"), tag))

    def close(self) -> None:
        self._endpoint.close()
        self.connection.close()


def _is_inside(memory: PoolMemory, wanted: Wanted) -> bool:
    """Whether every read lies in a block of the pool."""
    lengths = wanted["length"]
    if not len(wanted):
        return True
    if wanted["block"].max() >= memory.num_blocks or lengths.min() == 0 or lengths.max() > memory.block_bytes:
        return False
    # Never offset + length, which could wrap round.
    return bool((wanted["offset"] <= np.uint64(memory.block_bytes) - lengths).all())


def _judge(memory: PoolMemory, wanted: Wanted) -> int:
    fits = memory.generations[wanted["block"]] == wanted["generation"]
    fits |= wanted["generation"] == ANY_GENERATION
    return _OK if bool(fits.all()) else _STALE


def _ranges(memory: PoolMemory, starts: Integers, lengths: Integers) -> list[memoryview]:
    return [memory.buffer[start:end] for start, end in zip(starts.tolist(), (starts + lengths).tolist(), strict=True)]


def connect(endpoint: LaneEndpoint, local: PoolMemory, deadline: float) -> LaneClient:
    """Raises TransferError when ucxx is not installed, or the peer is not reached or has blocks of another size."""
    return SessionClient(NAME, local, lambda until: _UcxSession(endpoint, local, until), deadline)


class _Awaited(NamedTuple):
    """A message on its way, and where in the local pool it is copied once it is here."""

    message: "_Message"
    target: Bytes | None = None


class _UcxSession(Session):
    def __init__(self, endpoint: LaneEndpoint, local: PoolMemory, deadline: float) -> None:
        self._is_idle = False
        self._pool = local.blocks.reshape(-1)
        self._block_bytes = local.block_bytes
        self._staging = np.empty(max(MAX_BATCH_BYTES, local.block_bytes), np.uint8)
        self._awaited: deque[_Awaited] = deque()
        self._endpoint: _Endpoint | None = None
        self._connection: socket.socket | None = None
        self._number = secrets.randbits(62) | 1 << 62  # larger than any tag that the server sends with
        _check_unfinished()
        patience_s = deadline - time.monotonic()
        self._worker = _Worker()
        try:
            # Loading the library takes a second, which is not the peer's.
            deadline = time.monotonic() + patience_s
            say = _NUMBER.pack(self._number) + self._worker.address()
            said, self._connection = greet(endpoint, say, deadline)
            if len(said) <= _POOL.size:
                raise TransferError("lane ucx: the peer does not say what its pool is")
            _, block_bytes = _POOL.unpack_from(said)
            if block_bytes != local.block_bytes:
                raise TransferError(f"a block has {block_bytes} bytes at the peer and {local.block_bytes} here")
            self._endpoint = self._worker.connect(said[_POOL.size :])
            self.read(Pieces.of([], local), deadline, None)  # really reaches the peer
        except TransferError:
            self.close()
            raise

    @property
    def is_idle(self) -> bool:
        return self._is_idle

    def read(self, pieces: Pieces, deadline: float, cancelled: threading.Event | None) -> None:
        self._is_idle = False
        status = np.full(2, _OK, "<u8")  # the answer, and what follows the blocks
        self._ask(pieces, status)
        try:
            finish(lambda: self._step(status), deadline, cancelled)
        finally:
            self._is_idle = not self._awaited
        _check_status(status[1])

    def _ask(self, pieces: Pieces, status: Integers) -> None:
        if self._endpoint is None:
            raise TransferError("lane ucx: the session is closed")
        request = np.zeros(1, _REQUEST)
        wanted = request["reads"][0][: len(pieces.blocks)]
        request["num_reads"] = len(wanted)
        wanted["block"], wanted["generation"] = pieces.blocks, pieces.generations
        wanted["offset"] = pieces.remote_starts - pieces.blocks * self._block_bytes
        wanted["length"] = pieces.lengths
        self._awaited.append(_Awaited(self._endpoint.receive(status[:1], _ANSWER)))
        ends = np.cumsum(pieces.lengths).tolist()
        for start, end, length in zip(pieces.local_starts.tolist(), ends, pieces.lengths.tolist(), strict=True):
            message = self._endpoint.receive(self._staging[end - length : end], _BLOCKS)
            self._awaited.append(_Awaited(message, self._pool[start : start + length]))
        if len(wanted):
            self._awaited.append(_Awaited(self._endpoint.receive(status[1:], _STATUS)))
        size = 8 + len(wanted) * _WANTED.itemsize
        self._awaited.append(_Awaited(self._endpoint.send(request.view(np.uint8)[:size], self._number)))

    def _step(self, status: Integers) -> bool:
        """Whether everything is here; waits for some of it."""
        self._worker.progress()
        while self._awaited and self._awaited[0].message.has_ended():
            message, target = self._awaited.popleft()
            if target is not None:
                np.copyto(target, message.data)
            _check_status(status[0])  # unless it is OK, nothing more will come
        if not self._awaited:
            return True
        if self._connection is None or has_ended(self._connection):
            raise TransferError("lane ucx lost the peer")
        self._worker.wait([self._connection], _WAIT_MS)
        return False

    def close(self) -> None:
        self._is_idle = False
        if self._endpoint is not None:
            self._endpoint.close()
        unfinished = self._drain()
        if unfinished:
            _unfinished.append((self._worker, self._endpoint, unfinished))
            count = len(_unfinished)
            log.warning("lane ucx: a peer stalled within a message; %d of %d such are endured", count, MAX_UNFINISHED)
        else:
            self._worker.destroy()
        self._awaited.clear()
        self._endpoint = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _drain(self) -> list["_Message"]:
        """The messages that have not ended shortly after their endpoint was closed."""
        give_up = time.monotonic() + GRACE_S
        while unfinished := [awaited.message for awaited in self._awaited if not awaited.message.is_over]:
            try:
                self._worker.progress()
                self._worker.wait([], 1)
            except TransferError as error:
                log.debug("lane ucx: %s", error)
                break
            if time.monotonic() > give_up:
                break
        return unfinished


def _check_status(status: int) -> None:
    if status != _OK:
        raise TransferError(_REASONS.get(int(status), f"lane ucx: the peer answered {status}"))


_unfinished: list[tuple["_Worker", "_Endpoint | None", list["_Message"]]] = []
"""What holds the memory that UCX might still write into. Nobody makes progress on these workers, so it does not."""


def _check_unfinished() -> None:
    if len(_unfinished) >= MAX_UNFINISHED:
        raise TransferError(
            f"lane ucx: {len(_unfinished)} peers stalled within a message, which UCX cannot end; "
            "this worker uses the lane again after a restart"
        )


class _Library(NamedTuple):
    ucx: Any
    """ucxx's layer below asyncio, whose event loop would have to spin or to wait for a thread."""
    array: Any
    tag: Any
    errors: tuple[type[Exception], ...]


@functools.cache
def _library() -> _Library:
    before = set(os.environ)
    try:
        ucx = importlib.import_module("ucxx._lib.libucxx")
        array = importlib.import_module("ucxx._lib.arr").Array
    except ImportError as error:
        raise TransferError(
            f"ucxx is not installed ({error}): see docs/lanes.md, or take ucx out of --lanes"
        ) from error
    finally:
        # ucxx sets what suits GPUs, for every UCX in this process and its children: NIXL's would find no way any more.
        for name in [name for name in os.environ if name.startswith("UCX_") and name not in before]:
            del os.environ[name]
    return _Library(ucx, array, ucx.UCXXTag, (ucx.UCXError, RuntimeError))


@contextlib.contextmanager
def _as_transfer_errors() -> Iterator[None]:
    try:
        yield
    except _library().errors as error:
        raise TransferError(f"lane ucx: {type(error).__name__}: {error}") from error


class _Worker:
    """A context and a worker of UCX, for one thread. Whatever UCX raises becomes TransferError."""

    def __init__(self) -> None:
        ucx = _library().ucx
        with _as_transfer_errors():
            self._context = ucx.UCXContext(_CONFIG, (ucx.Feature.TAG, ucx.Feature.WAKEUP))
            self._native = ucx.UCXWorker(self._context)
            self._native.init_blocking_progress_mode()
            self._events = self._native.epoll_file_descriptor

    def address(self) -> bytes:
        return bytes(self._native.address)

    def connect(self, address: bytes) -> "_Endpoint":
        ucx = _library().ucx
        with _as_transfer_errors():
            where = ucx.UCXAddress.create_from_buffer(address)
            return _Endpoint(self._native.create_endpoint_from_worker_address(where, True))

    def progress(self) -> None:
        with _as_transfer_errors():
            self._native.progress()

    def wait(self, others: Sequence[int | socket.socket], timeout_ms: int | None) -> None:
        """Sleep until there is progress to be made, or one of the others becomes readable."""
        with _as_transfer_errors():
            if not self._native.arm():
                return
        poller = select.poll()
        for source in (self._events, *others):
            poller.register(source, select.POLLIN)
        poller.poll(timeout_ms)

    def destroy(self) -> None:
        self._native = self._context = None


class _Endpoint:
    def __init__(self, native: Any) -> None:
        self._native = native

    def send(self, data: Any, tag: int) -> "_Message":
        return self._post(self._native.tag_send, data, tag)

    def receive(self, into: Any, tag: int) -> "_Message":
        return self._post(self._native.tag_recv, into, tag)

    def _post(self, post: Callable[[Any, Any], Any], data: Any, tag: int) -> "_Message":
        library = _library()
        with _as_transfer_errors():
            return _Message(post(library.array(data), library.tag(tag)), data)

    def close(self) -> None:
        """By force: every message of it ends, with an error where it was on its way."""
        with contextlib.suppress(*_library().errors):
            self._native.close_blocking()


class _Message:
    """One that is being sent or received. It keeps its memory alive, which ucxx does not."""

    def __init__(self, request: Any, data: Any) -> None:
        self._request = request
        self.data = data

    @property
    def is_over(self) -> bool:
        """UCX touches its memory no more, whether it arrived or not."""
        return bool(self._request.completed)

    def has_ended(self) -> bool:
        """Raises TransferError for one that did not arrive."""
        if not self.is_over:
            return False
        with _as_transfer_errors():
            self._request.check_error()
        return True
