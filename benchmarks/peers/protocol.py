"""How a benchmark asks a peer to work: one JSON line in, one JSON line out. Standard library only, as every
environment imports it.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Timed:
    """Work that was done, by the peer's own account."""

    seconds: float
    """Of the timed part alone."""
    num_timed: int
    """Tokens that came within these seconds."""
    lengths: list[int]
    """Of each stream: its tokens in all, the prompt's and the generated ones."""
    first_stream: list[int]
    """The tokens that the first stream generated."""

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.num_timed / self.seconds


class Side(Protocol):
    """One engine, with its weights loaded, greedy, never ending a stream before its time."""

    def next_tokens(self, prompts: Sequence[list[int]]) -> list[int]:
        """The likeliest token after each prompt, each prompt by itself."""
        ...

    def decode(self, prompt: list[int], batch: int, new_tokens: int) -> Timed:
        """`batch` streams go on behind prompts of this length, each with KV memory of its own.

        Every stream generates 1 + new_tokens tokens. Timed: from when all have their first to when all have their
        last one. The first stream's prompt is `prompt`.
        """
        ...

    def prefill(self, prompt: list[int]) -> Timed:
        """Timed: from the prompt, which nothing is remembered of, to its first token; `num_timed` is its length."""
        ...


def answer_lines(side: Side, output_fd: int, about: str) -> None:
    """Serve `side` on standard input until it ends. `about` is what it says about itself when it is ready."""
    with os.fdopen(output_fd, "w") as output:
        print(json.dumps({"about": about}), file=output, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            result = getattr(side, request.pop("do"))(**request)
            print(json.dumps(asdict(result) if isinstance(result, Timed) else result), file=output, flush=True)


def claim_output() -> int:
    """Keep standard output for answers: whatever libraries print there goes to standard error. Returns its new fd.

    From here on this process also ends with the one that started it, in the middle of a computation, too.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    kept = os.dup(1)
    os.dup2(2, 1)
    return kept
