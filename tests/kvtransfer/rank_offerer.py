"""One rank that offers, as a process: `python -m tests.kvtransfer.rank_offerer '{...}'`.

Settings: "layout", the fields of a BlockLayout; "blocks", a file with the bytes of its pool; "lanes"; "takers", [worker
id, incarnation] of each rank of the other side. It prints its address, does what each line of its standard input says:
["open", id], ["offer", id, first, [block ids]], ["close", id, num_blocks, num_tokens, first_token_id], and prints what
the owner of the blocks is told.
"""

import asyncio
import json
import sys
from dataclasses import replace

import numpy as np

from kvtransfer.lanes.registry import parse_lanes
from kvtransfer.layout import BlockLayout
from kvtransfer.memory import PoolMemory
from kvtransfer.offers import OfferServer
from kvtransfer.ranks import RankOffers
from kvtransfer.wire import PeerIdentity, PeerRef
from tests.kvtransfer.offerer import Printer
from tests.kvtransfer.world import OPTIONS


async def main(settings: dict[str, object]) -> None:
    layout = BlockLayout(**settings["layout"])
    blocks = np.load(settings["blocks"])
    memory = PoolMemory.create(*blocks.shape)
    memory.blocks[:] = blocks
    takers = [PeerRef(worker_id, incarnation, "") for worker_id, incarnation in settings["takers"]]
    owner = Printer()
    ranks = RankOffers(layout, owner.on_released, owner.on_quarantined, owner.on_resolved)
    offers = OfferServer(
        PeerIdentity(f"prefill-{layout.tp_rank}", 11), layout, memory,
        [lane.serve("127.0.0.1") for lane in parse_lanes(settings["lanes"])], replace(OPTIONS, lanes=settings["lanes"]),
        {}, ranks.on_part_released, ranks.on_part_quarantined, ranks.on_part_resolved,
    )  # fmt: skip
    ranks.serve_offers(offers)
    print(json.dumps({"address": await offers.start("127.0.0.1")}), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command, handover_id, *rest = json.loads(line)
        if command == "open":
            ranks.open(handover_id, takers)
        elif command == "offer":
            ranks.offer(handover_id, *rest, memory.generations[rest[1]].tolist())
        elif command == "close":
            ranks.close(handover_id, *rest, 0)
    await offers.stop()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
