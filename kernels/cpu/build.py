"""Compiles native.cpp for this processor, once; `python -m kernels.cpu.build` does it ahead of the first start.

Without a compiler, or on a processor without the instructions, there is no library, and torch does the work.
"""

import sys
from pathlib import Path

from baton.compiled import Unavailable, compiled, processor_flags

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-fopenmp", "-ffp-contract=off")
"""No contraction: every copy of a template must round alike, or a row's bits would depend on its neighbours."""
NEEDED = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"})


def library() -> Path:
    """Path of the compiled library, compiling it if need be. Raises Unavailable."""
    missing = NEEDED - processor_flags()
    if missing:
        raise Unavailable(f"the processor has no {', '.join(sorted(missing))}")
    return compiled(SOURCE, FLAGS)


if __name__ == "__main__":
    try:
        print(f"native CPU kernels: {library()}")
    except Unavailable as reason:
        print(f"no native CPU kernels, torch does the work: {reason}", file=sys.stderr)
