"""Lane `cuda_ipc`: around a driver that is none here, and between two processes where there is a GPU.

What every lane promises is tested in test_lanes.py, for this one too.
"""

import ctypes
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from baton.errors import ConfigurationError, TransferError
from kvtransfer.lanes.base import BlockRead, LaneEndpoint
from kvtransfer.lanes.cuda_driver import CudaDriver, Shared
from kvtransfer.lanes.registry import LANES
from tests.kvtransfer import fake_cuda
from tests.kvtransfer.world import BLOCK_BYTES, NUM_BLOCKS, ROOT, new_memory

READS = [BlockRead(block, 0, block) for block in range(NUM_BLOCKS)]


def soon() -> float:
    return time.monotonic() + 5


@pytest.fixture
def world():
    """(driver, lane, memory that mirrors the device, the device's blocks)."""
    driver, memory = fake_cuda.FakeCuda(), new_memory(seed=1)
    device = np.random.default_rng(9).integers(0, 256, memory.blocks.shape, np.uint8)
    memory.device_pointer = device.ctypes.data
    yield driver, fake_cuda.lane(driver), memory, device
    memory.close()


def test_the_bytes_are_those_of_the_device(world) -> None:
    driver, lane, memory, device = world
    server, target = lane.serve("127.0.0.1"), new_memory()
    client = lane.connect(server.start(memory), target, soon())
    client.pull(READS, soon())
    assert (target.blocks == device).all()
    assert driver.num_copied == device.nbytes
    client.close()
    assert driver.num_open == 0
    server.close()


def test_an_error_of_the_driver_is_one_of_the_transfer(world) -> None:
    driver, lane, memory, _ = world
    server, target = lane.serve("127.0.0.1"), new_memory()
    client = lane.connect(server.start(memory), target, soon())
    driver.error = "cuMemcpyDtoHAsync_v2: CUDA_ERROR_LAUNCH_FAILED (719)"
    with pytest.raises(TransferError, match="LAUNCH_FAILED"):
        client.pull(READS, soon())
    client.close()
    server.close()


def test_a_peer_that_stops_serving_is_not_read_any_more(world) -> None:
    driver, lane, memory, _ = world
    server, target = lane.serve("127.0.0.1"), new_memory()
    client = lane.connect(server.start(memory), target, soon())
    server.close()
    with pytest.raises(TransferError, match="no longer serves"):
        client.pull(READS, soon())
    assert driver.num_copied == 0
    client.close()


def test_a_pool_that_is_not_on_a_gpu_or_cannot_be_shared_is_not_served(world) -> None:
    driver, lane, memory, _ = world
    with pytest.raises(ConfigurationError, match="not on a GPU"):
        lane.serve("127.0.0.1").start(new_memory())
    driver.error = "cuIpcGetMemHandle: CUDA_ERROR_INVALID_VALUE (1)"
    with pytest.raises(ConfigurationError, match="cannot be shared"):
        lane.serve("127.0.0.1").start(memory)


def test_a_gpu_that_only_the_peer_sees_is_an_error(world, monkeypatch: pytest.MonkeyPatch) -> None:
    _, lane, memory, _ = world
    server = lane.serve("127.0.0.1")
    endpoint = server.start(memory)
    monkeypatch.setattr(fake_cuda, "UUID", b"0123456789abcdef")
    with pytest.raises(TransferError, match="not visible"):
        lane.connect(endpoint, new_memory(), soon())
    server.close()


