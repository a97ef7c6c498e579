"""The one form of every benchmark: figures beside a peer or a limit of the same run, as a table and as JSON.

{machine, date, commit, title, rows: [{name, value, unit, versus, ratio, goal, met}]}
"""

import argparse
import datetime
import json
import operator
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Row:
    """One figure. `versus` names what `ratio` is taken to; `met` is None where there is no goal."""

    name: str
    value: float
    unit: str
    versus: str | None
    ratio: float | None
    goal: str | None
    met: bool | None


class Report:
    """Collects rows, then prints them."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.rows: list[Row] = []
        self._notes: list[str] = []

    def row(
        self,
        name: str,
        value: float,
        unit: str,
        versus: str | None = None,
        ratio: float | None = None,
        goal: str | None = None,
    ) -> None:
        """Add a figure. `goal` is '>= 0.9' for the ratio, or with the unit, '>= 3 GB/s', for the value."""
        self.rows.append(Row(name, value, unit, versus, ratio, goal, _is_met(value, unit, ratio, goal)))

    def note(self, text: str) -> None:
        """A line under the table, such as what could not be measured."""
        self._notes.append(text)

    def finish(self, json_path: str | os.PathLike[str] | None = None) -> None:
        """Print the table, and write JSON where a path is given."""
        table = Table(title=f"{self.title}  ({machine()})")
        for column in ("what", "value", "unit", "versus", "ratio", "goal", "met"):
            table.add_column(column, justify="right" if column in ("value", "ratio") else "left")
        for row in self.rows:
            met = "" if row.met is None else "yes" if row.met else "NO"
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            table.add_row(row.name, f"{row.value:.4g}", row.unit, row.versus or "", ratio, row.goal or "", met)
        console = Console(width=None if os.isatty(1) else 140)
        console.print(table)
        for note in self._notes:
            console.print(note, highlight=False)
        if json_path:
            record = {
                "machine": machine(),
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "commit": commit(),
                "title": self.title,
                "rows": [asdict(row) for row in self.rows],
            }
            Path(json_path).write_text(json.dumps(record, indent=2) + "\n")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """`--quick` and `--json FILE`, which every benchmark takes."""
    parser.add_argument("--quick", action="store_true", help="end within two minutes")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")


def machine() -> str:
    """Processor, number of cores and load, in a few words."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*: (.+)", cpuinfo.read_text())):
        model = match[1].strip()
    return f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def commit() -> str:
    """Short name of the commit that is measured, with '+' for changes on top; empty outside of a clone."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip()


def _is_met(value: float, unit: str, ratio: float | None, goal: str | None) -> bool | None:
    if goal is None:
        return None
    match = re.fullmatch(r"(>=|<=|>|<)\s*([\d.]+)\s*(.*)", goal)
    if match is None or (match[3] and match[3] != unit) or (not match[3] and ratio is None):
        raise ValueError(f"goal '{goal}' fits neither the unit '{unit}' nor a ratio")
    subject = value if match[3] or ratio is None else ratio
    return bool(_COMPARE[match[1]](subject, float(match[2])))
