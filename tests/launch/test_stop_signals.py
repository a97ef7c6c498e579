"""What a process of ours makes of signals that come more than once."""

import subprocess
import sys

import pytest

PROGRAM = """
import asyncio
from baton.processes import stop_signals
async def main():
    stop = stop_signals()
    print("ready", flush=True)
    await stop.wait()
    print("asked", flush=True)
    await asyncio.sleep(0.5)
    print("drained", flush=True)
asyncio.run(main())
"""


@pytest.mark.parametrize(("second", "status"), [("terminate", 0), ("interrupt", 130)])
def test_a_second_sigterm_is_the_same_request_and_a_sigint_after_it_is_an_end(second: str, status: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.stdout.readline() == "asked\n"
    process.terminate() if second == "terminate" else process.send_signal(2)
    assert process.wait(20) == status
    assert ("drained" in process.stdout.read()) is (status == 0)
