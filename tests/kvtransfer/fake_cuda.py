"""A CUDA driver whose devices are host memory of this process: what lane `cuda_ipc` does around the driver's calls."""

import ctypes
import functools
import struct
from collections.abc import Sequence

from baton.errors import TransferError
from kvtransfer.lanes.cuda_driver import HANDLE_BYTES, CudaDriver, Shared
from kvtransfer.lanes.cuda_ipc import CudaIpcLaneClient, CudaIpcLaneServer
from kvtransfer.lanes.registry import Lane

UUID = b"fake CUDA device"
BEFORE = 4096
"""Bytes of the allocation before what is shared."""


class FakeView:
    def __init__(self, driver: "FakeCuda", address: int) -> None:
        self.address = address
        self._driver = driver

    def copy_to_host(self, starts: Sequence[int], targets: Sequence[int], lengths: Sequence[int]) -> None:
        if self._driver.error:
            raise TransferError(self._driver.error)
        self._driver.num_copied += sum(lengths)
        for start, target, length in zip(starts, targets, lengths, strict=True):
            ctypes.memmove(target, self.address + start, length)

    def close(self) -> None:
        self._driver.num_open -= 1


class FakeCuda:
    def __init__(self) -> None:
        self.error = ""
        self.num_copied = self.num_open = 0

    def share(self, pointer: int) -> Shared:
        if self.error:
            raise TransferError(self.error)
        return Shared(UUID, struct.pack("<Q", pointer - BEFORE).ljust(HANDLE_BYTES, b"\0"), BEFORE)

    def open(self, shared: Shared) -> FakeView:
        if shared.device != UUID:
            raise TransferError("the peer's GPU is not visible to this process")
        self.num_open += 1
        return FakeView(self, struct.unpack_from("<Q", shared.handle)[0] + shared.offset)


def lane(driver: FakeCuda) -> Lane:
    def load() -> CudaDriver:
        return driver  # type: ignore[return-value]

    return Lane(
        "cuda_ipc", lambda host: CudaIpcLaneServer(load), functools.partial(CudaIpcLaneClient.connect, load=load), True
    )
