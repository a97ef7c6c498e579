"""How much of the prompts each retention policy finds again, on public traces, beside the best that any could do.

    python -m benchmarks.retention [--quick] [--json FILE] [--capacities 1,3,10,50]

Replays the prompts of the Mooncake traces (see data/README.md) through `kvtransfer.tiers.retention`, as one tier of so
many million tokens that serves all requests. Of every prompt the leading blocks that are held count as found; then they
are touched and the rest is put, tail first. 'Filter' is `kvtransfer.tiers.admission` in front of it; blocks are then
put heads first, up to the first that is refused, which suits a filter better. 'With one-off
prompts' mixes a prompt of 64 k tokens that never comes again into every tenth request of the conversations, and counts
the others. The optimum is Belady's for an order of accesses known ahead, with leave not to store a block: nothing holds
more blocks that are used again. Outputs of earlier turns count as prompts of the next, as the traces name them.
"""

import argparse
import gzip
import heapq
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from baton.block_names import NAME_BYTES
from benchmarks.report import Report, add_common_arguments
from kvtransfer.tiers.admission import Admission
from kvtransfer.tiers.retention import DEFAULT_POLICY, POLICIES, Retention

BLOCK_TOKENS = 512
ONE_OFF_BLOCKS = 128
DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Prompt:
    names: list[bytes]
    num_tokens: int
    is_counted: bool = True

    def tokens_of(self, num_blocks: int) -> int:
        """Tokens in so many leading blocks; only the last one may be short."""
        return min(num_blocks * BLOCK_TOKENS, self.num_tokens)


def name_of(what: object) -> bytes:
    return blake2b(str(what).encode(), digest_size=NAME_BYTES).digest()


def load(trace: str) -> list[Prompt]:
    names: dict[int, bytes] = {}
    prompts = []
    with gzip.open(DATA / f"mooncake_{trace}.jsonl.gz", "rt") as lines:
        for line in lines:
            _, num_tokens, runs = json.loads(line)
            ids = [first + index for first, count in runs for index in range(count)]
            prompts.append(Prompt([names.setdefault(id_, name_of(id_)) for id_ in ids], num_tokens))
    return prompts


def with_one_off_prompts(prompts: list[Prompt]) -> list[Prompt]:
    mixed = []
    for number, prompt in enumerate(prompts):
        mixed.append(prompt)
        if number % 10 == 0:
            once = [name_of(f"{number} {index}") for index in range(ONE_OFF_BLOCKS)]
            mixed.append(Prompt(once, ONE_OFF_BLOCKS * BLOCK_TOKENS, is_counted=False))
    return mixed


def leading(prompt: Prompt, held: Retention | set[bytes]) -> int:
    return next((index for index, name in enumerate(prompt.names) if name not in held), len(prompt.names))


def share(prompts: Iterable[Prompt], found: Iterable[int]) -> float:
    """Per cent of the prompts' tokens that were found, from the number of leading blocks of each."""
    counted = [(prompt, blocks) for prompt, blocks in zip(prompts, found, strict=True) if prompt.is_counted]
    hits = sum(prompt.tokens_of(blocks) for prompt, blocks in counted)
    return 100 * hits / sum(prompt.num_tokens for prompt, _ in counted)


def replay(prompts: list[Prompt], policy: str, num_blocks: int, *, is_filtered: bool, is_tail_first: bool) -> float:
    kept = Retention(num_blocks, policy)
    admission = Admission(num_blocks) if is_filtered else None
    found = []
    for now, prompt in enumerate(prompts):
        num_found = leading(prompt, kept)
        found.append(num_found)
        if admission:
            for name in prompt.names:
                admission.record(name)
        kept.touch(prompt.names[:num_found], now)
        missing = prompt.names[num_found:]
        for name in reversed(missing) if is_tail_first else missing:
            if len(kept) == kept.capacity and name not in kept:
                victim = kept.victim()
                if victim is None or (admission and not admission.admits(name, victim)):
                    break  # what comes behind a block that is not there is of no use
                kept.evict(victim)
            kept.insert([name], now)
    return share(prompts, found)


def infinite(prompts: list[Prompt]) -> float:
    held: set[bytes] = set()
    found = []
    for prompt in prompts:
        found.append(leading(prompt, held))
        held.update(prompt.names)
    return share(prompts, found)


def optimum(prompts: list[Prompt], num_blocks: int) -> float:
    """Evicts what is used again last. Heads are used no later than their tails, so what it holds are whole chains."""
    accesses = [name for prompt in prompts for name in prompt.names]
    next_use, coming = [math.inf] * len(accesses), dict[bytes, int]()
    for at in range(len(accesses) - 1, -1, -1):
        next_use[at] = coming.get(accesses[at], math.inf)
        coming[accesses[at]] = at
    held: dict[bytes, float] = {}
    latest: list[tuple[float, bytes]] = []
    found, at = [], 0
    for prompt in prompts:
        num_found = 0
        for name in prompt.names:
            num_found += held.pop(name, None) is not None
            if next_use[at] < math.inf:
                held[name] = next_use[at]
                heapq.heappush(latest, (-next_use[at], name))
            while len(held) > num_blocks:
                use, victim = heapq.heappop(latest)
                if held.get(victim) == -use:
                    del held[victim]
            at += 1
        found.append(num_found)
    return share(prompts, found)


def measure(report: Report, workload: str, prompts: list[Prompt], capacities: list[float], policies: list[str]) -> None:
    report.row(f"{workload}, room for everything", infinite(prompts), "%")
    for capacity in capacities:
        num_blocks = int(capacity * 1e6 / BLOCK_TOKENS)
        best = optimum(prompts, num_blocks)
        where = f"{workload}, {capacity:g} M tokens"
        report.row(f"{where}, optimum", best, "%")
        cases = [(policy, is_filtered, not is_filtered) for policy in policies for is_filtered in (False, True)]
        for policy, is_filtered, is_tail_first in [*cases, (DEFAULT_POLICY, False, False)]:
            value = replay(prompts, policy, num_blocks, is_filtered=is_filtered, is_tail_first=is_tail_first)
            how = policy + (" + filter" if is_filtered else "" if is_tail_first else ", heads first")
            report.row(f"{where}, {how}", value, "%", f"optimum {best:.1f}", value / best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--capacities", default="1,3,10,50", help="millions of tokens, several separated by commas")
    arguments = parser.parse_args()
    capacities = [float(text) for text in arguments.capacities.split(",")]
    conversation = load("conversation")
    policies = ["lru", DEFAULT_POLICY] if arguments.quick else list(POLICIES)
    report = Report("Prompt tokens found again, by retention policy")
    measure(report, "conversation", conversation, capacities, policies)
    if not arguments.quick:
        mixed = with_one_off_prompts(conversation)
        measure(report, "conversation with one-off prompts", mixed, capacities, policies)
        measure(report, "synthetic", load("synthetic"), capacities, policies)
    report.note("The traces say nothing of time to live, pins and tenants; those are tested, not measured.")
    report.note("One tier for all requests: a real worker sees the share of them that is routed to it.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
