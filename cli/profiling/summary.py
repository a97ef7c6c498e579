"""What `baton profile` tells people: where each millisecond of a step goes, beside what the machine allows."""

import sys

from rich import box
from rich.console import Console
from rich.table import Table

from cli.profiling.breakdown import PARTS, Breakdown, Limit
from engine.costs import CostTable, Errors, StepShape

WIDE = 140  # columns where the output is not a terminal


def print_summary(table: CostTable, shown: list[Breakdown], limits: list[dict[str, Limit]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)
    model = table.model
    console.print(
        f"\n{model.name}: {model.parameters / 1e6:.0f} M parameters, {table.dtype}, {table.kernels} kernels on "
        f"{table.threads} threads of {table.cpu}"
    )
    console.print(
        f"limits measured here: memory read {table.read_bytes_per_s / 1e9:.1f} GB/s, "
        f"{table.dtype} products {table.flops / 1e9:.0f} GFLOP/s\n"
    )
    for breakdown, limit in zip(shown, limits, strict=True):
        console.print(step_table(breakdown, limit))
    pairs = ((each.parts[part], limit) for each, of in zip(shown, limits, strict=True) for part, limit in of.items())
    if any(seconds < limit.seconds for seconds, limit in pairs):
        console.print("A part below its limit read from a cache, or other load held back the measuring of the limit.")
    console.print(
        f"cost table: {len(table.prefill)} prefill, {len(table.decode)} decode, {len(table.mixed)} mixed steps, "
        f"{len(table.transfer)} transfers. Relative errors (median, 90 %, worst): repetitions "
        f"{_errors(table.noise)}; estimates of mixed steps {_errors(table.mixed_errors)}; "
        f"linear fit {_errors(table.fit.errors)}"
    )


def step_table(breakdown: Breakdown, limits: dict[str, Limit]) -> Table:
    """The parts, in milliseconds and in percent of the step that they sum to, and how far each is from its limit."""
    table = Table(title=title(breakdown.shape), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("part of a step")
    for column in ("ms", "%", "limit ms", "times"):
        table.add_column(column, justify="right")
    table.add_column("bound by")
    for part in PARTS:
        seconds, limit = breakdown.parts[part], limits.get(part)
        if seconds or limit:
            table.add_row(part, *_cells(seconds, breakdown.step_s, limit))
    table.add_section()
    whole = Limit(sum(limit.seconds for limit in limits.values()), "")
    table.add_row("step", *_cells(breakdown.step_s, breakdown.step_s, whole))
    table.add_row("the same step, not watched", *_cells(breakdown.unwatched_s, breakdown.step_s, whole))
    return table


def title(shape: StepShape) -> str:
    if shape.batch:
        return f"decode, batch {shape.batch}, context {shape.context}"
    ((tokens, context),) = shape.chunks
    return f"prefill, {tokens} tokens after {context}"


def _cells(seconds: float, step_s: float, limit: Limit | None) -> list[str]:
    cells = [f"{1000 * seconds:.3f}", f"{100 * seconds / step_s:.1f}"]
    if limit is None or not limit.seconds:
        return [*cells, "", "", ""]
    return [*cells, f"{1000 * limit.seconds:.3f}", f"{seconds / limit.seconds:.2f}", limit.bound]


def _errors(errors: Errors) -> str:
    return " / ".join(f"{100 * each:.0f} %" for each in (errors.p50, errors.p90, errors.max))
