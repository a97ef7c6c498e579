"""`baton profile`: what this machine makes of a model, for people and for the planner.

1. costs.json: seconds of steps and transfers by shape, `engine.costs.CostTable`; the planner and the simulator use it.
2. A table on the terminal: where each millisecond of a step goes, beside what the machine's limits leave no way around.
3. trace.json: a short relay, drawn for ui.perfetto.dev.

Each file is written when it is complete, under a temporary name first: an interrupted run leaves none half-written.
"""

import argparse
import contextlib
import datetime
import logging
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import prod
from pathlib import Path

import torch
import uvloop

from baton.config import EngineOptions, HandoverOptions, ModelOptions, ProfileOptions, from_arguments
from baton.config import add_arguments as add_options
from baton.errors import ConfigurationError
from baton.files import writable_folder
from baton.model_folder import served_name
from baton.processes import log_to_stderr
from baton.trace import Trace
from cli.assembly import Parts, assemble
from cli.model import model_folder, threads_for
from cli.profiling.breakdown import SCHEDULER, Bench, Breakdown, limits_of, shapes_to_show
from cli.profiling.drawing import draw
from cli.profiling.relay import LONG_TOKENS, record_relay
from cli.profiling.summary import print_summary
from cli.profiling.transfers import measure_transfers
from cli.profiling.watching import Notes, Plain, watched
from engine.costs import CostTable, DecodeCost, MixedCost, ModelFacts, PrefillCost, SchedulerCost, TransferCost
from engine.gpu.device import choose_device
from engine.loading import LoadedModel, load_model
from engine.measuring import (
    BudgetTooSmall,
    Limits,
    Measured,
    Room,
    decode_shapes,
    measure_limits,
    measure_steps,
    mixed_shapes,
    noise,
    prefill_shapes,
)
from engine.plan import Runner
from engine.pool import BlockShape
from engine.weights import check_model, expected_tensors
from kvtransfer.lanes.registry import parse_lanes

log = logging.getLogger(__name__)
STEPS_SHARE, PARTS_SHARE, TRANSFERS_SHARE, LIMITS_SHARE = 0.55, 0.25, 0.08, 0.05
"""Of --seconds. What is left is for the relay that the trace shows."""
CHUNKS_TRACED = 4
PROGRESS_INTERVAL_S = 5.0
COSTS, TRACE = "costs.json", "trace.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure what this machine makes of a model. Writes costs.json (seconds of steps and transfers by shape, for "
        "the planner) and trace.json (scheduler, kernels, transfers and requests of a short relay; open it in "
        "ui.perfetto.dev), and prints where each millisecond of a step goes. Stop what else runs here first."
    )
    add_options(parser, ProfileOptions, ModelOptions, EngineOptions, HandoverOptions)


@dataclass(frozen=True)
class Settings:
    profile: ProfileOptions
    model: ModelOptions
    engine: EngineOptions
    handover: HandoverOptions

    def seconds(self, share: float) -> float:
        return share * self.profile.seconds


def run(arguments: argparse.Namespace) -> int:
    settings = Settings(
        from_arguments(ProfileOptions, arguments),
        from_arguments(ModelOptions, arguments),
        from_arguments(EngineOptions, arguments),
        from_arguments(HandoverOptions, arguments),
    )
    log_to_stderr("profile")
    lanes = parse_lanes(settings.handover.lanes)
    folder = model_folder(settings.model)
    check_model(folder)
    output = writable_folder(Path(settings.profile.output))
    torch.set_num_threads(threads_for(settings.engine, folder))
    options, device = settings.engine, choose_device(settings.engine.device)
    model = load_model(folder, options.dtype, None, options.page_size, device, options.deterministic)
    log.info("loaded: %s kernels on %d threads", model.ops.name, torch.get_num_threads())
    before = measure_limits(model.dtype, device, settings.seconds(LIMITS_SHARE / 2))
    with _measuring_parts(model, options) as (plain, watching):
        steps = _measure_steps(plain, settings)
        shown = _break_down(plain, watching, settings)
        block_bytes = plain.parts.memory.block_bytes
    limits = before.or_better(measure_limits(model.dtype, device, settings.seconds(LIMITS_SHARE / 2)))
    transfers = measure_transfers(lanes, block_bytes, settings.seconds(TRANSFERS_SHARE))
    log.info("transfers: %d sizes measured", len(transfers))
    table = _table(model, settings, limits, steps, shown, transfers)
    table.save(output / COSTS)
    served = [lane.name for lane in lanes if any(cost.lane == lane.name for cost in transfers)]
    _trace(model, settings, served, table, plain.room).save(output / TRACE)
    print_summary(table, shown, [limits_of(model, each, limits, table.model.kv_bytes_per_token) for each in shown])
    print(f"\nwrote {output / COSTS} and {output / TRACE} (open it in ui.perfetto.dev)")
    return 0


# -- Measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Engine:
    """An engine of its own, outside of any worker."""

    parts: Parts
    room: Room
    runner: Runner
    notes: Notes


