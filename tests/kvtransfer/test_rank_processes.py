"""Hand-overs between groups of ranks, each rank a process: all of them at work, and one killed in the middle."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtransfer.layout import FLOAT8, INT8, BlockLayout
from tests.kvtransfer.dense import lay_out, read_back
from tests.kvtransfer.world import ROOT, scattered

LAYERS, HEADS, HEAD_DIM = 2, 4, 8
NUM_TOKENS = 100
POOL = 32
"""Blocks of every pool."""
UNWRITTEN = 0x77
SCALES = tuple(0.01 + 0.001 * number for number in range(LAYERS * HEADS * 2))


def group(degree: int, page: int, dtype: str) -> list[BlockLayout]:
    layout = BlockLayout(dtype, dtype, LAYERS, HEADS // degree, HEAD_DIM, page, 0, degree, "weights")
    scales = torch.tensor(SCALES).view(LAYERS, HEADS, 2)
    ranks = [replace(layout, tp_rank=rank) for rank in range(degree)]
    if dtype != FLOAT8:
        return ranks
    return [replace(rank, kv_scales=scales[:, rank.heads.start : rank.heads.stop].flatten().tolist()) for rank in ranks]


class RankProcess:
    """A process that is told what to do line by line, and says line by line what happens."""

    def __init__(self, module: str, settings: dict[str, object]) -> None:
        command = [sys.executable, "-m", f"tests.kvtransfer.{module}", json.dumps(settings)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def tell(self, *command: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def read(self, kind: str) -> object:
        """The next line of this kind; blocks."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if kind in (said := json.loads(line)):
                return said[kind]
        raise AssertionError(f"it ended without '{kind}'")

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)


