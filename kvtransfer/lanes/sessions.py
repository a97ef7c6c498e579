"""What lanes over a transport library have in common: how a peer gets in, and how a pull is ended for certain.

The peer connects to a plain socket and shows the token; only then do both sides learn what their libraries need to
reach each other, such as the keys of registered memory. Whoever has not shown the token cannot name what to read.

    peer     token u64 | length u32 | what the lane has to say
    server   length u32 | what the lane has to say, to every peer the same      } or the end of the connection

Then nothing more is said, and the end of the connection tells either side that the other one is gone: at once, and
whatever the library notices of it.
"""

import logging
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from baton.errors import ConfigurationError, TransferError
from kvtransfer.lanes.base import POLL_S, BlockRead, LaneClient, LaneEndpoint, check_still_wanted
from kvtransfer.lanes.copying import Pieces, batches
from kvtransfer.memory import PoolMemory

log = logging.getLogger(__name__)

MAX_PEERS = 256
MAX_BATCH_BYTES = 16 << 20
MAX_BATCH_READS = 1024
"""What one turn on a session moves at most: other pulls wait for it, and it is seldom given up half way."""
GRACE_S = POLL_S / 2
"""How long a transfer that is no longer wanted may still end by itself: nearly every one does."""
_MAX_GREETING_BYTES = 1 << 20
_GREETING_TIMEOUT_S = 1.0  # a peer says everything as soon as it is connected
_HEAD = struct.Struct("<QI")
_LENGTH = struct.Struct("<I")


class Door:
    """Lets in peers that know the token, one after the other, in a thread of its own."""

    def __init__(self, lane: str, host: str) -> None:
        """`host` is the address that peers reach this process at."""
        self._lane = lane
        self._host = host
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def open(self, token: int, answer: bytes, enter: Callable[[bytes, socket.socket], None]) -> str:
        """Returns the address for peers. Raises ConfigurationError.

        enter(said, connection), on the door's thread: the connection is the lane's from then on, to watch and close.
        """
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            self._listener = socket.create_server((self._host, 0), family=family, backlog=64)
        except OSError as error:
            what = f"lane {self._lane} cannot listen on {self._host}: {error}; change --host"
            raise ConfigurationError(what) from error
        self._thread = threading.Thread(
            target=self._accept, args=(self._listener, token, answer, enter), name=f"lane-{self._lane}", daemon=True
        )
        self._thread.start()
        return f"{self._host}:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        """Let nobody else in."""
        if self._listener is None or self._thread is None:
            return
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread out of accept()
        self._thread.join(2 * _GREETING_TIMEOUT_S)
        self._listener.close()
        self._listener = None

    def _accept(
        self, listener: socket.socket, token: int, answer: bytes, enter: Callable[[bytes, socket.socket], None]
    ) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if not self._closing.wait(0.1):  # out of descriptors, say: breathe, then go on
                    log.warning("lane %s: cannot accept a connection: %s", self._lane, error)
                continue
            try:
                said = _hear(connection, token)
                connection.sendall(_LENGTH.pack(len(answer)) + answer)
                connection.setblocking(False)
            except (OSError, TransferError) as error:
                log.warning("lane %s: a peer was not let in: %s", self._lane, error)
                connection.close()
            else:
                enter(said, connection)


def _hear(connection: socket.socket, token: int) -> bytes:
    _keep_alive(connection)
    deadline = time.monotonic() + _GREETING_TIMEOUT_S
    shown, length = _HEAD.unpack(_receive(connection, _HEAD.size, deadline))
    if shown != token:
        raise TransferError("it shows a wrong token")
    if length > _MAX_GREETING_BYTES:
        raise TransferError(f"it wants to say {length} bytes")
    return _receive(connection, length, deadline)


class Greeting(NamedTuple):
    """What the server says, and the connection whose end means that it is gone."""

    said: bytes
    connection: socket.socket


def greet(endpoint: LaneEndpoint, say: bytes, deadline: float) -> Greeting:
    """Show the token at a peer's door. Raises TransferError when nobody is there or the peer refuses."""
    host, _, port = endpoint.address.rpartition(":")
    try:
        address = (host, int(port))
        connection = socket.create_connection(address, timeout=max(0.001, deadline - time.monotonic()))
    except (OSError, ValueError) as error:
        raise TransferError(f"lane {endpoint.lane} does not reach '{endpoint.address}': {error}") from error
    try:
        _keep_alive(connection)
        connection.sendall(_HEAD.pack(endpoint.token, len(say)) + say)
        (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size, deadline))
        if length > _MAX_GREETING_BYTES:
            raise TransferError(f"lane {endpoint.lane}: the peer wants to say {length} bytes")
        said = _receive(connection, length, deadline)
        connection.setblocking(False)
    except OSError as error:
        connection.close()
        raise TransferError(f"lane {endpoint.lane} does not reach the peer: {error}") from error
    except TransferError:
        connection.close()
        raise
    return Greeting(said, connection)


