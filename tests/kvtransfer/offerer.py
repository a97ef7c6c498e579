"""The offering side as a process: `python -m tests.kvtransfer.offerer '{"lanes": "tcp"}'`.

It prints its address, then does what each line of its standard input says: ["open", id], ["offer", id, first, [block
ids]], ["close", id, num_blocks], and prints what the owner of the blocks is told.
"""

import asyncio
import json
import sys
from dataclasses import replace

from kvtransfer.offers import OfferServer
from kvtransfer.wire import PeerIdentity
from tests.kvtransfer import world


class Printer(world.Owner):
    def _add(self, *event: str) -> None:
        print(json.dumps({"event": event}), flush=True)


async def main(settings: dict[str, object]) -> None:
    incarnation, address = settings.pop("incarnation", 11), settings.pop("address", None)
    world.PREFILL = PeerIdentity("prefill-0", incarnation)
    layout = replace(world.LAYOUT, **settings.pop("layout", {}))
    num_blocks, block_bytes = settings.pop("shape", (world.NUM_BLOCKS, layout.block_bytes))
    memory = world.new_memory(seed=settings.pop("seed", 1), num_blocks=num_blocks, block_bytes=block_bytes)
    options = replace(world.OPTIONS, **settings)
    offers: OfferServer = world.offer_server(memory, Printer(), {}, options, layout)
    port = int(address.rpartition(":")[2]) if address else 0  # that of the worker which this one replaces
    print(json.dumps({"incarnation": incarnation, "address": await offers.start("127.0.0.1", port)}), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command, handover_id, *rest = json.loads(line)
        if command == "open":
            offers.open(handover_id, world.DECODE_REF)
        elif command == "offer":
            offers.offer(handover_id, *rest, memory.generations[rest[1]].tolist())
        elif command == "close":
            offers.close(handover_id, rest[0], rest[0] * 16, 7, 0)
    await offers.stop()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
