"""Runs in a pod of the cluster: streams without end, and writes one line of JSON an answer."""

import asyncio
import hashlib
import json
import sys
import time

from baton.client import AsyncClient, ClientError

PROMPTS = [f"Number {number}: what does the function do, and why? " * (2 + 7 * number) for number in range(6)]
MAX_TOKENS = 300


async def answer(client: AsyncClient, number: int) -> dict[str, object]:
    """What came, how long nothing came at worst, and why it ended early if it did: no text of either side."""
    text, pause_s, began = hashlib.sha256(), 0.0, time.monotonic()
    last, error = began, ""
    try:
        async for delta in client.complete(
            PROMPTS[number], model="demo", max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True
        ):
            now = time.monotonic()
            pause_s, last = max(pause_s, now - last), now
            text.update(delta.text.encode())
    except ClientError as failure:
        error = f"{failure.status} {failure}"
    return {
        "prompt": number, "text": text.hexdigest(), "pause_s": round(pause_s, 3),
        "took_s": round(time.monotonic() - began, 3), "error": error,
    }  # fmt: skip


async def stream(url: str, number: int) -> None:
    async with AsyncClient(url) as client:
        while True:
            found = await answer(client, number % len(PROMPTS))
            print(json.dumps(found), flush=True)
            number += 1
            if found["error"]:
                await asyncio.sleep(0.5)


async def main(url: str, num_streams: int) -> None:
    await asyncio.gather(*(stream(url, number) for number in range(num_streams)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