class Groups:
    """Both groups at work on hand-over "h", whose content every rank that gives has as its own dtype holds it."""

    def __init__(self, there: list[BlockLayout], here: list[BlockLayout], folder: Path, stack: contextlib.ExitStack):
        self.there, self.here, self._folder = there, here, folder
        dense = torch.randn(LAYERS, HEADS, 2, NUM_TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(1))
        self.held = torch.cat([read_back(lay_out(dense, each), each, NUM_TOKENS).float() for each in there], 1)
        self._rows = [scattered(-(-NUM_TOKENS // each.page_size_tokens), rank, POOL) for rank, each in enumerate(there)]
        self.row = scattered(-(-NUM_TOKENS // here[0].page_size_tokens), 9, POOL)
        self.givers = []
        takers = [(f"decode-{rank}", 22) for rank in range(len(here))]
        for rank, layout in enumerate(there):
            blocks = np.zeros((POOL, layout.block_bytes), np.uint8)
            blocks[self._rows[rank]] = lay_out(dense, layout)
            np.save(folder / f"giver{rank}.npy", blocks)
            settings = {"layout": dataclasses.asdict(layout), "blocks": str(folder / f"giver{rank}.npy")}
            giver = RankProcess("rank_offerer", {**settings, "lanes": "shm,tcp", "takers": takers})
            stack.callback(_end, giver)
            self.givers.append(giver)
        refs = [(f"prefill-{rank}", 11, giver.read("address")) for rank, giver in enumerate(self.givers)]
        self.takers = []
        for rank, layout in enumerate(here):
            settings = {"layout": dataclasses.asdict(layout), "givers": refs, "num_blocks": POOL, "row": self.row}
            lanes = ("shm", "tcp")[rank % 2]
            taker = RankProcess("rank_puller", {**settings, "lanes": lanes, "into": str(folder / f"taker{rank}.npy")})
            stack.callback(_end, taker)
            self.takers.append(taker)
        for giver in self.givers:
            giver.tell("open", "h")

    def offer(self, giver: int, first_token: int, end_token: int) -> int:
        """Returns how many blocks of that rank have been offered by then."""
        page = self.there[giver].page_size_tokens
        first, end = first_token // page, -(-end_token // page)
        self.givers[giver].tell("offer", "h", first, self._rows[giver][first:end])
        return end

    def close(self, giver: int, first_token_id: int = 7) -> None:
        self.givers[giver].tell("close", "h", len(self._rows[giver]), NUM_TOKENS, first_token_id)

    def ending(self, taker: int) -> dict[str, object]:
        ended = self.takers[taker].read("ended")
        assert isinstance(ended, dict)
        return ended

    def check(self, taker: int, num_blocks: int) -> None:
        """The first blocks of a taker's row are right, and nothing but its row is written."""
        layout = self.here[taker]
        pool = np.load(self._folder / f"taker{taker}.npy")
        expected = lay_out(self.held, layout)[:num_blocks]
        num_tokens = min(NUM_TOKENS, num_blocks * layout.page_size_tokens)
        written = read_back(pool[self.row[:num_blocks]], layout, num_tokens)
        assert torch.equal(written, read_back(expected, layout, num_tokens))
        assert (pool[np.setdiff1d(np.arange(POOL), self.row)] == UNWRITTEN).all()


def _end(rank: RankProcess) -> None:
    rank.process.kill()
    rank.process.communicate(timeout=10)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    with contextlib.ExitStack() as stack:
        yield lambda there, here: Groups(there, here, tmp_path, stack)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (group(2, 16, "float32"), group(1, 16, "float32")),
        (group(1, 16, "bfloat16"), group(2, 32, "bfloat16")),
        (group(2, 16, "bfloat16"), group(4, 32, "float32")),
        (group(4, 32, FLOAT8), group(2, 8, "bfloat16")),
        (group(2, 8, "float16"), group(1, 16, INT8)),
        (group(4, 16, INT8), group(1, 64, FLOAT8)),
    ],
    ids=["2-1", "1-2 page", "2-4 page dtype", "4-2 from float8", "2-1 to int8", "4-1 int8 to float8"],
)
def test_every_rank_gets_its_heads_and_every_rank_that_gives_its_blocks_back(start, there, here):
    groups = start(there, here)
    for first in (0, 32, 64):
        for giver in reversed(range(len(there))):  # ranks need not keep step
            groups.offer(giver, first, min(first + 32, NUM_TOKENS) if first < 64 else NUM_TOKENS)
    for giver in range(len(there)):
        groups.close(giver)
    for taker in range(len(here)):
        ending = groups.ending(taker)
        same_bits = there[0].dtype == here[0].dtype
        assert ending == {
            "num_blocks": len(groups.row), "num_tokens": NUM_TOKENS, "first_token_id": 7, "failure": None,
            "same_bits": same_bits,
        }  # fmt: skip
        groups.check(taker, len(groups.row))
    for giver in groups.givers:
        assert giver.read("event") == ["h", "released", "verified"]


def test_a_rank_killed_in_the_middle_leaves_what_was_whole_of_all_ranks_and_the_others_get_their_blocks_back(start):
    groups = start(group(2, 16, "bfloat16"), group(1, 32, "float32"))
    offered = groups.offer(0, 0, NUM_TOKENS) + groups.offer(1, 0, 80)
    groups.close(0)
    (taker,) = groups.takers
    while taker.read("arrived") != offered:
        pass
    start_s = time.monotonic()
    groups.givers[1].kill()
    ending = groups.ending(0)
    assert time.monotonic() - start_s < 5.0
    assert ending["failure"] == "rank 1 of 2: it closed the connection"
    assert (ending["num_blocks"], ending["same_bits"], ending["num_tokens"]) == (80 // 32, False, None)
    groups.check(0, 80 // 32)
    assert groups.givers[0].read("event") == ["h", "released", "verified"], "it gave all it had"


def test_a_rank_that_is_killed_ends_the_hand_over_of_a_rank_that_has_not_closed(start):
    groups = start(group(2, 16, "float32"), group(4, 16, "float32"))
    for giver in (0, 1):
        groups.offer(giver, 0, 48)
    for taker in groups.takers:
        while taker.read("arrived") != 3:
            pass
    groups.givers[1].kill()
    for rank in (2, 3):
        assert groups.ending(rank)["failure"] == "it closed the connection", "all their heads came from it"
        groups.check(rank, 3)
    groups.offer(0, 48, NUM_TOKENS)
    groups.close(0)
    for rank in (0, 1):
        assert groups.ending(rank)["failure"] is None, "none of theirs did"
        groups.check(rank, len(groups.row))


def test_blocks_stay_with_the_lease_until_the_last_rank_is_done_also_when_one_is_killed(start):
    groups = start(group(1, 16, "bfloat16"), group(2, 16, "bfloat16"))
    groups.offer(0, 0, 48)
    for taker in groups.takers:
        while taker.read("arrived") != 3:
            pass
    groups.takers[1].kill()
    groups.offer(0, 48, NUM_TOKENS)
    groups.close(0)
    assert groups.ending(0)["failure"] is None, "the death of one rank does not end what another reads"
    groups.check(0, len(groups.row))
    assert groups.givers[0].read("event") == ["h", "released", "unverified"], "told once, after both"
