"""Blocks of a device's pool in host memory that peers can read and write, by the same ids.

    device pool   [block 0][block 1] ...               what the kernels use
                      │ publish    ▲ fetch
    PoolMemory    [block 0][block 1] ...               what hand-overs offer and fill

A block is one contiguous slab on both sides (256 KiB for a small model, 2 MiB for an 8B one), so each is one copy, and
neighbours are one together. The host memory is registered with the driver: copies go straight from and to where peers
map it, and no second copy is made by the processor.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.gpu.device import wait_for
from engine.pool import KVPool

log = logging.getLogger(__name__)


class HostMirror:
    """Not thread-safe: belongs to the engine's thread. `counters`: its share of `baton.metrics.WORKER_COUNTERS`."""

    def __init__(self, pool: KVPool, host: Tensor) -> None:
        """`host`: uint8 [num_blocks, block_bytes], which must outlive this."""
        self._device_blocks = pool.slabs.view(pool.num_blocks, -1).view(torch.uint8)
        self._host_blocks = host
        self._num_layers = pool.shape.num_layers
        self._layer_bytes = pool.shape.block_bytes // self._num_layers
        self._stream = torch.cuda.Stream(pool.slabs.device) if pool.slabs.is_cuda else None  # type: ignore[no-untyped-call]
        self.counters = {"kv_blocks_to_host": 0.0, "kv_blocks_to_device": 0.0}
        if self._stream is not None:
            _register(host)

    def count_into(self, counters: dict[str, float]) -> None:
        """Count there from now on."""
        counters.update(self.counters)
        self.counters = counters

    def publish(self, block_ids: Sequence[int], layers: range | None = None) -> None:
        """Bring computed blocks, or these layers of them, to the host; when this returns peers may read them.

        On a stream of its own, beside the step that may be running by now: that one writes no announced block, or only
        its other layers.
        """
        with self._copying():
            if layers is not None:
                part = slice(layers.start * self._layer_bytes, layers.stop * self._layer_bytes)
                for block in block_ids:  # one run of bytes each
                    self._host_blocks[block, part].copy_(self._device_blocks[block, part], non_blocking=True)
            else:
                for first, count in _runs(block_ids):
                    run = slice(first, first + count)
                    self._host_blocks[run].copy_(self._device_blocks[run], non_blocking=True)
        if layers is None or layers.stop == self._num_layers:
            self.counters["kv_blocks_to_host"] += len(block_ids)

    def fetch(self, block_ids: Sequence[int]) -> None:
        """Bring blocks that a peer filled to the device, after every step launched so far."""
        with self._copying():
            if self._stream is not None:
                # A step on its way may still write into a block whose former owner has ended.
                self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            for first, count in _runs(block_ids):
                part = slice(first, first + count)
                self._device_blocks[part].copy_(self._host_blocks[part], non_blocking=True)
        self.counters["kv_blocks_to_device"] += len(block_ids)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Copies made within are done when this ends."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        wait_for(done)


def _runs(block_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of ids that follow each other."""
    start = 0
    for index in range(1, len(block_ids) + 1):
        if index == len(block_ids) or block_ids[index] != block_ids[index - 1] + 1:
            yield block_ids[start], index - start
            start = index


def _register(host: Tensor) -> None:
    """Make memory that is mapped already as good as pinned. Without it copies still work, at a third of the speed."""
    status = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.numel() * host.element_size(), 0)  # type: ignore[no-untyped-call]
    if int(status) != 0:
        log.warning("host memory for KV cannot be pinned (CUDA error %d): hand-overs will be slower", int(status))
