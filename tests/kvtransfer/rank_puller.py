"""One rank that takes a hand-over in, as a process: `python -m tests.kvtransfer.rank_puller '{...}'`.

Settings: "layout", the fields of a BlockLayout; "givers", [worker id, incarnation, address] of each rank of the other
side; "lanes"; "num_blocks" of its pool, "row", the blocks of it that hand-over "h" fills, and "into", a file for what
the pool holds in the end. It prints how many blocks have arrived whenever that changes, and how it ended.
"""

import asyncio
import json
import sys
import time
from dataclasses import replace

import numpy as np

from kvtransfer.intake import Intake
from kvtransfer.lanes.registry import parse_lanes
from kvtransfer.layout import BlockLayout
from kvtransfer.memory import PoolMemory
from kvtransfer.ranks import RankIntake
from kvtransfer.wire import PeerIdentity, PeerRef
from tests.kvtransfer.world import OPTIONS


async def main(settings: dict[str, object]) -> None:
    layout = BlockLayout(**settings["layout"])
    memory = PoolMemory.create(settings["num_blocks"], layout.block_bytes)
    memory.blocks[:] = 0x77
    counters: dict[str, float] = {}
    me, lanes = PeerIdentity(f"decode-{layout.tp_rank}", 22), parse_lanes(settings["lanes"])
    intake = Intake(me, layout, memory, lanes, replace(OPTIONS, lease_s=5.0), counters, other_dtypes=True)
    ranks = RankIntake(intake, layout, counters)
    peers = [PeerRef(*giver) for giver in settings["givers"]]
    task = asyncio.create_task(ranks.take("h", peers, settings["row"], 0, time.monotonic() + 20))
    before = 0.0
    while not task.done():
        await asyncio.wait([task], timeout=0.005)
        if (arrived := counters.get("handover_blocks_received", 0.0)) != before:
            print(json.dumps({"arrived": arrived}), flush=True)
            before = arrived
    result = await task
    await intake.stop()
    np.save(settings["into"], memory.blocks)
    ending = {
        "num_blocks": result.num_blocks,
        "num_tokens": result.num_tokens,
        "first_token_id": result.first_token_id,
        "failure": result.failure,
        "same_bits": result.same_bits,
    }
    print(json.dumps({"ended": ending}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
