"""What a lane is: one way for a process to copy blocks out of a peer's pool into its own.

The offering side runs a LaneServer per lane; its endpoint travels in the handshake. The pulling side opens a
LaneClient for the best lane that both have. A lane moves bytes and nothing else: identity, checksum and lease are
checked by its callers, whatever the lane promises.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

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
    """Reads one peer's pool."""

    name: str

    @abstractmethod
    def pull(self, reads: Sequence[BlockRead], deadline: float) -> None:
        """Copy every block, in the calling thread; `deadline` in `time.monotonic()` seconds.

        Raises TransferError when the peer is gone, a generation no longer matches, or the deadline passes. Whatever
        it raises, no local block is written after it returns.
        """

    @abstractmethod
    def close(self) -> None: ...
