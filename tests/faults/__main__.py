"""`python -m tests.faults`: run cases of the matrix and print what came of them. Not 0 when anything was wrong."""

import argparse
import sys
import time
from pathlib import Path

import uvloop

from tests.faults.matrix import Result, batches, report, run_cases, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--cases", type=int, default=300, help="how many, spread over all cells (default: 300)")
    parser.add_argument("--seed", type=int, default=1, help="chooses cells, requests and moments (default: 1)")
    parser.add_argument("--victims", default="", help="only those with this in their name, such as coordinator or etcd")
    parser.add_argument("--minutes", type=float, help="begin no case after this time")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    until_s = time.monotonic() + 60 * arguments.minutes if arguments.minutes else None
    results = uvloop.run(
        run_cases(batches(arguments.cases, arguments.seed, arguments.victims), arguments.seed, show, until_s)
    )
    print(table(results))
    report(results).finish(arguments.json)
    return int(any(result.bad for result in results))


def show(result: Result) -> None:
    """One line a case, and what was wrong in it."""
    proven = "proven" if result.proven else "NOT proven"
    print(
        f"seed {result.seed}: {result.victim}: {result.fault} at {result.moment} ({result.fleet}): {proven}, "
        f"{result.live_parts} live parts, longest pause {max(result.pauses_s, default=0):.2f} s",
        flush=True,
    )
    for kind, messages in (("WRONG", result.wrong), ("LOST", result.lost), ("LEFT", [result.not_kept])):
        for message in filter(None, messages):
            print(f"  {kind} {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
