"""Where blocks live on that the pool has no room for, as the scheduler sees it.

Blocks are reported (`StepOutput.named`) when they get their name or, where asked for, when they come near to eviction;
those of a preempted request at once. Whoever keeps them copies them while their generation stands. Stored blocks of a
prompt are brought back as those of another worker are: the request reserves its blocks, and waits for `Engine.receive`.
"""

from collections.abc import Sequence
from typing import Protocol


class BlockStore(Protocol):
    def worth_loading(self, names: Sequence[bytes], compute_s: float | None) -> int:
        """How many of these leading blocks are stored and come sooner than they are computed. Never waits.

        `compute_s`: seconds that computing one block takes; None while that is unknown.
        """
