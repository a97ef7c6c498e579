"""The control connection between two workers: who they are, and messages that are numbered in each direction."""

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final, cast

import zmq
import zmq.asyncio
from google.protobuf.message import DecodeError

from baton.errors import PeerError
from baton.v1 import handover_pb2 as pb
from kvtransfer.sealing import TLS_ONLY, Seal, talks_tls

log = logging.getLogger(__name__)

PROTOCOL_VERSION: Final = 2
MAX_FRAME_BYTES: Final = 1 << 20
MAX_OFFER_BLOCKS: Final = 1024  # in one message: about 30 KB
MAX_WANT_NAMES: Final = 4096  # in one message: about 70 KB
MAX_ID_BYTES: Final = 256  # of a hand-over
HIGH_WATER_MARK: Final = 10_000  # messages that wait for a peer that does not read


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """One life of one worker: the incarnation is new at every start of its process."""

    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class PeerRef:
    """A worker and where its offers are served, such as tcp://10.0.0.7:5555."""

    worker_id: str
    incarnation: int
    address: str

    @property
    def identity(self) -> PeerIdentity:
        return PeerIdentity(self.worker_id, self.incarnation)


class Numbering:
    """Sequence numbers of one connection, from 1 in each direction. A gap or a repeat means that messages were lost
    or doubled, and then nothing on the connection can be believed."""

    def __init__(self, seal: Seal | None = None) -> None:
        """`seal`: what encrypts, its handshake done before the first message."""
        self._seal = seal
        self._sent = 0
        self._received = 0

    def stamp(self, message: pb.HandoverMessage) -> bytes:
        self._sent += 1
        message.sequence = self._sent
        frame = message.SerializeToString()
        return frame if self._seal is None else self._seal.seal(frame)

    def accept(self, frame: bytes) -> pb.HandoverMessage:
        """Parse the next frame. Raises PeerError when it is not a message, or not the next one."""
        if self._seal is not None:
            frame = self._seal.open(frame)
        elif talks_tls(frame):
            raise PeerError(TLS_ONLY)
        message = pb.HandoverMessage()
        try:
            message.ParseFromString(frame)
        except DecodeError as error:
            raise PeerError("the peer sent something that is no message") from error
        if message.sequence != self._received + 1:
            raise PeerError(f"the peer sent message {message.sequence} where {self._received + 1} was due")
        self._received += 1
        return message


def spawn(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A background task whose failure is at least seen: without it a connection would look alive and do nothing."""

    def report(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("hand-over task %s failed", task.get_coro(), exc_info=error)

    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(report)
    return task


def send_now(socket: zmq.asyncio.Socket, frames: list[bytes]) -> BaseException | None:
    """Queue a message without waiting; what is returned says why that was not possible."""
    done = cast("asyncio.Future[object]", socket.send_multipart(frames, flags=zmq.NOBLOCK))
    return done.exception()  # with NOBLOCK pyzmq's future is done when it returns
