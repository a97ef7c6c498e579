"""Seconds on a GPU, the limits that they are compared with, and the time that a run may take."""

import time
from collections.abc import Callable

import torch

ROUNDS = 3


class Budget:
    """`left` before the run has to end; a part that does not fit is left out, and said so."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


def seconds(function: Callable[[], object], repeats: int = 10) -> float:
    """Of one call: the best of a few rounds of calls in a row, by the device's clock."""
    function()
    best = float("inf")
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1000 / repeats)
    return best


def copy_bandwidth() -> float:
    """Bytes read and written in a second by a copy far larger than any cache."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def matmul_rate() -> float:
    """bfloat16 FLOP/s of a large square product of random numbers."""
    size = 8192
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / seconds(lambda: torch.mm(left, right, out=out))
