"""What differs between a GPU and a CPU that stands in for one: pinned memory, and knowing when work is done.

Everything is in the order of one stream, so nothing here waits for the device but `HostCopy.wait`.
"""

import time

import torch
from torch import Tensor

from baton.errors import BatonError, ConfigurationError

DEVICE_TIMEOUT_S = 120.0
"""A step that takes longer means a device that hangs: the process ends, and others take its requests over."""
POLL_S = 20e-6


class DeviceError(BatonError):
    """The device does not answer."""


def choose_device(name: str) -> torch.device:
    """'cpu', 'cuda', or 'auto': cuda where there is one. Raises ConfigurationError for cuda where there is none."""
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ConfigurationError("--device is cuda, but torch finds no CUDA device; use --device cpu")
    if name == "cpu" or not found:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


class HostCopy:
    """The content that `source` has at this point of the stream, on its way to the host."""

    def __init__(self, source: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if source.is_cuda:
            self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._host.copy_(source, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()
        else:
            self._host = source.clone()

    def wait(self) -> Tensor:
        """Raises DeviceError when it does not come in DEVICE_TIMEOUT_S."""
        if self._done is not None:
            wait_for(self._done)
        return self._host


def mark_stream(device: torch.device) -> torch.cuda.Event | None:
    """Tells when all that was launched on the device so far is done; None where that is so already."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def wait_for(event: torch.cuda.Event) -> None:
    """`Event.synchronize` with a deadline. Raises DeviceError."""
    deadline = time.monotonic() + DEVICE_TIMEOUT_S
    while not event.query():  # type: ignore[no-untyped-call]
        if time.monotonic() > deadline:
            raise DeviceError(f"the device has not finished a step in {DEVICE_TIMEOUT_S:g} s")
        time.sleep(POLL_S)
