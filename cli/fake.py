"""`baton fake`: workers without an engine, many in one process, to try or measure a coordinator alone."""

import argparse
import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop
from tokenizers import Tokenizer

import baton
from baton.config import (
    DEFAULT_LINK,
    DiscoveryOptions,
    FakeOptions,
    ModelOptions,
    TlsOptions,
    WorkerOptions,
    default_worker_id,
    from_arguments,
    parse_addresses,
)
from baton.config import (
    add_arguments as add_options,
)
from baton.discovery import Discovery, open_discovery
from baton.errors import ModelError
from baton.model_folder import served_name, tokenizer_fingerprint
from baton.monitor import monitored
from baton.processes import log_to_stderr, stop_signals, watch_parent
from baton.tls import inside
from baton.v1 import worker_link_pb2 as wire
from cli.model import model_folder
from worker.fake import PAGE_SIZE, FakeWorker, Pace
from worker.links import CoordinatorLinks

log = logging.getLogger(__name__)
NAME = "fake"
ROLES: dict[str, list["wire.Role.ValueType"]] = {
    "prefill": [wire.ROLE_PREFILL],
    "decode": [wire.ROLE_DECODE],
    "mixed": [wire.ROLE_PREFILL, wire.ROLE_DECODE],
}
UNLINK_TIMEOUT_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, FakeOptions, WorkerOptions, DiscoveryOptions, ModelOptions, TlsOptions)


def run(arguments: argparse.Namespace) -> int:
    log_to_stderr(NAME)
    if arguments.role == "prefill":
        log.warning("nothing decodes here: requests need decode workers from elsewhere")
    return uvloop.run(_live(arguments))


async def _live(arguments: argparse.Namespace) -> int:
    options = from_arguments(FakeOptions, arguments)
    process = from_arguments(WorkerOptions, arguments)
    tls = inside(from_arguments(TlsOptions, arguments))
    model = from_arguments(ModelOptions, arguments)
    folder = model_folder(model, weights=False)
    vocabulary, pace = _vocabulary(folder), Pace(options.step_ms / 1e3, options.prefill_tokens_per_s)
    common = _registration(process, model, folder, options.blocks)
    stop = stop_signals()
    watch_parent(process.parent_pid, stop.set)
    lives, all_links = [], list[CoordinatorLinks]()
    for role in options.role.split("+"):
        for number in range(options.workers):
            registration = wire.Registration(
                worker_id=f"{process.worker_id or default_worker_id(NAME)}-{role}-{number}",
                incarnation=random.SystemRandom().getrandbits(64) | 1,
                roles=ROLES[role],
                handover_address=f"{NAME}:{role}-{number}",
            )
            registration.MergeFrom(common)
            worker = FakeWorker(pace, vocabulary, options.blocks)
            links = CoordinatorLinks(registration, worker, worker.heartbeat, tls)
            all_links.append(links)
            lives.append(_work(worker, links, _discovery(arguments, process), process, stop))

    def unready() -> str:
        return "" if any(not links.unready() for links in all_links) else "no coordinator has these workers"

    async with monitored(process.host, process.monitor_port, str, unready):
        await asyncio.gather(*lives)
    return 0


async def _work(
    worker: FakeWorker, links: CoordinatorLinks, discovery: Discovery, process: WorkerOptions, stop: asyncio.Event
) -> None:
    """One worker, until it is drained. Raises ConfigurationError when no coordinator takes it."""
    worker.say_to_all = links.send_all
    stepping = asyncio.create_task(worker.run())
    linking = asyncio.create_task(links.run(discovery, process.connect_timeout_s))
    ends: list[asyncio.Task[Any]] = [asyncio.create_task(each.wait()) for each in (stop, worker.drained)]
    try:
        await asyncio.wait([stepping, linking, *ends], return_when=asyncio.FIRST_COMPLETED)
        for task in (stepping, linking):
            if task.done():
                task.result()  # raises: a mistake of ours; refused, or no coordinator in time
        worker.on_drain()
        with contextlib.suppress(TimeoutError):  # what runs longer is cut off
            async with asyncio.timeout(process.drain_timeout_s):
                await worker.drained.wait()
        await links.close(UNLINK_TIMEOUT_S)
    finally:
        for task in (stepping, linking, *ends):
            task.cancel()
        await asyncio.gather(stepping, linking, *ends, return_exceptions=True)


def _vocabulary(folder: Path) -> Sequence[int]:
    """The tokens of a model that are text. Raises ModelError."""
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
        raise ModelError(f"{path} is not a usable tokenizer: {error}") from error
    added = tokenizer.get_added_tokens_decoder().keys()
    return sorted(id for id in tokenizer.get_vocab(with_added_tokens=False).values() if id not in added)


def _discovery(arguments: argparse.Namespace, process: WorkerOptions) -> Discovery:
    discovery = from_arguments(DiscoveryOptions, arguments)
    named = process.coordinator or ("" if discovery.discovery else DEFAULT_LINK)
    fixed = frozenset(parse_addresses(named, "--coordinator")) if named else frozenset()
    return open_discovery(discovery, fixed, lambda: None)


def _registration(process: WorkerOptions, model: ModelOptions, folder: Path, blocks: int) -> wire.Registration:
    """What all workers of this process say of themselves."""
    return wire.Registration(
        protocol_version=wire.LINK_PROTOCOL_VERSION,
        pid=os.getpid(),
        host=process.host,
        model=served_name(model),
        model_fingerprint=NAME,
        model_version=model.model_version or NAME,
        tokenizer_fingerprint=tokenizer_fingerprint(folder),
        page_size_tokens=PAGE_SIZE,
        total_blocks=blocks,
        max_model_tokens=blocks * PAGE_SIZE,
        software_version=baton.__version__,
        started_unix_s=time.time(),
    )
