"""Which lane to a peer is used: the best that both sides have and that really works.

A lane of one host that reaches the peer wins over any network and is not measured. Of several networks the faster one
wins, and the earlier one in --lanes of two that are about as fast: a few MiB are pulled by each into memory that is
thrown away. So a network that works but crawls (a missing driver, a wrong device) is not found out by its users.
"""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from baton.errors import ConfigurationError, TransferError
from kvtransfer.lanes.base import ANY_GENERATION, BlockRead, LaneClient, LaneEndpoint, OtherHostError
from kvtransfer.lanes.registry import Lane
from kvtransfer.memory import PoolMemory

log = logging.getLogger(__name__)

PROBE_BYTES: Final = 4 << 20
CONNECT_S: Final = 2.0
"""Some lanes load a library when they connect for the first time."""
PROBE_S: Final = 0.5
"""Longest that measuring one lane may take once it is connected."""
CLEARLY_FASTER: Final = 1.2


@dataclass(slots=True)
class Choice:
    """The lane in use, and why the others are not.

    is_fallback: a lane that comes before it failed although the peer serves it, and not for being on another host.
    """

    client: LaneClient
    speed: float | None = None
    """Bytes a second, where it was measured."""
    passed_over: dict[str, str] = field(default_factory=dict)
    is_fallback: bool = False

    def __str__(self) -> str:
        speed = f" at {self.speed / 1e9:.2g} GB/s" if self.speed else ""
        others = "; ".join(f"not {name}: {reason}" for name, reason in self.passed_over.items())
        return f"lane {self.client.name}{speed}" + (f" ({others})" if others else "")


def open_best(
    lanes: Sequence[Lane], endpoints: Mapping[str, LaneEndpoint], local: PoolMemory, timeout_s: float
) -> Choice:
    """Connect by the best of `lanes`; each attempt takes `timeout_s` at most. Raises TransferError when none works."""
    passed_over = {lane.name: "the peer does not serve it" for lane in lanes if lane.name not in endpoints}
    shared = [lane for lane in lanes if lane.name in endpoints]
    speeds: dict[str, float] = {}
    is_fallback = False

    def attempt(candidates: Sequence[Lane]) -> Choice | None:
        nonlocal is_fallback
        for lane in candidates:
            try:
                client = lane.connect(endpoints[lane.name], local, time.monotonic() + timeout_s)
            except TransferError as error:
                passed_over[lane.name] = str(error)
                is_fallback |= not isinstance(error, OtherHostError)
                continue
            for name, speed in speeds.items():
                if name != lane.name:
                    passed_over.setdefault(
                        name, f"{speed / 1e9:.2g} GB/s" if speed else "it did not move its first MiBs"
                    )
            return Choice(client, speeds.get(lane.name), passed_over, is_fallback)
        return None

    choice = attempt([lane for lane in shared if lane.one_host])
    if choice is None:
        networks = [lane for lane in shared if not lane.one_host]
        if len(networks) > 1:
            speeds = {lane.name: _speed(lane, endpoints[lane.name], local.block_bytes) for lane in networks}
            networks = _by_speed(networks, speeds)
        choice = attempt(networks)
    if choice is None:
        raise TransferError("; ".join(f"{name}: {reason}" for name, reason in passed_over.items()))
    return choice


def _by_speed(lanes: Sequence[Lane], speeds: Mapping[str, float]) -> list[Lane]:
    """Fastest first; the earlier one where no other is clearly faster."""
    ranked: list[Lane] = []
    for lane in lanes:
        slower = (
            place for place, other in enumerate(ranked) if speeds[lane.name] > CLEARLY_FASTER * speeds[other.name]
        )
        ranked.insert(next(slower, len(ranked)), lane)
    return ranked


def _speed(lane: Lane, endpoint: LaneEndpoint, block_bytes: int) -> float:
    """Bytes a second that a lane moves out of the peer's first block; 0 where it moves nothing in PROBE_S."""
    num_blocks, num_bytes = max(1, PROBE_BYTES // block_bytes), min(block_bytes, PROBE_BYTES)
    reads = [BlockRead(0, ANY_GENERATION, block, num_bytes=num_bytes) for block in range(num_blocks)]
    try:
        with contextlib.ExitStack() as stack:
            thrown_away = PoolMemory.create(num_blocks, block_bytes)
            stack.callback(thrown_away.close)
            client = lane.connect(endpoint, thrown_away, time.monotonic() + CONNECT_S)
            stack.callback(client.close)
            deadline = time.monotonic() + PROBE_S
            client.pull(reads[:1], deadline)  # opens what is opened at first use
            start = time.monotonic()
            client.pull(reads, deadline)
            return num_blocks * num_bytes / (time.monotonic() - start)
    except (TransferError, ConfigurationError) as error:
        log.info("lane %s was tried and is not fit: %s", lane.name, error)
        return 0.0
