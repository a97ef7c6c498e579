"""Lane `nixl`: one-sided reads by NVIDIA's NIXL, over InfiniBand, RoCE, EFA, NVLink or what else its UCX finds.

The server registers its pool and hands the description of it (NIXL's metadata, which holds the keys of the memory)
to peers that show the token. The peer reads generations, blocks, and generations again; the server's processor takes
no part in it, apart from UCX's emulation where there is no remote memory access, such as over TCP.

A read writes into the local pool until the library says that it has ended. It cannot be taken back: releasing a
request that is in progress only asks UCX to cancel it, and UCX cancels no reads. So a transfer that is no longer
wanted gets a little time to end (GRACE_S), and then the whole agent is destroyed. Its UCX worker goes with it: what
software would have written is written by that worker's progress alone, and what a network card would have written
went through its queue pairs and the registration of our memory, which both end first. For that reason every session
has an agent of its own, and a peer that stalls never costs another peer's transfer.

NIXL reports neither a peer that stalls nor, over shared memory, one that died: deadlines are this lane's own, and the
connection of the greeting tells of deaths. Agents have random names: NIXL confuses a restarted peer with the one that
had its name before.
"""

import contextlib
import functools
import importlib
import logging
import secrets
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from baton.errors import ConfigurationError, TransferError
from kvtransfer.lanes.base import LaneClient, LaneEndpoint, LaneServer
from kvtransfer.lanes.copying import MAX_RUN_BYTES, Integers, Pieces, check_blocks, check_generations, coalesce
from kvtransfer.lanes.sessions import MAX_PEERS, Door, Session, SessionClient, finish, greet, has_ended
from kvtransfer.memory import PAGE_BYTES, PoolMemory, header_bytes

log = logging.getLogger(__name__)

NAME = "nixl"
PACKAGES = ("nixl_cu12", "nixl_cu13")
"""Either will do: only host memory is read, and neither needs a GPU or its driver for that."""
_GENERATIONS_A_PAGE = PAGE_BYTES // 8
_POOL = struct.Struct("<QQQ")  # address of the generations, num_blocks, block_bytes; the metadata follows
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 20e-6, 2e-3  # between two looks at a transfer
_UCX_CONFIG = "PROTO_EMULATION_ENABLE=n"
"""Only real remote memory access. Where there is none, such as over TCP, UCX would have the server's thread answer
reads, and a peer that goes away before it got its answer ends the server's process by a failed assertion."""
_PROGRESS_US = 10_000
"""The serving side's thread wakes up when there is something to do, and this often in case UCX forgot to wake it.
NIXL's own default is to spin, which takes a whole core from the engine while nobody transfers anything."""


class NixlLaneServer(LaneServer):
    name = NAME

    def __init__(self, host: str) -> None:
        """`host` is the address that peers greet this process at; NIXL's own traffic goes where UCX finds a way."""
        self._door = Door(NAME, host)
        self._agent: _Agent | None = None
        self._memory: PoolMemory | None = None  # stays mapped as long as peers may read it
        self._peers: list[socket.socket] = []

    def start(self, memory: PoolMemory) -> LaneEndpoint:
        self._memory = memory
        start = memory.generations.ctypes.data
        try:
            self._agent = _Agent(progress_thread=True)
            self._agent.register(start, header_bytes(memory.num_blocks) + memory.blocks.nbytes)
            answer = _POOL.pack(start, memory.num_blocks, memory.block_bytes) + self._agent.metadata()
        except TransferError as error:
            raise ConfigurationError(f"{error}; lane nixl is not served") from error
        return LaneEndpoint(NAME, self._door.open(memory.token, answer, self._enter), memory.token)

    def close(self) -> None:
        self._door.close()
        for peer in self._peers:
            peer.close()
        self._peers.clear()
        if self._agent is not None:
            self._agent.destroy()
            self._agent = self._memory = None

    def _enter(self, said: bytes, connection: socket.socket) -> None:
        for peer in [peer for peer in self._peers if has_ended(peer)]:
            self._peers.remove(peer)
            peer.close()
        if len(self._peers) < MAX_PEERS:
            self._peers.append(connection)
        else:
            log.warning("lane nixl: refused a peer, %d are connected", MAX_PEERS)
            connection.close()


