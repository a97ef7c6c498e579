"""A process that sends: `python -m cli.bench.client`, started by `baton bench`, told by its standard input what to do.

    baton bench        Job ──▶   Go ──▶        (Stop ──▶)
    this process           ◀── Ready   ◀── Ended …   ◀── Ended, Done

When its input ends, whoever started it is gone, and it ends as well.
"""

import asyncio
import contextlib
import gc
import itertools
import sys
from collections import Counter
from functools import partial
from urllib.parse import urlsplit

import uvloop

from baton.client import trusting
from baton.processes import log_to_stderr, raise_descriptor_limit
from cli.bench.asking import PATHS
from cli.bench.files import Asked, read
from cli.bench.frames import Done, Ended, Go, Job, Ready, Target, next_frame, packed
from cli.bench.http_stream import HttpTransport
from cli.bench.load import Load
from cli.bench.measuring import Record
from cli.bench.stream import Transport
from cli.bench.workload import sessions, warmup

TELL_INTERVAL_S = 0.25
MAX_TOLD = 20_000
"""Records in one message."""


def transport_of(target: Target, path: str) -> Transport:
    parts = urlsplit(target.url)
    if parts.scheme.startswith("grpc"):
        from cli.bench.grpc_stream import GrpcTransport, open_channel, read_ca  # gRPC is slow to import

        metadata = (("authorization", target.authorization),) if target.authorization else ()
        opened = partial(open_channel, parts.netloc, read_ca(target.ca), parts.scheme == "grpcs")
        return GrpcTransport(opened, metadata)
    tls = trusting(target.ca, target.client_cert, target.client_key) if parts.scheme == "https" else None
    headers = {"Authorization": target.authorization} if target.authorization else {}
    return HttpTransport(target.url, path, tls, headers)


class _Teller:
    """Collects records, and passes them on now and then."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._records: list[Record] = []
        self.load: Load | None = None

    def record(self, record: Record) -> None:
        self._records.append(record)

    def tell(self) -> None:
        assert self.load is not None
        while True:
            records, self._records = self._records[:MAX_TOLD], self._records[MAX_TOLD:]
            frame = Ended(records, self.load.sent, self.load.running, self.load.waiting)
            self._writer.write(packed(frame))
            if not self._records:
                return

    async def keep_telling(self) -> None:
        while True:
            await asyncio.sleep(TELL_INTERVAL_S)
            self.tell()
            await self._writer.drain()


async def _live() -> None:
    reader, writer = await _pipes()
    job = await next_frame(reader)
    assert isinstance(job, Job), "the first thing it is told"
    asked = _asked(job)
    transport = transport_of(job.target, PATHS["chat" if job.asking.chat else "completions"])
    teller = _Teller(writer)
    load = teller.load = Load(
        job.load, job.asking, job.content, transport, teller.record, job.detailed, job.number
    )  # fmt: skip
    share = slice(job.number, None, job.load.clients)
    mine = itertools.islice(sessions(job.load, job.workload, job.seed, asked), share.start, None, share.step)
    orders: asyncio.Queue[object] = asyncio.Queue()
    listening = asyncio.create_task(_listen(reader, orders))
    working = asyncio.create_task(_prepare(load, job, asked, share))
    telling: asyncio.Task[None] | None = None
    try:
        errors = await _unless_stopped(working, orders)
        if errors is None:
            return
        while load.look_ahead(mine):
            pass
        writer.write(packed(errors))
        order = await orders.get()
        if not isinstance(order, Go):
            return
        gc.collect()
        gc.freeze()  # what is there now stays: no pause of the collector looks at it again
        telling = asyncio.create_task(teller.keep_telling())
        measuring = asyncio.create_task(load.measure(mine, order.start_at))
        stopping = asyncio.create_task(orders.get())
        await asyncio.wait([measuring, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        measuring.cancel()
        measured = await measuring
        teller.tell()
        writer.write(packed(Done(measured)))
        with contextlib.suppress(ConnectionError):
            await writer.drain()
    finally:
        for task in (listening, working, *([telling] if telling else [])):
            task.cancel()
        await transport.close()
        writer.close()


def _asked(job: Job) -> list[Asked] | None:
    if not job.workload.file:
        return None
    return read(job.workload.file, job.workload.longest, job.workload.output_tokens).asked


async def _prepare(load: Load, job: Job, asked: list[Asked] | None, share: slice) -> Ready:
    of_warmup = warmup(job.load, job.workload, job.seed, asked)
    records = await load.warm_up(itertools.islice(of_warmup, share.start, None, share.step))
    return Ready(dict(Counter(each.error for each in records if each.error)), load.example_of_warmup)


async def _unless_stopped(working: "asyncio.Task[Ready]", orders: "asyncio.Queue[object]") -> Ready | None:
    stopping = asyncio.create_task(orders.get())
    await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
        return None
    stopping.cancel()
    return working.result()


async def _listen(reader: asyncio.StreamReader, orders: "asyncio.Queue[object]") -> None:
    try:
        while True:
            await orders.put(await next_frame(reader))
    except EOFError:
        await orders.put(None)


async def _pipes() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sys.stdout.buffer)
    return reader, asyncio.StreamWriter(transport, protocol, None, loop)


def main() -> None:
    log_to_stderr("bench")
    raise_descriptor_limit()
    with contextlib.suppress(EOFError):
        uvloop.run(_live())


if __name__ == "__main__":
    main()
