"""Where the parts of a worker are joined: model, pool, engine; shell, roles, hand-over.

PoolMemory (shared) ──buffer──▶ KVPool ──▶ ModelRunner ──▶ Engine ──▶ StepLoop in WorkerShell
     │                                                                    ▲           ▲
     └──▶ OfferServer ──▶ PrefillRole, PrefixServer ──────────────────────┘           │
     └──▶ Intake ───────▶ DecodeRole, PrefixFetcher ──────────────────────────────────┘
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from baton.config import EngineOptions, HandoverOptions, TierOptions, parse_bytes
from baton.errors import ConfigurationError
from baton.model_folder import VERSION_DIGITS
from baton.tls import Tls
from baton.v1 import worker_link_pb2 as wire
from decode.role import DecodeRole
from engine.engine import Engine
from engine.gpu.mirror import HostMirror
from engine.loading import LoadedModel
from engine.memory import kv_bytes
from engine.plan import Drafter
from engine.pool import BlockShape, KVPool
from engine.runner import ModelRunner
from engine.speculation.draft_model import DraftModel
from engine.speculation.ngram import NgramGuesser
from engine.speculation.policy import Policy
from engine.speculation.speculator import Guesser, Speculator
from kvtransfer.direct import DirectServer
from kvtransfer.intake import Intake
from kvtransfer.lanes.registry import parse_lanes
from kvtransfer.layout import BlockLayout
from kvtransfer.memory import PoolMemory, physical_bytes
from kvtransfer.offers import OfferServer
from kvtransfer.outgoing import layer_groups
from kvtransfer.prefix_fetch import PrefixFetcher
from kvtransfer.tiers.base import Tier
from kvtransfer.tiers.disk import DiskTier
from kvtransfer.tiers.host import HostTier
from kvtransfer.tiers.shared import DEFAULT_TTL_S, SharedStore
from kvtransfer.tiers.store import BlockStore
from kvtransfer.wire import PeerIdentity
from prefill.role import PrefillRole
from worker.prefix_server import PrefixServer
from worker.shell import WorkerShell

if TYPE_CHECKING:
    from engine.gpu.runner import DeviceRunner

MIN_BLOCKS = 2
NO_TIERS = TierOptions()
CLOSE_TIMEOUT_S = 10.0
"""What tiers get, when the worker ends, to write out what they have taken."""


@dataclass
class Parts:
    """One worker's model, pool and engine, before any wire."""

    model: LoadedModel
    memory: PoolMemory
    engine: Engine
    layout: BlockLayout
    max_model_tokens: int
    max_running: int
    store: BlockStore | None = None
    converts_kv_dtype: bool = False

    def registration(self) -> wire.Registration:
        """What the coordinator learns about this engine; the process adds who and where it is."""
        return wire.Registration(
            protocol_version=wire.LINK_PROTOCOL_VERSION,
            model_fingerprint=self.model.fingerprint,
            model_version=self.model.version[:VERSION_DIGITS],
            page_size_tokens=self.layout.page_size_tokens,
            total_blocks=self.memory.num_blocks,
            max_model_tokens=self.max_model_tokens,
            block_bytes=self.memory.block_bytes,
            max_running_requests=self.max_running,
            weights_fingerprint=self.layout.weights_fingerprint,
            converts_kv_dtype=self.converts_kv_dtype,
            pinnable_blocks=self.store.max_pinned if self.store is not None else 0,
        )