def has_ended(connection: socket.socket) -> bool:
    """Whether the other side is gone, or says something where nothing more is to be said."""
    try:
        connection.recv(1, socket.MSG_PEEK)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


def _receive(connection: socket.socket, length: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < length:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            part = connection.recv(length - len(received))
        except ConnectionResetError:
            part = b""
        if not part:
            raise TransferError("the peer closed the connection: a wrong token, or it stops")
        received += part
    return bytes(received)


def _keep_alive(connection: socket.socket) -> None:
    """A host that lost power never closes its connections; this notices within 25 seconds."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


class Session(ABC):
    """The objects of a library that reach one peer, used by one thread at a time."""

    @property
    @abstractmethod
    def is_idle(self) -> bool:
        """Nothing is in flight and nothing is broken, so that it can be used again, also after read() has raised."""

    @abstractmethod
    def read(self, pieces: Pieces, deadline: float, cancelled: threading.Event | None) -> None:
        """Copy a batch. Raises TransferError, and may leave transfers in flight then."""

    @abstractmethod
    def close(self) -> None:
        """End whatever is in flight. Returns only when nothing writes into the local pool any more, and never will.

        It waits for that without a deadline: blocks that somebody may still write into belong to the pull, and a
        pull that does not return keeps them.
        """


class SessionClient(LaneClient):
    """Pulls take turns on one session; one that had to be torn down is replaced when the next pull needs it."""

    def __init__(self, name: str, local: PoolMemory, open_session: Callable[[float], Session], deadline: float) -> None:
        """open_session(deadline) reaches the peer or raises TransferError; called now, and after a session is lost."""
        self.name = name
        self._local = local
        self._open_session = open_session
        self._session: Session | None = open_session(deadline)
        self._turn = threading.Lock()

    def pull(self, reads: Sequence[BlockRead], deadline: float, cancelled: threading.Event | None = None) -> None:
        pieces = Pieces.of(reads, self._local)
        for batch in batches(pieces.lengths, MAX_BATCH_READS, MAX_BATCH_BYTES):
            while not self._turn.acquire(timeout=POLL_S):
                check_still_wanted(deadline, cancelled)
            try:
                check_still_wanted(deadline, cancelled)
                self._read(pieces.part(batch), deadline, cancelled)
            finally:
                self._turn.release()

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def _read(self, pieces: Pieces, deadline: float, cancelled: threading.Event | None) -> None:
        session = self._session or self._open_session(deadline)
        self._session = None
        try:
            session.read(pieces, deadline, cancelled)
        finally:
            if session.is_idle:
                self._session = session
            else:
                session.close()


def finish(step: Callable[[], bool], deadline: float, cancelled: threading.Event | None) -> None:
    """Call `step`, which waits for a few milliseconds at most, until it says that everything has ended.

    Once the pull is no longer wanted that may take GRACE_S more, then TransferError is raised with transfers still
    in flight; ended by then, it is raised as well, and the session can be used again.
    """
    unwanted: TransferError | None = None
    give_up = 0.0
    while not step():
        if unwanted is None:
            try:
                check_still_wanted(deadline, cancelled)
            except TransferError as error:
                unwanted, give_up = error, time.monotonic() + GRACE_S
        elif time.monotonic() > give_up:
            break
    if unwanted is not None:
        raise unwanted
