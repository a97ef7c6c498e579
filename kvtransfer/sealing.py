"""Mutual TLS inside the frames of a ZeroMQ connection, so that workers trust each other here as on every other wire.

ZeroMQ's own CURVE knows keys and no certificates: it would need a second kind of identity, and somebody to hand it out.
Here the frames of a connection, in order, are a TLS 1.3 stream. First those of the handshake, one flight a frame:

    puller                      worker that offers
    ClientHello         ->
                        <-      ServerHello ... Finished
    Certificate ... Finished ->
    records of a Hello  ->                                  from here on a frame has the records of one message

A frame that was changed, doubled, left out or made by somebody else does not decrypt.
"""

import ssl
from typing import Final

from baton.errors import PeerError
from baton.tls import Handshake, reason_of

NO_TLS: Final = "the peer talks no TLS; add --tls-cert, --tls-key and --tls-ca there, or leave them out here"
TLS_ONLY: Final = "the peer talks TLS only; add --tls-cert, --tls-key and --tls-ca here, or leave them out there"
ALERT: Final = b"\x15\x03\x03\x00\x02\x02\x28"
"""For a peer to whom TLS has no words, as it spoke none or of something forgotten: the handshake failed."""
_READ_BYTES: Final = 1 << 16


class Seal:
    """One side of one connection. Does no I/O."""

    def __init__(self, context: ssl.SSLContext, server_side: bool) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side)
        self.done = False
        """The handshake: messages may go both ways, and the peer is known to belong to the cluster."""

    def shake(self, frame: bytes = b"") -> bytes:
        """Take the peer's next flight, none to begin with, and return ours; empty when there is none.

        Raises PeerError when the two do not go together; `farewell` then tells the peer.
        """
        self._incoming.write(frame)
        try:
            self._tls.do_handshake()
            self.done = True
        except Handshake:
            pass
        except ssl.SSLError as error:
            reason = reason_of(error) if talks_tls(frame) else NO_TLS
            raise PeerError(f"TLS between workers failed: {reason}") from error
        return self._outgoing.read()

    def farewell(self) -> bytes:
        """What is still to be sent after a failure: TLS's own words for the reason."""
        return self._outgoing.read() or ALERT

    def seal(self, message: bytes) -> bytes:
        """The frame for a message; after a failure one that tells the peer of it."""
        try:
            self._tls.write(message)
        except ssl.SSLError:
            return self.farewell()
        return self._outgoing.read()

    def open(self, frame: bytes) -> bytes:
        """The message in a frame. Raises PeerError when it is not the peer's next one."""
        self._incoming.write(frame)
        parts = []
        try:
            while part := self._tls.read(_READ_BYTES):
                parts.append(part)
            raise PeerError("TLS between workers failed: the peer ended it")
        except ssl.SSLWantReadError:
            return b"".join(parts)
        except ssl.SSLError as error:
            raise PeerError(f"TLS between workers failed: {reason_of(error)}") from error


def talks_tls(frame: bytes) -> bool:
    """Whether somebody shakes hands, or says why not."""
    return frame[:1] in (b"\x15", b"\x16") and frame[1:2] == b"\x03"


def is_late(frame: bytes) -> bool:
    """Whether it is of a connection whose handshake is over, and that is known here no more."""
    return frame.startswith(b"\x17\x03")