def assemble(
    model: LoadedModel,
    options: EngineOptions,
    build: Callable[..., Engine] = Engine,
    draft: LoadedModel | None = None,
    tiers: TierOptions = NO_TIERS,
    writes_to_peers: bool = False,
) -> Parts:
    """Pool and engine over a loaded model. Raises ConfigurationError when the options cannot work with it.

    `build` makes the engine out of what Engine takes: `baton profile` has one that is watched. `draft`: the model that
    guesses, with --speculate model. `writes_to_peers`: keep addresses where pools of peers can be mapped.
    """
    shape = BlockShape.of(model.config, options.page_size, model.dtype)
    automatic = options.kv_memory == "auto"
    num_bytes = kv_bytes(model.device, options.gpu_share) if automatic else parse_bytes(options.kv_memory)
    num_blocks = num_bytes // shape.block_bytes
    if num_blocks < MIN_BLOCKS:
        raise ConfigurationError(
            f"--kv-memory {options.kv_memory} holds {num_blocks} blocks of {shape.block_bytes} bytes; "
            f"give at least {MIN_BLOCKS * shape.block_bytes}"
        )
    context = model.config.context_tokens
    if options.max_model_tokens > context:
        raise ConfigurationError(f"--max-model-tokens is {options.max_model_tokens}; this model takes {context}")
    # Twice the machine's memory holds the pools of all its workers, however they come and go.
    peer_bytes = 2 * physical_bytes() if writes_to_peers and not model.ops.launches else 0
    memory = PoolMemory.create(num_blocks, shape.block_bytes, peer_bytes // shape.block_bytes)
    max_model_tokens = min(options.max_model_tokens or context, num_blocks * options.page_size)
    layout = BlockLayout(
        model_fingerprint=model.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        num_layers=model.config.num_layers,
        num_kv_heads=model.config.num_kv_heads,
        head_dim=model.config.head_dim,
        page_size_tokens=options.page_size,
        weights_fingerprint=model.weights_fingerprint,
    )
    store = _store(memory, layout, tiers)
    runner, mirror = _runner(model, shape, memory, options, max_model_tokens)
    engine = build(
        runner,
        num_blocks=num_blocks,
        page_size=options.page_size,
        max_batch_tokens=max(options.max_batch_tokens, options.max_running),
        max_running=options.max_running,
        step_stretch=options.step_stretch,
        max_model_tokens=max_model_tokens,
        shareable_tokens=model.config.shareable_tokens,
        generations=memory.generations,
        drafter=_drafter(options, draft),
        look_ahead=model.ops.launches,
        mirror=mirror,
        store=store,
        save_at_eviction=tiers.kv_write_policy == "eviction",
        layer_groups=layer_groups(layout.num_layers, memory.block_bytes),
    )
    for part in (runner, mirror):
        if part is not None and not isinstance(part, ModelRunner):
            part.count_into(engine.counters)
    return Parts(model, memory, engine, layout, max_model_tokens, options.max_running, store, options.convert_kv_dtype)


def _store(memory: PoolMemory, layout: BlockLayout, options: TierOptions) -> BlockStore | None:
    """The tiers that were asked for, fastest first. Raises ConfigurationError when one cannot be had."""
    tiers: list[Tier] = []
    fingerprint = json.dumps(dataclasses.asdict(layout), sort_keys=True)
    share, ttl_s = options.kv_tenant_share, options.kv_ttl_s or math.inf
    if host_bytes := parse_bytes(options.host_kv_memory):
        tiers.append(HostTier(host_bytes, memory.block_bytes, ttl_s=ttl_s, tenant_share=share))
    if options.disk_kv_folder:
        disk_bytes = parse_bytes(options.disk_kv_memory)
        folder = Path(options.disk_kv_folder)
        tiers.append(DiskTier(folder, disk_bytes, memory.block_bytes, fingerprint, ttl_s=ttl_s, tenant_share=share))
    if options.shared_kv_folder:
        shared_bytes = parse_bytes(options.shared_kv_memory)
        folder = Path(options.shared_kv_folder)
        tiers.append(
            SharedStore(
                folder,
                shared_bytes,
                memory.block_bytes,
                fingerprint,
                ttl_s=options.kv_ttl_s or DEFAULT_TTL_S,
                tenant_share=share,
            )
        )
    return BlockStore(memory, tiers) if tiers else None


def _drafter(options: EngineOptions, draft: LoadedModel | None) -> Drafter | None:
    """Who guesses coming tokens, if anybody. Raises ConfigurationError when the draft model's pool is too small."""
    if options.speculate == "off":
        return None
    guesser: Guesser = NgramGuesser()
    if options.speculate == "model":
        if draft is None:
            raise ConfigurationError("--speculate model needs --draft-model")
        shape = BlockShape.of(draft.config, options.page_size, draft.dtype)
        num_blocks = parse_bytes(options.draft_kv_memory) // shape.block_bytes
        if num_blocks < MIN_BLOCKS:
            raise ConfigurationError(
                f"--draft-kv-memory {options.draft_kv_memory} holds {num_blocks} blocks of {shape.block_bytes} bytes; "
                f"give at least {MIN_BLOCKS * shape.block_bytes}"
            )
        context = min(draft.config.context_tokens, num_blocks * options.page_size)
        runner = _warm_runner(draft, shape, num_blocks, None, options, context)
        guesser = DraftModel(runner, num_blocks=num_blocks, page_size=options.page_size, context_tokens=context)
    return Speculator(guesser, Policy(options.speculate_running), options.speculate_tokens)


def _runner(
    model: LoadedModel, shape: BlockShape, memory: PoolMemory, options: EngineOptions, max_model_tokens: int
) -> "tuple[ModelRunner | DeviceRunner, HostMirror | None]":
    """The warm runner, and where its pool is not the memory that peers read, what keeps the two the same."""
    on_host = not model.ops.launches
    runner = _warm_runner(model, shape, memory.num_blocks, memory if on_host else None, options, max_model_tokens)
    if on_host:
        return runner, None
    if runner.pool.slabs.is_cuda:
        memory.device_pointer = runner.pool.slabs.data_ptr()
    return runner, HostMirror(runner.pool, torch.from_numpy(memory.blocks))


def _warm_runner(
    model: LoadedModel,
    shape: BlockShape,
    num_blocks: int,
    memory: PoolMemory | None,
    options: EngineOptions,
    max_model_tokens: int,
) -> "ModelRunner | DeviceRunner":
    """`memory` is the pool's on the host; None lets it take its own, on the model's device."""
    if not model.ops.launches:
        buffer, num_peer_blocks = (memory.buffer, memory.num_peer_blocks) if memory is not None else (None, 0)
        runner = ModelRunner(model, KVPool(shape, num_blocks, buffer, num_peer_blocks=num_peer_blocks))
        runner.warm_up(options.max_batch_tokens)
        return runner
    # These need Triton, which workers on CPUs do without.
    from engine.gpu.decode_graphs import cuda_capture, graph_sizes
    from engine.gpu.runner import DeviceRunner

    pool = KVPool(shape, num_blocks, device=model.device)
    on_device = DeviceRunner(model, pool, max_rows=max(options.max_batch_tokens, options.max_running))
    if model.device.type == "cuda" and model.ops.recordable:
        on_device.record_graphs(graph_sizes(options.max_running), max_model_tokens, cuda_capture(model.device))
    on_device.warm_up(options.max_batch_tokens)
    return on_device


@dataclass
class Wired:
    """A worker that can be given assignments."""

    shell: WorkerShell
    handover_address: str


@contextlib.asynccontextmanager
async def wire_up(
    parts: Parts,
    me: PeerIdentity,
    roles: Sequence["wire.Role.ValueType"],
    options: HandoverOptions,
    host: str,
    send_all: Callable[[wire.WorkerMessage], None],
    on_crash: Callable[[BaseException], None],
    tls: Tls | None = None,
) -> AsyncIterator[Wired]:
    """Shell, roles and hand-over of one worker, stopped in reverse order whatever happens."""
    lanes = parse_lanes(options.lanes, tls)
    if parts.model.ops.launches:
        # The pool is on a device, and what peers map mirrors only what was announced: not what a writer has to read.
        options = dataclasses.replace(options, direct_wait_s=0.0)
    shell = WorkerShell(
        parts.engine, parts.model.fingerprint, send_all, on_crash, parts.layout.page_size_tokens, parts.store
    )
    if tls is not None:
        tls.counters = shell.counters
    page_size = parts.layout.page_size_tokens
    prefixes = PrefixServer(parts.engine, shell.steps, shell.counters)
    prefill = PrefillRole(shell, page_size, options.direct_wait_s) if wire.ROLE_PREFILL in roles else None
    writes = prefill is not None and options.direct_wait_s > 0 and parts.memory.num_peer_blocks > 0
    owners = [owner for owner in (prefixes, prefill) if owner is not None]

    def on_released(key: str, verified: bool) -> None:
        for owner in owners:
            owner.on_lease_released(key, verified)

    def on_quarantined(key: str) -> None:
        for owner in owners:
            owner.on_lease_quarantined(key)

    def on_resolved(key: str) -> None:
        for owner in owners:
            owner.on_lease_resolved(key)

    async with contextlib.AsyncExitStack() as stack:
        stack.callback(parts.memory.close)
        if parts.store is not None:
            stack.callback(lambda store: store.close(time.monotonic() + CLOSE_TIMEOUT_S), parts.store)
        offers = OfferServer(
            me, parts.layout, parts.memory, [lane.serve(host) for lane in lanes], options, shell.counters,
            on_released, on_quarantined, on_resolved, DirectServer(parts.memory) if writes else None,
            prefill.on_want if prefill is not None else lambda key, placed: None, prefixes.on_ask, tls,
        )  # fmt: skip
        prefixes.serve_offers(offers)
        if prefill is not None:
            prefill.serve_offers(offers)
            shell.carry(prefill)
        address = await offers.start(host)
        stack.push_async_callback(offers.stop)
        intake = Intake(me, parts.layout, parts.memory, lanes, options, shell.counters, parts.converts_kv_dtype, tls)
        shell.lender = prefixes
        shell.prefixes = PrefixFetcher(me, intake, parts.memory.block_bytes, shell.counters)
        shell.lanes_in_use = intake.lanes_in_use
        shell.handover_bytes_per_s = intake.bytes_per_s
        if wire.ROLE_DECODE in roles:
            shell.carry(DecodeRole(shell, intake, page_size, parts.model.config.vocab_size))
        stack.push_async_callback(intake.stop)
        shell.steps.start()
        stack.callback(shell.steps.stop)
        yield Wired(shell, address)
