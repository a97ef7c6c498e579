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

from baton.errors import TransferError
from kvtransfer.memory import PoolMemory


@dataclass(frozen=True, slots=True)
class LaneEndpoint:
    """Where a lane of a peer is found. `token` is a secret of the peer's pool epoch."""

    lane: str
    address: str
    token: int


@dataclass(frozen=True, slots=True)
class BlockRead:
    """Copy `remote_block` of the peer, if it still has that generation, over `local_block`."""

    remote_block: int
    remote_generation: int
    local_block: int


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
        """Copy every block, in the calling thread; `deadline` in `time.monotonic()` seconds.

        Raises TransferError when the peer is gone, a generation no longer matches, the deadline passes, or
        `cancelled` is set, the latter two within POLL_S. Whatever it raises, no local block is written after it
        returns.
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
