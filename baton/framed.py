"""Protobuf messages over one TCP or TLS connection, in order: what a worker's link to a coordinator goes over.

    each side   GREETING, once
    then        length of a message (4 bytes, little endian) | message, again and again

What arrives is given to a callback in the turn of the event loop that read it, and what is said in one turn leaves in
one write (`baton.cork`): no thread, task or queue lies between a socket and whoever speaks on it. A bidirectional call
of gRPC takes ten times as long for a message in Python.
"""

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from baton.cork import Cork
from baton.tls import COORDINATOR_NAME, Tls, reason_of

GREETING: Final = b"baton-link/1\n"
LENGTH_BYTES: Final = 4
MAX_MESSAGE_BYTES: Final = 64 << 20
MAX_UNSENT_BYTES: Final = 64 << 20
"""That wait for a peer to read. One that is slower than this is not serving anyone."""
MAX_UNREAD: Final = 64
"""Messages that wait for `read`; with more of them the peer is let wait."""
PROBE_TIMEOUT_S: Final = 1.0

Incoming = TypeVar("Incoming", bound=Message)


class Framed(asyncio.Protocol, Generic[Incoming]):
    """One connection, of either side. `incoming`: the kind of message that the peer sends.

    `read` until `listen` is called, and that hears the rest. `ended` is set when nothing more comes, to the reason, or
    None where the peer said all and hung up.
    """

    def __init__(
        self,
        incoming: type[Incoming],
        on_open: Callable[["Framed[Incoming]"], None] = lambda opened: None,
        on_lost: Callable[[], None] = lambda: None,
        max_first_bytes: int = MAX_MESSAGE_BYTES,
        cork: Cork | None = None,
    ) -> None:
        """`on_lost`: called once, when nothing of the connection is left. `max_first_bytes`: of the first message, from
        who may be a stranger. `cork`: of what else this process writes to."""
        self._incoming = incoming
        self._on_open, self._on_lost = on_open, on_lost
        self._max_bytes = max_first_bytes
        self._has_finished = False
        self._cork = cork or Cork()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._greeted = False
        self._on_message: Callable[[Incoming], None] | None = None
        self._unread: deque[Incoming] = deque()
        self._reader: asyncio.Future[None] | None = None
        self.ended: asyncio.Future[ConnectionError | None] = asyncio.get_running_loop().create_future()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = self._cork.transport(transport)
        self._transport.write(GREETING)
        self._on_open(self)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        try:
            self._take(buffer)
        except ConnectionError as error:
            self.abort(error)

    def eof_received(self) -> None:
        """The transport closes itself."""
        self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(None if exc is None else ConnectionError(reason_of(exc)))
        self._on_lost()

    # What its owner calls

    def send(self, message: Message) -> bool:
        """Say something, as long as anybody can hear it. False, and not said: the peer does not read."""
        transport = self._transport
        if transport is None or self.ended.done() or self._has_finished:
            return True
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            return False
        data = message.SerializeToString()
        transport.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
        return True

    @property
    def unsent_bytes(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    async def read(self) -> Incoming | None:
        """The next message; None once the peer has hung up. Raises ConnectionError when the connection broke."""
        while not self._unread:
            if self.ended.done():
                if (error := self.ended.result()) is not None:
                    raise error
                return None
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        message = self._unread.popleft()
        if len(self._unread) == MAX_UNREAD and self._transport is not None:
            self._transport.resume_reading()
        return message

    def listen(self, on_message: Callable[[Incoming], None]) -> None:
        """Call this for every message from now on, until the connection has ended."""
        self._on_message = on_message
        if len(self._unread) > MAX_UNREAD and self._transport is not None:
            self._transport.resume_reading()
        while self._unread and not self.ended.done():
            on_message(self._unread.popleft())

    def finish(self) -> None:
        """Nothing more will be said; the peer hangs up when it has read everything."""
        if self._transport is None or self._transport.is_closing():
            return
        self._has_finished = True
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()

    def close(self) -> None:
        """Hang up once what was said has been sent."""
        self._end(None)
        if self._transport is not None:
            self._transport.close()

    def abort(self, reason: ConnectionError | None = None) -> None:
        """Hang up at once."""
        self._end(reason)
        if self._transport is not None:
            self._transport.abort()

    def _take(self, buffer: bytearray) -> None:
        """Raises ConnectionError for what is no link."""
        at = 0
        if not self._greeted:
            at = len(GREETING)
            if buffer[:at] != GREETING[: len(buffer)]:
                raise ConnectionError("it speaks something else than this version of the link")
            if len(buffer) < at:
                return
            self._greeted = True
        while len(buffer) >= (start := at + LENGTH_BYTES) and not self.ended.done():
            size = int.from_bytes(buffer[at:start], "little")
            if size > self._max_bytes:
                raise ConnectionError(f"a message of {size} bytes, more than {self._max_bytes}")
            if len(buffer) < start + size:
                break
            at = start + size
            self._max_bytes = MAX_MESSAGE_BYTES
            try:
                message = self._incoming.FromString(bytes(buffer[start:at]))
            except DecodeError:
                raise ConnectionError("what came is no message of the link") from None
            self._hear(message)
        del buffer[:at]

    def _hear(self, message: Incoming) -> None:
        if self._on_message is not None:
            self._on_message(message)
            return
        self._unread.append(message)
        self._wake()
        if len(self._unread) == MAX_UNREAD + 1 and self._transport is not None:
            self._transport.pause_reading()

    def _end(self, reason: ConnectionError | None) -> None:
        if not self.ended.done():
            self.ended.set_result(reason)
            self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


async def dial(address: str, incoming: type[Incoming], tls: Tls | None) -> Framed[Incoming]:
    """A connection to the coordinator's link at `host:port`, with the latest files. Raises OSError; no deadline."""
    host, port = _parted(address)
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Framed(incoming), host, port,
        ssl=tls.material.naming if tls is not None else None,
        server_hostname=COORDINATOR_NAME if tls is not None else None,
    )  # fmt: skip
    return connection


