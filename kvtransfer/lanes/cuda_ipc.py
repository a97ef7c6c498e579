"""Lane `cuda_ipc`: blocks are read out of a peer's GPU memory on this host by the GPU's copy engines.

    GPU of the peer ──one DMA──▶ host memory here (registered with CUDA), checked there, then to the GPU here

Beside `shm`, where the processor copies what the peer's copy engine brought to the host before. Peers meet as in `shm`,
and the pool that is mapped there gives the generations; the handle of the device memory comes with it. The bytes are
checked in host memory, where every lane leaves them.

A process that exits takes its device memory along. The peer's connection is looked at before every batch, as after that
reading there is undefined; so this lane is used where --lanes names it, and is not in the default.
"""

import struct
import threading
from collections.abc import Callable, Sequence
from typing import Final

from baton.errors import ConfigurationError, TransferError
from kvtransfer.lanes import cuda_driver
from kvtransfer.lanes.base import BlockRead, LaneClient, LaneEndpoint, check_still_wanted
from kvtransfer.lanes.copying import MAX_RUN_BYTES, Pieces, batches, check_blocks, check_generations, coalesce
from kvtransfer.lanes.shm import Peer, ShmLaneServer
from kvtransfer.memory import PoolMemory

NAME: Final = "cuda_ipc"
_SHARED: Final = struct.Struct(f"<16s{cuda_driver.HANDLE_BYTES}sQ")

Load = Callable[[], cuda_driver.CudaDriver]


class CudaIpcLaneServer(ShmLaneServer):
    name = NAME

    def __init__(self, load: Load = cuda_driver.load) -> None:
        super().__init__()
        self._load = load

    def start(self, memory: PoolMemory) -> LaneEndpoint:
        if memory.device_pointer is None:
            raise ConfigurationError("lane cuda_ipc: the KV pool is not on a GPU")
        try:
            self.more = _SHARED.pack(*self._load().share(memory.device_pointer))
        except TransferError as error:
            raise ConfigurationError(f"lane cuda_ipc: the KV pool cannot be shared: {error}") from error
        return super().start(memory)


class CudaIpcLaneClient(LaneClient):
    name = NAME

    def __init__(self, peer: Peer, view: cuda_driver.DeviceView, local: PoolMemory) -> None:
        self._peer = peer
        self._view = view
        self._local = local

    @classmethod
    def connect(
        cls, endpoint: LaneEndpoint, local: PoolMemory, deadline: float, load: Load = cuda_driver.load
    ) -> "CudaIpcLaneClient":
        """Raises TransferError where the peer or its GPU cannot be reached."""
        peer = Peer.meet(NAME, endpoint, local, deadline, _SHARED.size)
        try:
            view = load().open(cuda_driver.Shared(*_SHARED.unpack(peer.more)))
        except ConfigurationError as error:
            peer.close()
            raise TransferError(f"lane cuda_ipc: {error}") from error
        except TransferError:
            peer.close()
            raise
        return cls(peer, view, local)

    def pull(self, reads: Sequence[BlockRead], deadline: float, cancelled: threading.Event | None = None) -> None:
        remote, target = self._peer.pool, self._local.blocks
        pieces = Pieces.of(reads, self._local)
        check_blocks(pieces.blocks, remote.num_blocks)
        check_generations(remote.generations[pieces.blocks], pieces)
        runs = coalesce(pieces.remote_starts, pieces.local_starts, pieces.lengths, MAX_RUN_BYTES)
        for part in batches(runs.lengths, len(runs.lengths), MAX_RUN_BYTES):
            check_still_wanted(deadline, cancelled)
            self._peer.check()
            starts, targets, lengths = (column[part].tolist() for column in runs)
            self._view.copy_to_host(starts, [target.ctypes.data + each for each in targets], lengths)
        check_generations(remote.generations[pieces.blocks], pieces)
        self._peer.check()

    def close(self) -> None:
        self._view.close()
        self._peer.close()
