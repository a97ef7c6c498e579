"""`baton prefill`, `baton decode`, `baton mixed`: one worker process, and the place where its parts are joined.

Start: check the model's files, load, warm up, serve offers, register. No port is open before the files are good.
End: SIGTERM drains; a refused registration, a crashed engine or a dead parent ends the process.
"""

import argparse
import asyncio
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvloop

import baton
from baton.config import (
    DEFAULT_LINK,
    DiscoveryOptions,
    EngineOptions,
    HandoverOptions,
    ModelOptions,
    TierOptions,
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
from baton.model_folder import served_name, tokenizer_fingerprint
from baton.monitor import monitored
from baton.processes import log_to_stderr, stop_signals, watch_parent
from baton.tls import inside
from baton.v1 import worker_link_pb2 as wire
from cli.assembly import Parts, Wired, assemble, wire_up
from cli.model import cores_for, model_folder, threads_for
from engine.gpu.device import choose_device
from engine.loading import LoadedModel, load_model
from engine.speculation.draft_model import check_same_vocabulary
from kvtransfer.wire import PeerIdentity
from worker.links import CoordinatorLinks
from worker.shell import WorkerShell

log = logging.getLogger(__name__)
PROGRESS_INTERVAL_S = 2.0
UNLINK_TIMEOUT_S = 5.0
STALLED_S = 180.0
"""A step that takes longer never ends; one on a GPU ends its worker before."""
EXIT_CRASHED = 70
Roles = list["wire.Role.ValueType"]
ROLES: dict[str, Roles] = {
    "prefill": [wire.ROLE_PREFILL],
    "decode": [wire.ROLE_DECODE],
    "mixed": [wire.ROLE_PREFILL, wire.ROLE_DECODE],
}
STANDBY: dict[str, Roles] = {"prefill": [wire.ROLE_DECODE], "decode": [], "mixed": []}
"""Carried as well: a decode worker prefills by itself, but without decode workers somebody has to decode."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(
        parser, WorkerOptions, DiscoveryOptions, ModelOptions, EngineOptions, HandoverOptions, TierOptions, TlsOptions
    )


@dataclass(frozen=True)
class Settings:
    kind: str
    worker: WorkerOptions
    discovery: DiscoveryOptions
    model: ModelOptions
    engine: EngineOptions
    handover: HandoverOptions
    tiers: TierOptions
    tls: TlsOptions


def run(arguments: argparse.Namespace) -> int:
    settings = Settings(
        arguments.command,
        from_arguments(WorkerOptions, arguments),
        from_arguments(DiscoveryOptions, arguments),
        from_arguments(ModelOptions, arguments),
        from_arguments(EngineOptions, arguments),
        from_arguments(HandoverOptions, arguments),
        from_arguments(TierOptions, arguments),
        from_arguments(TlsOptions, arguments),
    )
    worker_id = settings.worker.worker_id or default_worker_id(settings.kind)
    log_to_stderr(worker_id)
    return uvloop.run(_live(settings, worker_id, model_folder(settings.model)))


async def _live(settings: Settings, worker_id: str, folder: Path) -> int:
    loop = asyncio.get_running_loop()
    stop, crashed = stop_signals(), loop.create_future()
    watch_parent(settings.worker.parent_pid, stop.set)
    cores, tls = cores_for(settings.engine), inside(settings.tls)
    parts = await _loaded(settings, folder, stop)
    tokenizer = await asyncio.to_thread(tokenizer_fingerprint, folder)
    me = PeerIdentity(worker_id, random.SystemRandom().getrandbits(64))

    def on_crash(error: BaseException) -> None:
        if not crashed.done():
            crashed.set_result(error)

    late_links: list[CoordinatorLinks] = []
    wiring = wire_up(
        parts, me, ROLES[settings.kind] + STANDBY[settings.kind], settings.handover, settings.worker.host,
        lambda message: late_links[0].send_all(message), on_crash, tls,
    )  # fmt: skip
    async with wiring as wired:
        wired.shell.orphans.keep_s = settings.worker.orphan_s
        if cores:
            # The thread that computes, and with it those that it starts; wires run wherever there is room.
            await wired.shell.steps.call(lambda engine: os.sched_setaffinity(0, cores))
        registration = _registration(settings, parts, me, wired, tokenizer)
        links = CoordinatorLinks(registration, wired.shell, wired.shell.heartbeat, tls)
        late_links.append(links)
        watching = asyncio.create_task(tls.watch()) if tls else None
        serving = asyncio.create_task(links.run(_discovery(settings, wired.shell), settings.worker.connect_timeout_s))
        try:
            async with monitored(
                settings.worker.host, settings.worker.monitor_port,
                lambda: unhealthy(wired.shell), lambda: unready(wired.shell, links),
            ):  # fmt: skip
                return await _until_stopped(settings.worker, wired.shell, links, serving, stop, crashed)
        finally:
            if watching:
                watching.cancel()


async def _loaded(settings: Settings, folder: Path, stop: asyncio.Event) -> Parts:
    """Whoever is told to end meanwhile does so at once: nobody knows of this worker yet."""
    loading, stopping = (
        asyncio.create_task(asyncio.to_thread(_load, settings, folder)),
        asyncio.create_task(stop.wait()),
    )
    await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        log.info("told to end while the model is loaded")
        os._exit(0)  # a thread cannot be stopped
    stopping.cancel()
    return loading.result()


def _load(settings: Settings, folder: Path) -> Parts:
    """Model, pool and engine, ready to run. In a thread of its own, as it takes seconds."""
    started = time.monotonic()
    torch.set_num_threads(threads_for(settings.engine, folder))
    options = settings.engine
    model = load_model(
        folder, options.dtype, _log_progress(), options.page_size, choose_device(options.device), options.deterministic
    )
    parts = assemble(
        model, settings.engine, draft=_load_draft(settings.engine, folder), tiers=settings.tiers,
        writes_to_peers=wire.ROLE_PREFILL in ROLES[settings.kind] and settings.handover.direct_wait_s > 0,
    )  # fmt: skip
    log.info(
        "loaded and warm after %.1f s: %s, %s kernels on %d threads, %d blocks of %d KiB",
        time.monotonic() - started, parts.layout.dtype, model.ops.name, torch.get_num_threads(),
        parts.memory.num_blocks, parts.memory.block_bytes // 1024,
    )  # fmt: skip
    return parts


def _load_draft(options: EngineOptions, folder: Path) -> LoadedModel | None:
    """The model that guesses. Raises ConfigurationError when its tokens are not those of the model in `folder`."""
    if options.speculate != "model":
        return None
    draft_folder = model_folder(ModelOptions(model=options.draft_model))
    check_same_vocabulary(folder, draft_folder)
    device = choose_device(options.device)
    return load_model(draft_folder, options.dtype, page_size=options.page_size, device=device)


def _log_progress() -> Callable[[float], None]:
    """A line every few seconds, so that nobody wonders whether a big model is still loading."""
    last = time.monotonic()

    def report(fraction: float) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_INTERVAL_S:
            last = time.monotonic()
            log.info("loading weights: %.0f %%", 100 * fraction)

    return report


def _registration(
    settings: Settings, parts: Parts, me: PeerIdentity, wired: Wired, tokenizer: str
) -> wire.Registration:
    registration = parts.registration()
    registration.MergeFrom(
        wire.Registration(
            worker_id=me.worker_id,
            incarnation=me.incarnation,
            roles=ROLES[settings.kind],
            standby_roles=STANDBY[settings.kind],
            pid=os.getpid(),
            host=settings.worker.host,
            handover_address=wired.handover_address,
            model=served_name(settings.model),
            lanes=settings.handover.lanes.split(","),
            tokenizer_fingerprint=tokenizer,
            software_version=baton.__version__,
            started_unix_s=time.time(),
        )
    )
    if settings.model.model_version:
        registration.model_version = settings.model.model_version
    return registration


def _discovery(settings: Settings, shell: WorkerShell) -> Discovery:
    def on_lost() -> None:
        shell.counters["discovery_losses"] += 1

    named = settings.worker.coordinator or ("" if settings.discovery.discovery else DEFAULT_LINK)
    fixed = frozenset(parse_addresses(named, "--coordinator")) if named else frozenset()
    return open_discovery(settings.discovery, fixed, on_lost)


def unhealthy(shell: WorkerShell) -> str:
    """Only what a new process would cure: what coordinators and peers do is not this one's fault."""
    silent_s = shell.steps.silent_s
    return f"the engine has been at one step for {silent_s:.0f} s" if silent_s > STALLED_S else ""


def unready(shell: WorkerShell, links: CoordinatorLinks) -> str:
    return "draining" if shell.draining else links.unready()


async def _until_stopped(
    options: WorkerOptions, shell: WorkerShell, links: CoordinatorLinks, linking: "asyncio.Task[None]",
    stop: asyncio.Event, crashed: "asyncio.Future[BaseException]",
) -> int:  # fmt: skip
    """Serve until a signal, a coordinator that drains it, a crash of the engine, or a refusal by every coordinator.

    A drain waits for every attempt, whose coordinator sees to it that it ends; a signal cuts off what takes too long.
    Returns the exit status.
    """
    stopping, finished = asyncio.create_task(stop.wait()), asyncio.create_task(shell.finished())
    waits: set[asyncio.Future[Any]] = {linking, stopping, finished, crashed}
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    finished.cancel()
    if crashed.done():
        log.critical("the engine crashed; this process ends so that others take its work over")
        os._exit(EXIT_CRASHED)
    if linking.done():
        linking.result()  # raises: refused, or no coordinator in time
    clean = await shell.drained(options.drain_timeout_s)
    log.info("drained" if clean else "drain timed out: what still ran is cut off")
    await links.close(UNLINK_TIMEOUT_S)
    linking.cancel()
    await asyncio.wait({linking}, timeout=UNLINK_TIMEOUT_S)
    return 0
