"""Clients that hang up leave nothing behind: in whatever phase their streams are, and however many at once."""

import json
import subprocess
import sys
from collections import defaultdict

import pytest

from tests.system.hang_ups import SHAPES, Freed

NUM_CLIENTS = 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "gap_s"), [("prefill_is_busy", 0.0), ("decode_is_busy", 0.0), ("decode_is_busy", 0.005)]
)
def test_200_clients_hang_up_and_every_block_is_free_one_step_after_the_abort(shape: str, gap_s: float) -> None:
    """A step runs to its end; what the abort is about is free before the next one begins.

    Where a transfer is under way, or a reader has yet to say that it wants nothing, it takes that message as well.
    """
    command = [sys.executable, "-m", "tests.system.hang_ups", "--shape", shape, "--gap-s", str(gap_s)]
    ended = subprocess.run(
        [*command, "--clients", str(NUM_CLIENTS)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    seen = json.loads(ended.stdout)
    by_phase = defaultdict(list)
    for freed in (Freed(**each) for each in seen["freed"]):
        by_phase[freed.worker, freed.phase].append(freed)
    print(f"\n{shape}, a hang-up every {gap_s} s. At the first: {seen['phases']}. Longest step, ms: {seen['step_ms']}")
    for (worker, phase), group in sorted(by_phase.items()):
        print(
            f"{worker:8} {phase:13} {len(group):4}: at most {max(each.steps for each in group)} steps and "
            f"{max(each.ms for each in group):.0f} ms after the abort, "
            f"{max(each.ms_from_hang_up for each in group):.0f} ms after the hang-up"
        )
    # The streams were where they should be, and all of them were looked at.
    assert seen["phases"].keys() >= SHAPES[shape].phases
    assert sum(len(group) for (worker, _), group in by_phase.items() if worker == "decode") == NUM_CLIENTS
    for (_, phase), group in by_phase.items():
        assert phase in ("handing over", "leased") or max(each.steps for each in group) <= 1
        assert max(each.ms_from_hang_up for each in group) < 5000, "not by a message, but when the lease ended"
    assert seen["coordinator_requests"] == 0
