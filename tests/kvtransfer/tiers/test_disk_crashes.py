"""A disk tier whose process dies anywhere comes back with blocks that are right or missing, and works on."""

import random
import signal
import subprocess
import sys
from collections import Counter

import pytest

from tests.kvtransfer.tiers.disk_world import (
    BLOCK_BYTES,
    allocated_bytes,
    block_of,
    capacity_of,
    count,
    load,
    loaded,
    name_of,
    open_tier,
    settle,
    soon,
)
from tests.kvtransfer.tiers.faulty_files import FaultyFiles

NAMES = range(40)
CRASHES = 32


def live_until_the_crash(tier, draw):
    """Puts and gets until nothing reaches the disk any more."""
    while not tier._files.crashed:
        number = draw.choice(NAMES)
        if draw.random() < 0.7:
            tier.put(name_of(number), block_of(name_of(number)))
            settle(tier)
        else:
            load(tier, number)


@pytest.mark.parametrize("chain", range(8))
def test_after_a_crash_at_any_operation_and_byte_every_block_is_right_or_missing(tmp_path, chain):
    """32 deaths in a row in one folder, each at a random operation, half of them with the power gone, too."""
    draw, totals = random.Random(chain), Counter()
    for death in range(CRASHES):
        seed = chain * 1000 + death
        crash_after = draw.randrange(50)
        tier = open_tier(tmp_path, open_files=lambda folder: FaultyFiles(folder, seed, crash_after))  # noqa: B023
        live_until_the_crash(tier, draw)
        files = tier._files
        tier.close(soon())
        if draw.random() < 0.5:
            files.lose_unsynced(kept_share=draw.choice([0.0, 0.5, 0.95]))

        again = open_tier(tmp_path)
        claimed = [number for number in NAMES if again.holds([name_of(number)])[0]]
        right = loaded(again, NAMES)
        assert set(right) <= set(claimed)
        assert count(again, "checksum_failures") == len(claimed) - len(right)
        assert allocated_bytes(tmp_path) <= capacity_of(6)
        assert count(again, "bytes") <= capacity_of(6)
        fresh = 1000 + seed
        again.put(name_of(fresh), block_of(name_of(fresh)))
        settle(again)
        assert load(again, fresh)
        assert again.status.state.value == "on"
        again.close(soon())
        totals.update(claimed=len(claimed), right=len(right), power=bool(files._unsynced))
    assert totals["right"] > CRASHES, "hardly anything survived, so hardly anything was shown"
    assert totals["claimed"] > totals["right"], "no claim was ever wrong, so checking them was not shown"


WRITER = """
import sys
from pathlib import Path
from tests.kvtransfer.tiers.disk_world import block_of, name_of, open_tier
tier = open_tier(Path(sys.argv[1]), block_bytes=int(sys.argv[2]), num_writers=4)
number, is_ready = 0, False
while True:
    if not is_ready and tier.counters["kv_disk_stored"] > 10:
        is_ready = True
        print("ready", flush=True)
    number = (number + 1) % 40
    tier.put(name_of(number), block_of(name_of(number), tier.block_bytes))
"""


@pytest.mark.parametrize("block_bytes", [BLOCK_BYTES, 256 << 10])
def test_a_writer_that_is_killed_leaves_right_blocks(tmp_path, block_bytes):
    for wait_s in (0.05, 0.1, 0.15):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(block_bytes)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            assert writer.stdout.readline() == b"ready\n"
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(wait_s)
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.communicate(timeout=10)
        assert writer.returncode == -signal.SIGKILL
        tier = open_tier(tmp_path, block_bytes=block_bytes)
        assert loaded(tier, NAMES)
        assert count(tier, "checksum_failures") <= 12, "no more than what four threads were writing, three times"
        assert len(list(tmp_path.iterdir())) == 1, "the lock of a dead process is free"
        tier.close(soon())
