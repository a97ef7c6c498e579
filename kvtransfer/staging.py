"""Blocks of a peer that lays KV out differently: they land in memory set aside, are checked there, then converted.

Their checksums are of the peer's bytes, so a block is taken in whole, also where only some of its heads are needed.
The places are credits: what may be under way at one time is bounded, however many peers and hand-overs there are.
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from baton.errors import ConfigurationError, PeerError, TransferError
from kvtransfer.conversion import Conversion, Row, plan
from kvtransfer.lanes.base import POLL_S, LaneClient, check_still_wanted
from kvtransfer.layout import BlockLayout
from kvtransfer.memory import PoolMemory
from kvtransfer.pulls import PullOutcome, WantedBytes, pull_and_verify

STAGING_BYTES = 64 << 20
"""For all peers with one size of block, taken when the first of them connects."""
MAX_STAGED_BYTES = 4 << 20
"""Of one pull: the bytes are still in the core's cache when they are converted."""
MAX_SIZES = 4
"""Sizes of block that get staging memory."""


class Staging:
    """Places for blocks of one size, lent to one pull at a time. Used by the threads that pull."""

    def __init__(self, block_bytes: int) -> None:
        """Raises PeerError for a block that is larger than staging memory may be, and where there is no memory."""
        if block_bytes > STAGING_BYTES:
            raise PeerError(f"a block of the peer has {block_bytes} bytes, more than the {STAGING_BYTES} set aside")
        try:
            self.memory = PoolMemory.create(STAGING_BYTES // block_bytes, block_bytes)
        except ConfigurationError as error:
            raise PeerError(f"no staging memory: {error}") from error
        self.max_lent = max(1, MAX_STAGED_BYTES // block_bytes)
        self._free = list(range(self.memory.num_blocks))
        self._given_back = threading.Condition()

    @contextlib.contextmanager
    def lend(self, max_places: int, deadline: float, cancelled: threading.Event) -> Iterator[list[int]]:
        """At least one place, at most `max_places`. Raises TransferError when none is free before `deadline`."""
        with self._given_back:
            while not self._free:
                if time.monotonic() > deadline:
                    raise TransferError("no staging memory came free before the deadline")
                check_still_wanted(deadline, cancelled)
                self._given_back.wait(POLL_S)
            places, self._free = self._free[:max_places], self._free[max_places:]
        try:
            yield places
        finally:
            with self._given_back:
                # Last given back, first lent: those bytes are in a cache. In order, so that neighbours stay together.
                self._free = places + self._free
                self._given_back.notify()


@dataclass(frozen=True, slots=True)
class Converter:
    """What a link to a peer of another layout pulls with."""

    conversion: Conversion
    staging: Staging
    memory: PoolMemory

    def pull(
        self,
        client: LaneClient,
        wanted: Sequence[WantedBytes],
        first: int,
        row: Row,
        deadline: float,
        cancelled: threading.Event,
    ) -> PullOutcome:
        """As `pull_and_verify`, of as many blocks as there are places for; `num_verified` of them are in the row, too.

        `client` writes into the staging memory; `first` is the position of `wanted[0]`, which like all that follow it
        without a gap is a whole block, in the peer's row.
        """
        start = time.monotonic()
        outcome = PullOutcome(0, 0, 0, 0.0, None)
        failure = None
        try:
            with self.staging.lend(min(len(wanted), self.staging.max_lent), deadline, cancelled) as places:
                staged = [_landing_at(place, block) for place, block in zip(places, wanted, strict=False)]
                outcome = pull_and_verify(client, self.staging.memory, staged, deadline, cancelled)
                arrived = places[: outcome.num_verified]
                self.conversion.convert(self.staging.memory.blocks, arrived, first, self.memory.blocks, row)
        except TransferError as error:
            outcome, failure = replace(outcome, num_verified=0), str(error)
        return replace(outcome, seconds=time.monotonic() - start, failure=outcome.failure or failure)


def _landing_at(place: int, block: WantedBytes) -> WantedBytes:
    return WantedBytes(block.read._replace(local_block=place), block.parts)


class Converters:
    """Makes a link's converter. Staging memory is shared by links with one size of block, and kept until `close`."""

    def __init__(self, here: BlockLayout, memory: PoolMemory, other_dtypes: bool) -> None:
        """`memory`: this worker's pool. `other_dtypes`: see `kvtransfer.layout.obstacle`."""
        self._here = here
        self._memory = memory
        self._other_dtypes = other_dtypes
        self._staging: dict[int, Staging] = {}
        self._lock = threading.Lock()

    def for_peer(self, layout: BlockLayout) -> Converter | None:
        """None when the peer's blocks can be copied as they are. Raises PeerError when they are of no use here.

        The first peer with a new size of block costs some milliseconds: its staging memory is taken from the system.
        """
        conversion = plan(self._here, layout, self._other_dtypes)
        if conversion is None:
            return None
        with self._lock:
            staging = self._staging.get(layout.block_bytes)
            if staging is None:
                if len(self._staging) >= MAX_SIZES:
                    raise PeerError(
                        f"blocks of {MAX_SIZES} other sizes have come in already; give workers fewer different "
                        "--page-size, or restart this one"
                    )
                staging = self._staging[layout.block_bytes] = Staging(layout.block_bytes)
        return Converter(conversion, staging, self._memory)

    def close(self) -> None:
        """Nobody is pulling any more."""
        for staging in self._staging.values():
            staging.memory.close()
        self._staging.clear()