class FakeLibrary:
    """libcuda as ctypes sees it: two devices, an allocation of 1 MiB on the second, and the order of the calls."""

    def __init__(self) -> None:
        self.device = ctypes.create_string_buffer(bytes(range(256)) * 4096)
        self.base = ctypes.addressof(self.device)
        self.calls: list[str] = []
        self.fail = ""

    def __getattr__(self, name: str):
        function = getattr(type(self), f"_{name}", None)
        if name.startswith("_") or (function is None and name not in self.QUIET):
            raise AttributeError(name)

        def call(*arguments: object) -> int:
            self.calls.append(name)
            if name == self.fail:
                return 719
            return function(self, *arguments) or 0 if function is not None else 0

        return call

    QUIET = ("cuInit", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuStreamCreate", "cuStreamSynchronize",
             "cuStreamDestroy_v2", "cuDevicePrimaryCtxRetain", "cuIpcCloseMemHandle")  # fmt: skip

    def _cuPointerGetAttribute(self, into, _, pointer) -> None:
        into._obj.value = 1

    def _cuDeviceGetCount(self, into) -> None:
        into._obj.value = 2

    def _cuDeviceGet(self, into, ordinal) -> None:
        into._obj.value = ordinal

    def _cuDeviceGetUuid(self, into, device) -> None:
        into.raw = bytes([device.value]) * 16

    def _cuMemGetAddressRange_v2(self, base, size, pointer) -> None:
        base._obj.value = self.base

    def _cuIpcGetMemHandle(self, into, base) -> None:
        ctypes.memmove(ctypes.addressof(into._obj), b"handle".ljust(64, b"\0"), 64)

    def _cuIpcOpenMemHandle_v2(self, base, handle, flags) -> None:
        assert bytes(handle).startswith(b"handle")
        base._obj.value = self.base

    def _cuMemcpyDtoHAsync_v2(self, target, source, length, stream) -> None:
        ctypes.memmove(target.value, source.value, length.value)

    def _cuGetErrorName(self, status, into) -> None:
        into._obj.value = b"CUDA_ERROR_LAUNCH_FAILED"


def test_the_driver_is_called_in_the_order_that_it_asks_for() -> None:
    library = FakeLibrary()
    driver = CudaDriver(library)
    shared = driver.share(library.base + 512)
    assert shared == Shared(b"\1" * 16, b"handle".ljust(64, b"\0"), 512)
    view = driver.open(shared)
    into = ctypes.create_string_buffer(300)
    library.calls.clear()
    view.copy_to_host([0, 256], [ctypes.addressof(into), ctypes.addressof(into) + 100], [100, 200])
    assert into.raw == bytes(range(100)) + bytes(range(200))
    assert library.calls == [
        "cuCtxPushCurrent_v2", "cuStreamCreate", "cuMemcpyDtoHAsync_v2", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize",
        "cuStreamDestroy_v2", "cuCtxPopCurrent_v2",
    ]  # fmt: skip
    library.fail = "cuMemcpyDtoHAsync_v2"
    library.calls.clear()
    with pytest.raises(TransferError, match="LAUNCH_FAILED \\(719\\)"):
        view.copy_to_host([0], [ctypes.addressof(into)], [100])
    assert library.calls[-4:] == ["cuGetErrorName", "cuStreamSynchronize", "cuStreamDestroy_v2", "cuCtxPopCurrent_v2"]
    with pytest.raises(TransferError, match="not visible"):
        driver.open(shared._replace(device=b"\7" * 16))


GIVER = f"""
import json, sys, torch
from kvtransfer.lanes.registry import LANES
from tests.kvtransfer.world import new_memory
memory = new_memory(seed=1, num_blocks={NUM_BLOCKS}, block_bytes={BLOCK_BYTES})
unused = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
device = (255 - torch.from_numpy(memory.blocks)).cuda()
torch.cuda.synchronize()
memory.device_pointer = device.data_ptr()
endpoint = LANES["cuda_ipc"].serve("127.0.0.1").start(memory)
print(json.dumps([endpoint.lane, endpoint.address, endpoint.token]), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_blocks_come_out_of_another_process_gpu_until_it_is_killed() -> None:
    giver = subprocess.Popen(
        [sys.executable, "-c", GIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert giver.stdout is not None
    endpoint = LaneEndpoint(*json.loads(giver.stdout.readline()))
    target, expected = new_memory(), new_memory(seed=1)
    client = LANES["cuda_ipc"].connect(endpoint, target, soon())
    client.pull(READS, soon())
    assert (target.blocks == 255 - expected.blocks).all()
    giver.kill()
    giver.communicate(timeout=10)
    with pytest.raises(TransferError):
        client.pull(READS, soon())
    client.close()
