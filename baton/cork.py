"""Writes that leave together: at the end of the event loop's turn, one for a connection, and one right after the other.

uvloop writes at once. Each write wakes its reader, which on the same machine may take the processor, and with it the
caches, from whoever goes on to the next stream or worker. What TCP_CORK does for one socket, this does for all of a
process. The first write of a turn does leave at once: while there is little to do its reader had better begin.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import Any, Final, cast

MAX_HELD_S: Final = 0.001
"""A longer turn does not keep back what its beginning wrote."""
MAX_HELD_BYTES: Final = 1 << 14
"""Of a connection. Whoever waits until there is room for more than that must not be told that there is."""

Data = bytes | bytearray | memoryview


class Cork:
    """In the event loop's thread."""

    def __init__(self) -> None:
        self.waiting: list[Corked] = []
        """With something to write when the turn ends."""
        self.since_s = 0.0
        """When the first of them came."""
        self.due = False
        """This turn has had its first write."""

    def transport(self, transport: asyncio.BaseTransport) -> "Corked":
        """The same connection, written to when the turn ends."""
        return Corked(self, cast(asyncio.Transport, transport))  # uvloop's is one in all but its class

    def begin(self) -> None:
        """The first write of this turn comes now."""
        self.due = True
        asyncio.get_running_loop().call_soon(self._turn_ends)

    def _turn_ends(self) -> None:
        self.due = False
        self.release()

    def release(self) -> None:
        waiting, self.waiting = self.waiting, []
        for corked in waiting:
            corked.release()


class Corked(asyncio.Transport):
    """Every method is written out: with `__getattr__` the interpreter would look each attribute up anew."""

    __slots__ = ("_cork", "_held", "_transport", "stuck")

    def __init__(self, cork: Cork, transport: asyncio.Transport) -> None:
        self._cork = cork
        self._transport = transport
        self._held = b""
        self.stuck = False
        """What was written last has not all left: who reads is slow, or gone."""

    def write(self, data: Data) -> None:
        """Every token comes by here, so this knows its cork from within."""
        cork, now = self._cork, time.monotonic()
        if not self._held:
            if is_first := not cork.due:
                cork.begin()
            # What waits in the connection already would not leave with the others.
            if is_first or (self.stuck and self._transport.get_write_buffer_size()):
                self._put(data)
                return
            if not cork.waiting:
                cork.since_s = now
            cork.waiting.append(self)
        self._held += data
        if len(self._held) > MAX_HELD_BYTES:
            self.release()
        if now - cork.since_s > MAX_HELD_S:
            cork.release()

    def writelines(self, list_of_data: Iterable[Data]) -> None:
        self.write(b"".join(list_of_data))

    def get_write_buffer_size(self) -> int:
        return len(self._held) + self._transport.get_write_buffer_size()

    def write_eof(self) -> None:
        self.release()
        self._transport.write_eof()

    def close(self) -> None:
        self.release()
        self._transport.close()

    def release(self) -> None:
        """Write what is held back."""
        held, self._held = self._held, b""
        if held:
            self._put(held)

    def _put(self, data: Data) -> None:
        """To nobody where the connection is being closed."""
        self.stuck = True
        if self._transport.is_closing():
            return
        try:
            self._transport.write(data)
            self.stuck = self._transport.get_write_buffer_size() > 0
        except Exception as error:  # noqa: BLE001 - told to the loop: the others of this turn are written
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a connection could not be written to", "exception": error}
            )
            self._transport.abort()

    # What the transport inside does alone

    def abort(self) -> None:
        self._transport.abort()

    def can_write_eof(self) -> bool:
        return self._transport.can_write_eof()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._transport.get_protocol()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._transport.set_protocol(protocol)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def is_reading(self) -> bool:
        return self._transport.is_reading()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._transport.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._transport.set_write_buffer_limits(high, low)
