"""Lane `shm`: peers on one host map each other's pool read-only and copy blocks out of it, one copy in all.

A peer connects to an abstract Unix socket, shows the token, and is handed a read-only descriptor of the pool. The
connection then stays open and carries nothing: its end tells the peer that the pool is no longer served. The address
is `boot id/name`: a peer on another host sees that it is one. Abstract names live in a network namespace, so a peer in
a container with its own network finds nobody there and takes the next lane.

A new mapping has no page tables, and the first copy out of each page would wait for them: twice the time of a copy for
256 KiB blocks, eight times for 4 KiB. So they are made when the peer connects.
"""

import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence

from baton.errors import ConfigurationError, TransferError
from kvtransfer.lanes.base import BlockRead, LaneClient, LaneEndpoint, LaneServer, OtherHostError
from kvtransfer.lanes.copying import copy_blocks
from kvtransfer.lanes.host import boot_id
from kvtransfer.memory import PoolMemory

log = logging.getLogger(__name__)

NAME = "shm"
MAX_PEERS = 1024
_TOUCH_S = 0.1  # at connecting, for 2 GiB in small pages, 15 in huge ones; the rest comes with the first copies
_TOUCH_BYTES = 64 << 10  # what the kernel maps at a time around a page that is missing (fault_around_bytes)
_GREETING_TIMEOUT_S = 1.0  # a peer sends its token as soon as it is connected
_TOKEN = struct.Struct("<Q")
_SHAPE = struct.Struct("<QQ")  # num_blocks, block_bytes
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred


class ShmLaneServer(LaneServer):
    name = NAME

    def __init__(self) -> None:
        self.more = b""
        """What a peer is told besides, for a lane that meets its peers in the same way."""
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._peers: list[socket.socket] = []

    def start(self, memory: PoolMemory) -> LaneEndpoint:
        name = f"baton-kv-{secrets.token_hex(16)}"
        try:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind("\0" + name)
            listener.listen(64)
        except OSError as error:
            raise ConfigurationError(f"lane {self.name} cannot be served on this host: {error}") from error
        self._listener = listener
        self._thread = threading.Thread(
            target=self._accept, args=(listener, memory), name=f"lane-{self.name}", daemon=True
        )
        self._thread.start()
        return LaneEndpoint(self.name, f"{boot_id()}/{name}", memory.token)

    def close(self) -> None:
        if self._listener is None or self._thread is None:
            return
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread out of accept()
        self._thread.join(2 * _GREETING_TIMEOUT_S)
        self._listener.close()
        self._listener = None

    def _accept(self, listener: socket.socket, memory: PoolMemory) -> None:
        try:
            while True:
                peer, _ = listener.accept()
                self._peers = [known for known in self._peers if not _has_ended(known)]
                if len(self._peers) < MAX_PEERS and _admit(peer, memory, self.more):
                    self._peers.append(peer)
                else:
                    peer.close()
        except OSError as error:
            log.debug("lane %s stopped: %s", self.name, error)
        finally:
            for peer in self._peers:
                peer.close()


def _admit(peer: socket.socket, memory: PoolMemory, more: bytes) -> bool:
    """Hand the pool to a process of the same user that knows the token."""
    try:
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(credentials)[1] != os.geteuid():
            log.warning("lane shm: refused a process of another user")
            return False
        peer.settimeout(_GREETING_TIMEOUT_S)
        if peer.recv(_TOKEN.size, socket.MSG_WAITALL) != _TOKEN.pack(memory.token):
            log.warning("lane shm: refused a peer with a wrong token")
            return False
        readonly = memory.open_readonly()
        try:
            socket.send_fds(peer, [_SHAPE.pack(memory.num_blocks, memory.block_bytes) + more], [readonly])
        finally:
            os.close(readonly)
        peer.setblocking(False)
    except OSError as error:
        log.warning("lane shm: a peer went away while connecting: %s", error)
        return False
    return True


class Peer:
    """A peer on this host that was met, and its pool, mapped read-only. `more`: what else it told."""

    def __init__(self, pool: PoolMemory, more: bytes, connection: socket.socket) -> None:
        self.pool = pool
        self.more = more
        self._connection = connection

    @classmethod
    def meet(cls, lane: str, endpoint: LaneEndpoint, local: PoolMemory, deadline: float, more_bytes: int = 0) -> "Peer":
        """Raises TransferError where that is not possible, such as on another host."""
        host, _, name = endpoint.address.rpartition("/")
        if host != boot_id():
            raise OtherHostError(f"lane {lane}: the peer is on another host")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            connection.connect("\0" + name)
            connection.sendall(_TOKEN.pack(endpoint.token))
            greeting, fds, _, _ = socket.recv_fds(connection, _SHAPE.size + more_bytes, 1)
            if not fds or len(greeting) != _SHAPE.size + more_bytes:
                for fd in fds:
                    os.close(fd)
                raise TransferError(f"lane {lane}: the peer refused")
            num_blocks, block_bytes = _SHAPE.unpack_from(greeting)
            pool = PoolMemory.attach(fds[0], num_blocks, block_bytes)
            if block_bytes != local.block_bytes:
                pool.close()
                raise TransferError(f"a block has {block_bytes} bytes at the peer and {local.block_bytes} here")
            connection.setblocking(False)
            return cls(pool, greeting[_SHAPE.size :], connection)
        except OSError as error:
            connection.close()
            raise TransferError(f"lane {lane} does not reach the peer: {error}") from error
        except TransferError:
            connection.close()
            raise

    def check(self) -> None:
        """Raises TransferError once it is gone, or serves its pool no more."""
        if _has_ended(self._connection):
            raise TransferError("the peer no longer serves its pool")

    def close(self) -> None:
        self._connection.close()
        self.pool.close()


class ShmLaneClient(LaneClient):
    name = NAME

    def __init__(self, peer: Peer, local: PoolMemory) -> None:
        self._peer = peer
        self._local = local

    @classmethod
    def connect(cls, endpoint: LaneEndpoint, local: PoolMemory, deadline: float) -> "ShmLaneClient":
        """Map the peer's pool. Raises TransferError where that is not possible, such as on another host."""
        peer = Peer.meet(NAME, endpoint, local, deadline)
        _touch(peer.pool, min(deadline, time.monotonic() + _TOUCH_S))
        return cls(peer, local)

    def pull(self, reads: Sequence[BlockRead], deadline: float, cancelled: threading.Event | None = None) -> None:
        self._peer.check()
        copy_blocks(self._peer.pool, self._local, reads, deadline, cancelled)

    def close(self) -> None:
        self._peer.close()


def _touch(memory: PoolMemory, until: float) -> None:
    """Read a byte here and there, so that the kernel makes the page tables of the mapping."""
    flat, step = memory.blocks.reshape(-1), 64 << 20
    for start in range(0, len(flat), step):
        if time.monotonic() > until:
            return
        flat[start : start + step : _TOUCH_BYTES].max()


def _has_ended(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection on which nothing is ever sent."""
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