def connect(endpoint: LaneEndpoint, local: PoolMemory, deadline: float) -> LaneClient:
    """Raises TransferError when NIXL is not installed, or the peer is not reached or has blocks of another size."""
    return SessionClient(NAME, local, lambda until: _NixlSession(endpoint, local, until), deadline)


class _NixlSession(Session):
    def __init__(self, endpoint: LaneEndpoint, local: PoolMemory, deadline: float) -> None:
        self._is_idle = False
        self._connection: socket.socket | None = None
        patience_s = deadline - time.monotonic()
        self._agent = _Agent(progress_thread=False)
        try:
            self._local_blocks = local.blocks.ctypes.data
            self._agent.register(self._local_blocks, local.blocks.nbytes)
            # Loading the library and registering a large pool take seconds, which are not the peer's.
            deadline = time.monotonic() + patience_s
            said, self._connection = greet(endpoint, b"", deadline)
            if len(said) < _POOL.size:
                raise TransferError("lane nixl: the peer does not say what its pool is")
            self._remote_start, self._num_blocks, block_bytes = _POOL.unpack_from(said)
            if block_bytes != local.block_bytes:
                raise TransferError(f"a block has {block_bytes} bytes at the peer and {local.block_bytes} here")
            self._remote_blocks = self._remote_start + header_bytes(self._num_blocks)
            if self._remote_blocks + self._num_blocks * block_bytes >= 1 << 63:
                raise TransferError("lane nixl: the pool that the peer states is in no address space")
            # The peer's header, as far as it has been read.
            self._generations = np.zeros(header_bytes(self._num_blocks) // 8, np.uint64)
            self._agent.register(self._generations.ctypes.data, self._generations.nbytes)
            self._agent.meet(said[_POOL.size :])
            self._look_at(np.zeros(1, np.int64), deadline, None)  # really reaches the peer
        except TransferError:
            self.close()
            raise

    @property
    def is_idle(self) -> bool:
        return self._is_idle

    def read(self, pieces: Pieces, deadline: float, cancelled: threading.Event | None) -> None:
        check_blocks(pieces.blocks, self._num_blocks)
        check_generations(self._look_at(pieces.blocks, deadline, cancelled), pieces)
        runs = coalesce(pieces.remote_starts, pieces.local_starts, pieces.lengths, MAX_RUN_BYTES)
        remote, local = self._remote_blocks + runs.remote_starts, self._local_blocks + runs.local_starts
        self._transfer(remote, local, runs.lengths, deadline, cancelled)
        check_generations(self._look_at(pieces.blocks, deadline, cancelled), pieces)

    def _look_at(self, blocks: Integers, deadline: float, cancelled: threading.Event | None) -> Integers:
        """The generations of these blocks, now. Read in whole pages of the header: many are neighbours."""
        starts = np.unique(blocks // _GENERATIONS_A_PAGE) * PAGE_BYTES
        lengths = np.full(len(starts), PAGE_BYTES, np.int64)
        here = self._generations.ctypes.data + starts
        self._transfer(self._remote_start + starts, here, lengths, deadline, cancelled)
        return self._generations[blocks]

    def _transfer(
        self, remote: Integers, local: Integers, lengths: Integers, deadline: float, cancelled: threading.Event | None
    ) -> None:
        """Read memory of the peer, by address, and wait for it."""
        pause_s = _SHORTEST_PAUSE_S

        def step() -> bool:
            nonlocal pause_s
            if self._agent.has_read():
                return True
            self._check_peer()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            return False

        self._is_idle = False
        self._check_peer()
        self._agent.begin_read(remote, local, lengths)
        try:
            finish(step, deadline, cancelled)
        finally:
            self._is_idle = not self._agent.is_reading

    def _check_peer(self) -> None:
        if self._connection is None or has_ended(self._connection):
            raise TransferError("the peer no longer serves its pool")

    def close(self) -> None:
        self._is_idle = False
        self._agent.destroy()
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _Library(NamedTuple):
    bindings: Any
    errors: tuple[type[Exception], ...]


@functools.cache
def _library() -> _Library:
    """What lies below NIXL's own Python class, which neither lets its thread sleep nor an agent be destroyed."""
    missing = ""
    for package in PACKAGES:
        try:
            bindings = importlib.import_module(f"{package}._bindings")
        except ImportError as error:
            missing = missing or str(error)
        else:
            own = (getattr(bindings, name) for name in dir(bindings) if name.endswith("Error"))
            return _Library(bindings, (RuntimeError, *own))
    raise TransferError(f"NIXL is not installed ({missing}): see docs/lanes.md, or take nixl out of --lanes")


@contextlib.contextmanager
def _as_transfer_errors() -> Iterator[None]:
    try:
        yield
    except _library().errors as error:
        raise TransferError(f"lane nixl: {type(error).__name__}: {error}") from error


class _Agent:
    """An agent of NIXL with its UCX backend and at most one read. Whatever NIXL raises becomes TransferError.

    Its native agent is in no other variable than `_native`, so that destroy() really destroys it.
    """

    def __init__(self, progress_thread: bool) -> None:
        """`progress_thread`: serve peers; otherwise UCX only gets on inside of calls."""
        bindings = _library().bindings
        config = bindings.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = progress_thread, _PROGRESS_US
        config.syncMode = bindings.NIXL_THREAD_SYNC_NONE
        self._peer = ""
        self._request: int | None = None
        with _as_transfer_errors():
            self._native = bindings.nixlAgent(f"baton-{secrets.token_hex(8)}", config)
            self._backends = [self._native.createBackend("UCX", {"engine_config": _UCX_CONFIG})]

    def register(self, start: int, num_bytes: int) -> None:
        """Let reads come into this memory, or peers read it."""
        bindings = _library().bindings
        with _as_transfer_errors():
            what = bindings.nixlRegDList(bindings.DRAM_SEG, [(start, num_bytes, 0, "")])
            self._native.registerMem(what, self._backends)

    def metadata(self) -> bytes:
        """What a peer needs to read what is registered here."""
        with _as_transfer_errors():
            return bytes(self._native.getLocalMD())

    def meet(self, metadata: bytes) -> None:
        """Whom to read from."""
        with _as_transfer_errors():
            self._peer = self._native.loadRemoteMD(metadata).decode()

    @property
    def is_reading(self) -> bool:
        return self._request is not None

    def begin_read(self, remote: Integers, local: Integers, lengths: Integers) -> None:
        """Addresses at the peer and here, and how many bytes of each."""
        bindings = _library().bindings
        with _as_transfer_errors():
            there, here = (
                bindings.nixlXferDList(bindings.DRAM_SEG, _descriptors(starts, lengths)) for starts in (remote, local)
            )
            self._request = self._native.createXferReq(bindings.NIXL_READ, here, there, self._peer, "", self._backends)
            self._native.postXferReq(self._request)

    def has_read(self) -> bool:
        """Whether the read has ended; this is also what keeps it going."""
        bindings = _library().bindings
        with _as_transfer_errors():
            state = self._native.getXferStatus(self._request)
            if state == bindings.NIXL_IN_PROG:
                return False
            self._native.releaseXferReq(self._request)
            self._request = None
        return True

    def destroy(self) -> None:
        """End everything: once it returns, nothing writes into registered memory any more."""
        if self._native is None:
            return
        if self._request is not None:
            with contextlib.suppress(*_library().errors):
                self._native.releaseXferReq(self._request)
            self._request = None
        gone = weakref.ref(self._native)
        self._native = None
        if gone() is not None:
            raise AssertionError("a native agent of NIXL outlived its owner: it may still write")


def _descriptors(starts: Integers, lengths: Integers) -> Integers:
    """Rows of address, bytes, device: what NIXL takes."""
    rows = np.zeros((len(starts), 3), np.uint64)
    rows[:, 0], rows[:, 1] = starts, lengths
    return rows
