"""A lane that misbehaves on purpose: wraps the client of another lane, so that tests see what a bad network does.

Which pull fails is scripted or drawn: `corrupt=3` is the third pull of this process, `corrupt=3-5` the third to the
fifth, `corrupt=3-` every one from the third on, and `corrupt=0.1` (with a point) each with that probability, from
`seed`. A retry is a pull of its own.

    drop       the first block never arrives, and the lane does not say so
    corrupt    one byte of the first block arrives flipped, and so does the same block whenever it is pulled again
    flip       one byte of the first block arrives flipped, this once
    misplace   the first and the last block land in each other's place
    delay      the pull starts `delay_s` (default 0.2) late
    stall      nothing arrives; the pull ends at its deadline
    duplicate  everything is copied twice
    reorder    the blocks are copied one by one in random order
    raise      the lane fails in mid-pull, with half of the blocks copied
    stale      the lane says that the peer reused a block
"""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baton.errors import ConfigurationError, TransferError
from kvtransfer.lanes.base import POLL_S, TO_END, BlockRead, LaneClient, check_still_wanted
from kvtransfer.memory import PoolMemory

log = logging.getLogger(__name__)

FAULTS = ("drop", "corrupt", "flip", "misplace", "delay", "stall", "duplicate", "reorder", "raise", "stale")


@dataclass(frozen=True, slots=True)
class When:
    """Pulls `first` to `last`, counted from 1, or each with `probability`."""

    first: int = 0
    last: float = 0
    probability: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "When":
        if "." in text:
            return cls(probability=float(text))
        first, dash, last = text.partition("-")
        return cls(int(first), float("inf") if dash and not last else int(last or first))

    def holds(self, pull: int, draw: random.Random) -> bool:
        return self.first <= pull <= self.last or draw.random() < self.probability


@dataclass(slots=True)
class FaultPlan:
    """Which faults happen when. One plan a process, shared by every client of its lane."""

    when: dict[str, When]
    seed: int = 0
    delay_s: float = 0.2
    injected: Counter[str] = field(default_factory=Counter)
    bad_reads: set[tuple[int, int, int]] = field(default_factory=set)  # (remote block, generation, offset)
    num_pulls: int = 0
    _draw: random.Random = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)

    @classmethod
    def parse(cls, query: str) -> "FaultPlan":
        """From `corrupt=3-&delay=0.5&seed=7`. Raises ConfigurationError."""
        plan = cls({})
        for word in filter(None, query.split("&")):
            name, _, value = word.partition("=")
            try:
                if name == "seed":
                    plan.seed = int(value)
                elif name == "delay_s":
                    plan.delay_s = float(value)
                elif name in FAULTS:
                    plan.when[name] = When.parse(value)
                else:
                    known = ", ".join((*FAULTS, "seed", "delay_s"))
                    raise ConfigurationError(f"--lanes: a faulty lane knows no '{name}'; choose from {known}")
            except ValueError as error:
                raise ConfigurationError(
                    f"--lanes: '{word}' needs a number such as {name}=3, {name}=3-5, {name}=3- or {name}=0.1"
                ) from error
        plan._draw = random.Random(plan.seed)
        return plan

    def next_faults(self) -> list[str]:
        """The faults of the next pull; every one drawn is logged and counted."""
        with self._lock:
            self.num_pulls += 1
            faults = [name for name, when in self.when.items() if when.holds(self.num_pulls, self._draw)]
            self.injected.update(faults)
            if faults:
                log.warning("faulty lane: pull %d suffers %s", self.num_pulls, ", ".join(faults))
            return faults

    def shuffled(self, reads: Sequence[BlockRead]) -> list[BlockRead]:
        with self._lock:
            return self._draw.sample(list(reads), len(reads))


class FaultyLaneClient(LaneClient):
    def __init__(self, inner: LaneClient, local: PoolMemory, plan: FaultPlan) -> None:
        self.name = f"faulty:{inner.name}"
        self._inner = inner
        self._local = local
        self._plan = plan

    def pull(self, reads: Sequence[BlockRead], deadline: float, cancelled: threading.Event | None = None) -> None:
        faults = self._plan.next_faults() if reads else []
        if "delay" in faults:
            _wait_until(min(deadline, time.monotonic() + self._plan.delay_s), cancelled)
        if "stall" in faults:
            _wait_until(deadline, cancelled)
            raise TransferError("faulty lane: stalled until the deadline")
        if "stale" in faults:
            raise TransferError(f"block {reads[0].remote_block} of the peer no longer holds what was offered")

        def copy(wanted: Sequence[BlockRead]) -> None:
            self._inner.pull(wanted, deadline, cancelled)

        if "raise" in faults:
            copy(reads[: len(reads) // 2])
            raise TransferError("faulty lane: failed in mid-pull")
        self._copy(copy, reads, faults)
        self._spoil(reads, faults)

    def _copy(self, copy: Callable[[Sequence[BlockRead]], None], reads: Sequence[BlockRead], faults: list[str]) -> None:
        if "drop" in faults:
            copy(reads[1:])
        elif "misplace" in faults and (last := _last_of_another_block(reads)):
            first, others = reads[0], [read for read in reads[1:] if read is not last]
            copy([first._replace(local_block=last.local_block), *others, last._replace(local_block=first.local_block)])
        elif "reorder" in faults:
            for read in self._plan.shuffled(reads):
                copy([read])
        else:
            copy(reads)
        if "duplicate" in faults:
            copy(reads)

    def _spoil(self, reads: Sequence[BlockRead], faults: list[str]) -> None:
        if "corrupt" in faults:
            self._plan.bad_reads.add((reads[0].remote_block, reads[0].remote_generation, reads[0].offset))
        for index, read in enumerate(reads):
            bad = (read.remote_block, read.remote_generation, read.offset) in self._plan.bad_reads
            if bad or ("flip" in faults and index == 0):
                end = self._local.block_bytes if read.num_bytes == TO_END else read.offset + read.num_bytes
                self._local.blocks[read.local_block, (read.offset + end) // 2] ^= 0x40

    def close(self) -> None:
        self._inner.close()


def _last_of_another_block(reads: Sequence[BlockRead]) -> BlockRead | None:
    return next((read for read in reversed(reads) if read.local_block != reads[0].local_block), None)


def _wait_until(moment: float, cancelled: threading.Event | None) -> None:
    while (left := moment - time.monotonic()) > 0:
        check_still_wanted(moment, cancelled)
        time.sleep(min(left, POLL_S))
