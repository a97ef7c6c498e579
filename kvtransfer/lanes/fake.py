"""Lane `fake`: both pools live in this process. For tests of everything above the lanes."""

import threading
from collections.abc import Sequence

from baton.errors import TransferError
from kvtransfer.lanes.base import BlockRead, LaneClient, LaneEndpoint, LaneServer
from kvtransfer.lanes.copying import copy_blocks
from kvtransfer.memory import PoolMemory

NAME = "fake"
_served: dict[str, PoolMemory] = {}


class FakeLaneServer(LaneServer):
    name = NAME

    def __init__(self) -> None:
        self._address = f"fake-{id(self)}"

    def start(self, memory: PoolMemory) -> LaneEndpoint:
        _served[self._address] = memory
        return LaneEndpoint(NAME, self._address, memory.token)

    def close(self) -> None:
        _served.pop(self._address, None)


class FakeLaneClient(LaneClient):
    name = NAME

    def __init__(self, endpoint: LaneEndpoint, local: PoolMemory) -> None:
        self._endpoint = endpoint
        self._local = local

    @classmethod
    def connect(cls, endpoint: LaneEndpoint, local: PoolMemory, deadline: float) -> "FakeLaneClient":
        client = cls(endpoint, local)
        client.pull([], deadline)
        return client

    def pull(self, reads: Sequence[BlockRead], deadline: float, cancelled: threading.Event | None = None) -> None:
        remote = _served.get(self._endpoint.address)
        if remote is None or remote.token != self._endpoint.token:
            raise TransferError("lane fake: no such pool in this process")
        copy_blocks(remote, self._local, reads, deadline, cancelled)

    def close(self) -> None:
        """Nothing is held."""
