"""The few calls of the CUDA driver that lane `cuda_ipc` needs, by ctypes: this package knows no torch.

Everything happens in the device's primary context, which torch uses too. Memory is shared by CUDA's legacy handles for
communication between processes: of one allocation, for processes of one host that see the device or reach it as a peer.
"""

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

from baton.errors import ConfigurationError, TransferError

HANDLE_BYTES: Final = 64
_UUID_BYTES: Final = 16
_DEVICE_ORDINAL: Final = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_NON_BLOCKING: Final = 1  # CU_STREAM_NON_BLOCKING
_ENABLE_PEER_ACCESS: Final = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class Shared(NamedTuple):
    """What another process needs to find some device memory again."""

    device: bytes
    """UUID, 16 bytes."""
    handle: bytes
    """Of the allocation, HANDLE_BYTES."""
    offset: int
    """In it, bytes."""


class DeviceView:
    """Device memory of another process, readable until `close`."""

    def __init__(self, driver: "CudaDriver", context: ctypes.c_void_p, base: int, offset: int) -> None:
        self._driver = driver
        self._context = context
        self._base = base
        self.address = base + offset

    def copy_to_host(self, starts: Sequence[int], targets: Sequence[int], lengths: Sequence[int]) -> None:
        """Bytes from `starts` on, counted from `address`, to host addresses; done when it returns, or raises.

        The host memory should be registered with CUDA: else the driver copies in small pieces. Raises TransferError.
        """
        self._driver.copy_to_host(self._context, [self.address + start for start in starts], targets, lengths)

    def close(self) -> None:
        self._driver.close_handle(self._context, self._base)


class CudaDriver:
    """Raises TransferError for every call that fails, with CUDA's name for the reason."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Raises TransferError where there is no working device."""
        self._library = library
        self._call("cuInit", 0)

    def share(self, pointer: int) -> Shared:
        """`pointer`: device address of this process, in an allocation made by cudaMalloc (torch's usual one)."""
        ordinal, base, size = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_size_t()
        self._call("cuPointerGetAttribute", ctypes.byref(ordinal), _DEVICE_ORDINAL, ctypes.c_uint64(pointer))
        handle = _Handle()
        with self._current(self._context(ordinal.value)):
            self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(pointer))
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        return Shared(self._uuid(ordinal.value), bytes(handle), pointer - base.value)

    def open(self, shared: Shared) -> DeviceView:
        """Map what another process shares; a process cannot open its own."""
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        ordinal = next((each for each in range(count.value) if self._uuid(each) == shared.device), None)
        if ordinal is None:
            raise TransferError("the peer's GPU is not visible to this process")
        context, base = self._context(ordinal), ctypes.c_uint64()
        with self._current(context):
            handle = _Handle.from_buffer_copy(shared.handle)
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(base), handle, _ENABLE_PEER_ACCESS)
        return DeviceView(self, context, base.value, shared.offset)

    def close_handle(self, context: ctypes.c_void_p, base: int) -> None:
        with self._current(context):
            self._call("cuIpcCloseMemHandle", ctypes.c_uint64(base))

    def copy_to_host(
        self, context: ctypes.c_void_p, sources: Sequence[int], targets: Sequence[int], lengths: Sequence[int]
    ) -> None:
        stream = ctypes.c_void_p()
        with self._current(context):
            self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
            try:
                for source, target, length in zip(sources, targets, lengths, strict=True):
                    self._call(
                        "cuMemcpyDtoHAsync_v2", ctypes.c_void_p(target), ctypes.c_uint64(source),
                        ctypes.c_size_t(length), stream,
                    )  # fmt: skip
            finally:  # what was begun is still written until here
                self._call("cuStreamSynchronize", stream)
                self._call("cuStreamDestroy_v2", stream)

    @functools.cache  # noqa: B019 - there is one driver a process
    def _context(self, ordinal: int) -> ctypes.c_void_p:
        """The primary context, kept for the life of the process."""
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device(ordinal))
        return context

    def _device(self, ordinal: int) -> ctypes.c_int:
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        return device

    def _uuid(self, ordinal: int) -> bytes:
        uuid = ctypes.create_string_buffer(_UUID_BYTES)
        self._call("cuDeviceGetUuid", uuid, self._device(ordinal))
        return uuid.raw

    @contextmanager
    def _current(self, context: ctypes.c_void_p) -> Iterator[None]:
        """The context of this thread, within."""
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: object) -> None:
        try:
            status = getattr(self._library, name)(*arguments)
        except AttributeError as error:
            raise TransferError(f"the CUDA driver has no {name}") from error
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(text))
            raise TransferError(f"{name}: {(text.value or b'error').decode()} ({status})")


@functools.cache
def load() -> CudaDriver:
    """The driver of this machine. Raises ConfigurationError where there is none."""
    try:
        return CudaDriver(ctypes.CDLL("libcuda.so.1"))
    except (OSError, TransferError) as error:
        raise ConfigurationError(f"there is no CUDA driver here: {error}") from error
