"""Bytes over one TCP connection, plain or with mutual TLS: out of many pieces of memory, into many pieces of memory.

Every stream has a pulse: a wait for the peer ends that often to ask `go_on` whether it may continue.
"""

import contextlib
import socket
import ssl
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

from baton.errors import TransferError
from baton.tls import Tls

SEND_STALL_S: Final = 10.0
"""A receiver that takes nothing for so long loses its connection."""
_MAX_PARTS: Final = 64  # memory ranges in one system call
_TLS_PIECE_BYTES: Final = 1 << 20  # what one send may take SEND_STALL_S for
_LOCAL_BUFFER_BYTES: Final = 256 << 10


class Stream(ABC):
    """One connection. Closed by its owner; `shut_down` may come from any thread and ends every wait."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    @abstractmethod
    def send(self, parts: list[memoryview]) -> None:
        """Write every part; consumes the list. Raises OSError after SEND_STALL_S without progress."""

    def receive(self, parts: list[memoryview], go_on: Callable[[], None]) -> None:
        """Fill every part in order; consumes the list. Raises TransferError, or what `go_on` raises."""
        while parts:
            go_on()
            count = self._receive_some(parts)
            if count == 0:
                raise TransferError("lane tcp: the peer closed the connection")
            if count is not None:
                _advance(parts, count)

    @abstractmethod
    def _receive_some(self, parts: list[memoryview]) -> int | None:
        """None when nothing came within the pulse."""

    def shut_down(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


class PlainStream(Stream):
    def __init__(self, connection: socket.socket, pulse_s: float) -> None:
        super().__init__(connection)
        connection.settimeout(None)
        # The kernel's own timeout, not Python's: one system call then fills many blocks, without a poll before each.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(pulse_s))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(SEND_STALL_S))

    def send(self, parts: list[memoryview]) -> None:
        while parts:
            _advance(parts, self._socket.sendmsg(parts[:_MAX_PARTS]))

    def _receive_some(self, parts: list[memoryview]) -> int | None:
        try:
            return self._socket.recvmsg_into(parts[:_MAX_PARTS], 0, socket.MSG_WAITALL)[0]
        except BlockingIOError:  # SO_RCVTIMEO
            return None


class TlsStream(Stream):
    """The handshake is done. OpenSSL hands out at most one record (16 KiB) a call."""

    def __init__(self, connection: ssl.SSLSocket, pulse_s: float) -> None:
        super().__init__(connection)
        self._tls = connection
        self._pulse_s = pulse_s
        connection.settimeout(pulse_s)

    def send(self, parts: list[memoryview]) -> None:
        self._tls.settimeout(SEND_STALL_S)
        while parts:
            _advance(parts, self._tls.send(parts[0][:_TLS_PIECE_BYTES]))
        self._tls.settimeout(self._pulse_s)

    def _receive_some(self, parts: list[memoryview]) -> int | None:
        try:
            return self._tls.recv_into(parts[0])
        except TimeoutError:
            return None


def accept_stream(connection: socket.socket, tls: Tls | None, pulse_s: float) -> Stream:
    """The server's end of an accepted connection. Takes SEND_STALL_S at most; raises OSError."""
    _tune(connection)
    # A host that lost power never closes its connection: keepalive ends the wait for its next request.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    if tls is None:
        return PlainStream(connection, pulse_s)
    connection.settimeout(SEND_STALL_S)
    return TlsStream(tls.server.wrap_socket(connection, server_side=True), pulse_s)


def dial_stream(address: tuple[str, int], tls: Tls | None, pulse_s: float, timeout_s: float) -> Stream:
    """The client's end of a new connection. Raises OSError."""
    connection = socket.create_connection(address, timeout=timeout_s)
    try:
        _tune(connection)
        if tls is None:
            return PlainStream(connection, pulse_s)
        return TlsStream(tls.client.wrap_socket(connection), pulse_s)
    except OSError:
        connection.close()
        raise


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
