"""Zero-copy hand-over on one host: a prefill worker computes straight into blocks that a decode worker has reserved.

The decode worker connects to an abstract Unix socket of the prefill worker, shows the token, and hands over a writable
descriptor of its pool, which is mapped there behind the prefill worker's own blocks (`PoolMemory.map_peer`). From then
on its Want names the blocks that it reserved, and no byte needs to be moved.

Who may write where is a matter of two signs. A reservation is *fenced* from the moment the Want is sent until

1. the prefill worker says that it has stopped writing into it, or never began (`Written.stopped`), or
2. the connection of the Unix socket has ended. The prefill worker closes it only when nothing there writes any more and
   the pool is unmapped; the kernel closes it when the process is gone, after its last thread ran. A process that is
   merely stopped keeps it open, and keeps the fence up.

So the connection carries nothing after the greeting: its end is the message.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np

from baton.errors import ConfigurationError, TransferError
from baton.v1 import handover_pb2 as pb
from kvtransfer.lanes.base import LaneEndpoint, OtherHostError
from kvtransfer.lanes.host import boot_id
from kvtransfer.memory import PeerBlocks, PoolMemory
from kvtransfer.wire import PeerIdentity, spawn

log = logging.getLogger(__name__)

NAME = "direct"
MAX_POOLS = 256
_GREETING_TIMEOUT_S = 1.0
_GREETING = struct.Struct(
    "<QQQQQ"
)  # token, incarnation of the pool's owner, number of the lending, num_blocks, block_bytes
_ACCEPTED = b"+"
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred


@dataclass(slots=True, eq=False)
class LentPool:
    """A decode worker's pool, as the worker that may write into it has it."""

    connection: socket.socket
    incarnation: int
    lending: int
    blocks: PeerBlocks
    num_writers: int = 0
    """Hand-overs that may be written into it."""
    ended: bool = False
    """Its owner wants it back, or is dead: it is given back when the last writer has stopped."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Blocks that a hand-over may be computed into, numbered as in the writer's memory; the first are only read."""

    block_ids: tuple[int, ...]
    num_cached_blocks: int
    pool: LentPool


