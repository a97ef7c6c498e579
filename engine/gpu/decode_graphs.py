"""Steps of one token a sequence, recorded once for a few batch sizes and replayed.

Launching the kernels of such a step one by one takes longer than the device needs for them. A CUDA graph launches all
at once, but always with the same shapes and addresses: so the batch is padded to the next recorded size, and its
integers are copied to where the recording reads them.

    tokens  int32 [5 * largest]       the first 5 * size are those of a step of `size` rows, padding included
    tables  int32 [largest, widest]   blocks of each row's sequence; what is right of them, and in rows of padding, is
                                      left over from earlier steps and not read
"""

from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.gpu.batch import NUM_ROWS, Ints, padded
from kernels.gpu.ops import to_device

LARGEST = 256
"""Beyond it the device takes long enough to launch kernels meanwhile."""
Forward = Callable[[Tensor, Tensor], Tensor]
"""tokens [5, size] and tables [size, widest] to logits [size, vocab_size]."""
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""From a function that launches kernels to one that launches the same again and returns the same tensor."""


def graph_sizes(largest: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, 24, … up to `largest` rounded up: padding costs little where reading weights takes the time."""
    largest = min(largest, LARGEST)
    return (1, 2, 4, *range(8, largest + 8, 8)) if largest > 4 else (1, 2, 4)


class DecodeGraphs:
    def __init__(
        self, forward: Forward, sizes: tuple[int, ...], widest: int, device: torch.device, capture: Capture
    ) -> None:
        """Records every size at once. `sizes` ascending; `widest`: blocks of the longest sequence."""
        self._sizes = sizes
        self._tokens = torch.zeros(NUM_ROWS * sizes[-1], dtype=torch.int32, device=device)
        self._tables = torch.zeros(sizes[-1], widest, dtype=torch.int32, device=device)
        self._replays: dict[int, Callable[[], Tensor]] = {}
        # The largest first: the others find their memory among what it needed.
        for size in reversed(sizes):
            tokens = self._fill(np.zeros((NUM_ROWS, 0), np.int32), size)
            self._replays[size] = capture(partial(forward, tokens, self._tables[:size]))

    def fits(self, num_sequences: int) -> bool:
        return num_sequences <= self._sizes[-1]

    def run(self, tokens: Ints, tables: Ints) -> Tensor:
        """Logits [rows, vocab_size] of tokens [5, rows] with tables [rows, at most widest]; until the next run."""
        rows, width = tables.shape
        size = self._sizes[bisect_left(self._sizes, rows)]
        self._fill(tokens, size)
        self._tables[:rows, :width].copy_(to_device(self._tables.device, tables)[0])
        return self._replays[size]()[:rows]

    def _fill(self, tokens: Ints, size: int) -> Tensor:
        place = self._tokens[: NUM_ROWS * size].view(NUM_ROWS, size)
        place.copy_(to_device(place.device, padded(tokens, size))[0])
        return place


def cuda_capture(device: torch.device) -> Capture:
    """Recordings that share one pool of memory: only one at a time may be replayed, and its output used."""
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        function()  # compiles and tunes what cannot be done while recording
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = function()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    return capture
