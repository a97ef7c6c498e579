"""What a lane is: one way for a process to copy blocks out of a peer's pool into its own.

The offering side runs a LaneServer per lane; its endpoint travels in the handshake. The pulling side opens a
LaneClient for the best lane that both have. A lane moves bytes and nothing else: identity, checksum and lease are
checked by its callers, whatever the lane promises.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from baton.errors import TransferError
from kvtransfer.memory import PoolMemory


@dataclass(frozen=True, slots=True)
class LaneEndpoint:
    """Where a lane of a peer is found. `token` is a secret of the peer's pool epoch."""

    lane: str
    address: str
    token: int


TO_END: Final = -1
"""As `num_bytes`: up to the end of the block."""
ANY_GENERATION: Final = 2**64 - 1
"""Matches whatever a block holds: for measuring a lane with bytes that nobody will use."""


class BlockRead(NamedTuple):
    """Copy `num_bytes` of the peer's `remote_block`, from `offset` on, to the same place in `local_block`.

    The whole block by default, or a part such as a group of layers. Only if the block still has that generation.
    """

    remote_block: int
    remote_generation: int
    local_block: int
    offset: int = 0
    num_bytes: int = TO_END


class OtherHostError(TransferError):
    """The peer is on another host, where a lane between processes of one host cannot reach it: no reason to worry."""


class LaneServer(ABC):
    """Lets peers read this process's pool."""

    name: str

    @abstractmethod
    def start(self, memory: PoolMemory) -> LaneEndpoint:
        """Begin to serve. Raises ConfigurationError where this host cannot."""

    @abstractmethod
    def close(self) -> None:
        """Stop serving; no peer can start another read afterwards."""


class LaneClient(ABC):
    """Reads one peer's pool. Several threads may pull at the same time."""

    name: str

    @abstractmethod
    def pull(self, reads: Sequence[BlockRead], deadline: float, cancelled: threading.Event | None = None) -> None:
        """Copy every read, in the calling thread; `deadline` in `time.monotonic()` seconds.

        Raises TransferError when the peer is gone, a generation no longer matches, a read is not inside of a block,
        the deadline passes, or `cancelled` is set, the latter two within POLL_S. Whatever it raises, no local block
        is written after it returns.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the peer. Nobody is pulling any more."""


POLL_S = 0.05
"""How often a pull that waits for its peer looks at the clock and at its cancellation."""


def check_still_wanted(deadline: float, cancelled: threading.Event | None) -> None:
    """Raise TransferError once a pull should end."""
    if cancelled is not None and cancelled.is_set():
        raise TransferError("the pull was cancelled")
    if time.monotonic() > deadline:
        raise TransferError("the blocks did not arrive before the deadline")