class DirectServer:
    """The writing side: maps the pools that decode workers lend. Every method is called on the event loop's thread."""

    def __init__(self, memory: PoolMemory) -> None:
        """`memory`: has room for blocks of peers."""
        self._memory = memory
        self._pools: list[LentPool] = []
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> LaneEndpoint:
        """Begin to accept pools. Raises ConfigurationError where this host cannot."""
        name = f"baton-kv-{secrets.token_hex(16)}"
        try:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            listener.bind("\0" + name)
            listener.listen(64)
        except OSError as error:
            raise ConfigurationError(f"direct hand-over cannot be served on this host: {error}") from error
        self._listener = listener
        self._spawn(self._accept(listener))
        return LaneEndpoint(NAME, f"{boot_id()}/{name}", self._memory.token)

    async def close(self) -> None:
        """Accept no more, and give back what is not written into. The end of the process gives back the rest."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        for pool in list(self._pools):
            self._end(pool)
            if pool.num_writers:
                pool.connection.detach()  # for the kernel to close, whatever this process still does

    def lends(self, peer: PeerIdentity) -> bool:
        """Whether a Want of that worker can be expected to name blocks to write into."""
        return any(pool.incarnation == peer.incarnation and not pool.ended for pool in self._pools)

    def place(self, peer: PeerIdentity, want: pb.Want) -> Placed | None:
        """Where the peer wants a hand-over written, which `done` must follow; None where that is not possible.

        Its blocks must be of a pool that the same life of the same worker has lent, and have the generations stated.
        """
        ids = np.array(want.placement.block_ids, np.int64)
        for pool in self._pools:
            blocks = pool.blocks
            if pool.ended or (pool.incarnation, pool.lending) != (peer.incarnation, want.placement.lending):
                continue
            if len(ids) != len(want.placement.generations) or len(np.unique(ids)) != len(ids) or not len(ids):
                return None
            generations = np.array(want.placement.generations, np.uint64)
            if ids.max() >= blocks.num_blocks or (blocks.generations[ids] != generations).any():
                return None
            pool.num_writers += 1
            return Placed(tuple((ids + blocks.first_block).tolist()), want.first_block, pool)
        return None

    def done(self, pool: LentPool) -> None:
        """One hand-over is not written any more."""
        pool.num_writers -= 1
        self._give_back(pool)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            pool = None
            try:
                pool = await self._admit(connection)
            except (OSError, TransferError) as error:
                log.warning("direct hand-over: a worker's pool was not accepted: %s", error)
            if pool is None:
                connection.close()
            else:
                self._spawn(asyncio.to_thread(self._memory.touch_peer, pool.blocks))

    async def _admit(self, connection: socket.socket) -> LentPool:
        """Map the pool that a process of the same user, which knows the token, hands over."""
        connection.settimeout(_GREETING_TIMEOUT_S)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(credentials)[1] != os.geteuid():
            raise TransferError("it is another user's")
        greeting, fds, _, _ = await asyncio.to_thread(socket.recv_fds, connection, _GREETING.size, 1)
        try:
            if len(greeting) != _GREETING.size or len(fds) != 1:
                raise TransferError("the worker did not greet")
            token, incarnation, lending, num_blocks, block_bytes = _GREETING.unpack(greeting)
            if token != self._memory.token:
                raise TransferError("it showed a wrong token")
            if block_bytes != self._memory.block_bytes:
                raise TransferError(f"its blocks have {block_bytes} bytes and those here {self._memory.block_bytes}")
            if len(self._pools) >= MAX_POOLS:
                raise TransferError(f"{MAX_POOLS} are mapped already")
            pool = LentPool(connection, incarnation, lending, self._memory.map_peer(fds[0], num_blocks))
        finally:
            for fd in fds:
                os.close(fd)
        self._pools.append(pool)
        connection.setblocking(False)
        asyncio.get_running_loop().add_reader(connection.fileno(), self._end, pool)
        try:
            connection.send(_ACCEPTED)
        except OSError:
            self._end(pool)
            raise
        return pool

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = spawn(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _end(self, pool: LentPool) -> None:
        """Its owner said something, which it does only by leaving."""
        if not pool.ended:
            pool.ended = True
            asyncio.get_running_loop().remove_reader(pool.connection.fileno())
            self._give_back(pool)

    def _give_back(self, pool: LentPool) -> None:
        if pool.ended and pool.num_writers == 0:
            self._pools.remove(pool)
            self._memory.unmap_peer(pool.blocks)
            pool.connection.close()  # last: this says that nothing writes any more


class Lending:
    """The lending side: one pool in one peer's hands, and what that peer may be writing into."""

    def __init__(self, connection: socket.socket, number: int) -> None:
        self.number = number
        """Random. The same pool is lent anew over every connection, and each has its own end."""
        self.ended = False
        self._is_watched = False
        self._connection = connection
        self._fences: dict[str, asyncio.Future[None]] = {}
        self._on_end: Callable[[Lending, list[str]], None] = lambda lending, fenced: None

    @classmethod
    def connect(cls, endpoint: LaneEndpoint, memory: PoolMemory, me: PeerIdentity, deadline: float) -> "Lending":
        """Hand the pool over. Blocks; raises TransferError where that is not possible, such as on another host."""
        host, _, name = endpoint.address.rpartition("/")
        if host != boot_id():
            raise OtherHostError("direct hand-over: the peer is on another host")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            connection.connect("\0" + name)
            number, shape = secrets.randbits(64), (memory.num_blocks, memory.block_bytes)
            socket.send_fds(connection, [_GREETING.pack(endpoint.token, me.incarnation, number, *shape)], [memory.fd])
            if connection.recv(1) != _ACCEPTED:
                raise TransferError("direct hand-over: the peer refused")
            connection.setblocking(False)
        except OSError as error:
            connection.close()
            raise TransferError(f"direct hand-over: the peer is not reached: {error}") from error
        except TransferError:
            connection.close()
            raise
        return cls(connection, number)

    def watch(self, on_end: "Callable[[Lending, list[str]], None]") -> None:
        """on_end(lending, hand-overs whose fence was up): once, when the peer can write no more."""
        self._on_end = on_end
        self._is_watched = True
        asyncio.get_running_loop().add_reader(self._connection.fileno(), self._read)

    def fence(self, handover_id: str) -> "asyncio.Future[None]":
        """The peer is about to be allowed to write; done when it certainly does not any more."""
        future = self._fences[handover_id] = asyncio.get_running_loop().create_future()
        return future

    def is_fenced(self, handover_id: str) -> bool:
        return handover_id in self._fences

    def stopped(self, handover_id: str) -> None:
        """The peer says that it does not write into this one, now or later."""
        if (future := self._fences.pop(handover_id, None)) is not None:
            future.set_result(None)

    def recall(self) -> None:
        """Ask for the pool back. Fences fall when the peer has let go of it, however long that takes."""
        if not self._is_watched:
            self._connection.close()
        elif not self.ended:
            with contextlib.suppress(OSError):  # it has left already
                self._connection.shutdown(socket.SHUT_WR)

    def abandon(self) -> None:
        """This process ends, and its pool with it: whatever is still written, nobody reads it."""
        if not self.ended:
            self._end()

    def _read(self) -> None:
        try:
            if self._connection.recv(1) != b"":
                return
        except BlockingIOError:
            return
        except OSError as error:
            log.debug("the peer has left: %s", error)
        self._end()

    def _end(self) -> None:
        self.ended = True
        asyncio.get_running_loop().remove_reader(self._connection.fileno())
        self._connection.close()
        fenced = list(self._fences)
        for handover_id in fenced:
            self.stopped(handover_id)
        self._on_end(self, fenced)