@contextlib.contextmanager
def _measuring_parts(model: LoadedModel, options: EngineOptions) -> Iterator[tuple[_Engine, _Engine]]:
    """A plain engine and one that is watched; neither guesses, nor cuts the chunks that are to be measured."""
    options = replace(options, step_stretch=0.0, speculate="off")
    plain, watching = Plain(), watched(model, "profile")
    with contextlib.ExitStack() as stack:
        parts: list[Parts] = []
        for each, build in ((model, plain.build), (watching.model, watching.build)):
            parts.append(assemble(each, options, build))
            stack.callback(parts[-1].memory.close)
        room = Room(
            max_batch_tokens=max(options.max_batch_tokens, options.max_running), max_running=options.max_running,
            max_model_tokens=parts[0].max_model_tokens, num_blocks=parts[0].memory.num_blocks,
            page_size=options.page_size,
        )  # fmt: skip
        yield _Engine(parts[0], room, plain.runner, Notes("")), _Engine(parts[1], room, plain.runner, watching.notes)


def _measure_steps(plain: _Engine, settings: Settings) -> list[Measured]:
    """Raises ConfigurationError when --seconds are too few."""
    shapes = [*prefill_shapes(plain.room), *decode_shapes(plain.room), *mixed_shapes(plain.room)]
    try:
        return measure_steps(plain.runner, shapes, plain.room.page_size, settings.seconds(STEPS_SHARE), _progress())
    except BudgetTooSmall as error:
        raise ConfigurationError(
            f"--seconds {settings.profile.seconds:g} is too little to measure {len(shapes)} shapes of steps; give at "
            f"least {error.needed_s / STEPS_SHARE:.0f}, or a smaller --max-batch-tokens, --max-running or "
            "--max-model-tokens"
        ) from error


def _progress() -> Callable[[str], None]:
    """A line every few seconds."""
    last = -PROGRESS_INTERVAL_S

    def report(line: str) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_INTERVAL_S:
            last = time.monotonic()
            log.info("%s", line)

    return report


def _break_down(plain: _Engine, watching: _Engine, settings: Settings) -> list[Breakdown]:
    bench = Bench(watching.parts.engine, plain.parts.engine, watching.notes, plain.parts.model.config.vocab_size)
    decodes, chunk, contexts = shapes_to_show(plain.room)
    share = settings.seconds(PARTS_SHARE) / (len(decodes) + len(contexts))
    shown: list[Breakdown] = []
    for shape in decodes:
        log.info("parts of a step: decode, batch %d", shape.batch)
        shown.append(bench.decode(shape.batch, shape.context, share))
    log.info("parts of a step: prefill of %d tokens", chunk)
    return shown + bench.prefill(chunk, contexts, share * len(contexts))


def _trace(model: LoadedModel, settings: Settings, lanes: list[str], table: CostTable, room: Room) -> Trace:
    """A relay whose long prompts have CHUNKS_TRACED chunks, or as many as the rest of --seconds allows."""
    chunk = settings.engine.max_batch_tokens
    allowed_s = settings.seconds(1 - STEPS_SHARE - PARTS_SHARE - TRANSFERS_SHARE - LIMITS_SHARE)
    chunk_s = table.prefill_s(chunk, 0) * (len(lanes) + 1)
    chunks = max(2, min(CHUNKS_TRACED, int(allowed_s / chunk_s)))
    long_tokens = min(chunks * chunk, room.max_model_tokens - LONG_TOKENS)
    log.info("trace: prompts of %d tokens handed over by %s", long_tokens, ", ".join(lanes) or "nobody")
    options = replace(settings.engine, speculate="off") if settings.engine.speculate == "model" else settings.engine
    recorded = uvloop.run(record_relay(model, options, settings.handover, lanes, long_tokens))
    return draw(recorded, {"machine": table.machine, "cpu": table.cpu, "kernels": table.kernels,
                           "model": table.model.name, "date": table.date})  # fmt: skip


# -- The table -------------------------------------------------------------------------------------------------------


def _table(
    model: LoadedModel, settings: Settings, limits: Limits, steps: list[Measured], shown: list[Breakdown],
    transfers: list[TransferCost],
) -> CostTable:  # fmt: skip
    shape = BlockShape.of(model.config, settings.engine.page_size, model.dtype)
    facts = ModelFacts(
        served_name(settings.model), sum(map(prod, expected_tensors(model.config).values())), model.config.num_layers,
        shape.block_bytes // shape.page_size,
    )  # fmt: skip
    prefill, decode, mixed = [], [], []
    for each in steps:
        step, chunks = each.shape, each.shape.chunks
        if not step.batch:
            prefill.append(PrefillCost(*chunks[0], each.seconds))
        elif not chunks:
            decode.append(DecodeCost(step.batch, step.context, each.seconds))
        else:
            mixed.append(MixedCost(step.batch, step.context, *chunks[0], each.seconds))
    scheduler = [SchedulerCost(each.shape.batch, each.parts[SCHEDULER]) for each in shown if each.shape.batch]
    return CostTable(
        machine=f"{platform.node()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        cpu=_cpu(), threads=torch.get_num_threads(), kernels=model.ops.name, model=facts,
        dtype=str(model.dtype).removeprefix("torch."), page_size=settings.engine.page_size,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), version=version("baton-serve"),
        commit=_commit(), prefill=prefill, decode=decode, mixed=mixed, scheduler=scheduler, transfer=transfers,
        read_bytes_per_s=limits.read_bytes_per_s, flops=limits.flops, noise=noise(steps),
    )  # fmt: skip


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.+)", path.read_text()) if path.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _commit() -> str:
    """Short name of the commit of a clone, with '+' for changes on top; empty outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.info("no commit to name: %s", error)
        return ""
    return done.stdout.strip()