def _parted(address: str) -> tuple[str, int]:
    """Host and port of what may have been announced by anybody. Raises ConnectionError."""
    host, _, port = address.rpartition(":")
    try:
        host.encode("idna")
        return host.strip("[]"), int(port)
    except ValueError:
        raise ConnectionError(f"'{address}' is no address like host:port") from None


async def trouble(address: str, tls: Tls | None) -> str | None:
    """Why no link can be had to who listens there, as far as TLS is the reason.

    None: nobody listens, or TLS is as it should be.
    """
    return await asyncio.to_thread(_probe, address, tls)


def _probe(address: str, tls: Tls | None) -> str | None:
    if tls is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    else:
        context = tls.material.naming
    try:
        with (
            socket.create_connection(_parted(address), PROBE_TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=COORDINATOR_NAME) as connection,
        ):
            if tls is None:
                return "it talks TLS only; add --tls-cert, --tls-key and --tls-ca here"
            # With TLS 1.3 a refusal of our certificate shows here; who accepts it greets at once.
            return None if _hears(connection) else "it refused the certificate of --tls-cert; compare --tls-ca there"
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not good: {reason_of(error)}; compare --tls-ca here with --tls-cert there"
    except ssl.SSLEOFError:
        return None  # it went away, or is a proxy with nobody behind it
    except ssl.SSLError:
        if tls is None:
            return None  # no TLS there either
        return "it talks no TLS; add --tls-cert, --tls-key and --tls-ca there, or leave them out here"
    except OSError:
        return None


def _hears(connection: ssl.SSLSocket) -> bool:
    try:
        return bool(connection.recv(1))
    except TimeoutError:
        return True
    except OSError:
        return False
