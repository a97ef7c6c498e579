"""Blocks of this worker's prefix cache for other workers that ask for them by name.

1. Asked: how many leading blocks the cache has is said at once, in the middle of a step.
2. Between two steps the engine takes a lease on those that are still there. A lease is a lease: the blocks keep their
   content until the reader releases them, dies, or lets it expire.
3. They are offered in parts, so that the first are pulled while the checksums of others are computed, and closed.
"""

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from engine.engine import Engine
from engine.requests import LeasedBlocks
from kvtransfer.offers import OfferServer
from kvtransfer.wire import PeerIdentity, PeerRef
from worker.step_loop import StepLoop

log = logging.getLogger(__name__)
MAX_READERS = 64
"""Fetches from here at one time; to those that come on top this worker has nothing."""
OFFER_BLOCKS = 32


class PrefixServer:
    """Runs on the asyncio thread. Its `on_lease_*` hear of all leases, and mind those that are its own."""

    def __init__(self, engine: Engine, steps: StepLoop, counters: dict[str, float]) -> None:
        self._num_held = engine.num_held
        self._steps = steps
        self._counters = counters
        self._offers: OfferServer | None = None
        self._leases: dict[str, bool] = {}
        """By hand-over: whether the engine has taken the lease."""
        self.lends = True
        """False once this worker is about to end: nobody new is let in."""

    def serve_offers(self, offers: OfferServer) -> None:
        """The server that blocks are offered through; its callbacks are `on_ask` and `on_lease_*`."""
        self._offers = offers

    @property
    def offers(self) -> OfferServer:
        assert self._offers is not None, "serve_offers comes before the first peer"
        return self._offers

    def on_ask(self, key: str, peer: PeerIdentity, names: Sequence[bytes]) -> None:
        lends = self.lends and len(self._leases) < MAX_READERS and key not in self._leases
        num_blocks = self._num_held(names) if lends else 0
        self.offers.found(key, num_blocks)
        if num_blocks:
            self._leases[key] = False
            loop, wanted = asyncio.get_running_loop(), names[:num_blocks]

            def lease(engine: Engine) -> None:
                loop.call_soon_threadsafe(partial(self._offer, key, peer), engine.lease(key, wanted))

            self._steps.submit(lease)

    def _offer(self, key: str, peer: PeerIdentity, leased: LeasedBlocks) -> None:
        num_blocks = len(leased.block_ids)
        self._leases[key] = num_blocks > 0
        is_awaited = self.offers.is_awaited(key)
        try:
            self.offers.open(key, PeerRef(peer.worker_id, peer.incarnation, ""))
        except ValueError as error:
            log.warning("a fetch is not served: %s", error)
            self.on_lease_released(key, False)
            return
        if not is_awaited:
            self.offers.fail(key, "nobody waits for it any more")
            return
        for first in range(0, num_blocks, OFFER_BLOCKS):
            part = slice(first, first + OFFER_BLOCKS)
            self.offers.offer(key, first, leased.block_ids[part], leased.generations[part])
        self.offers.close(key, num_blocks, 0, 0, 0)
        self._counters["prefix_blocks_lent"] += num_blocks

    def unfinished(self) -> int:
        """Readers that still need this process."""
        return len(self._leases)

    def on_lease_released(self, key: str, verified: bool) -> None:
        """The reader is done, or can read no more."""
        if self._leases.pop(key, False):
            self._steps.submit(lambda engine: (engine.release_lease(key), engine.resolve(key)))

    def on_lease_quarantined(self, key: str) -> None:
        """The lease ended while the reader may still be at it."""
        if self._leases.get(key):
            self._steps.submit(lambda engine: engine.quarantine_lease(key))

    def on_lease_resolved(self, key: str) -> None:
        """Nobody can read the blocks of an ended lease any more."""
        self.on_lease_released(key, False)
