"""Compiles the kernels but attention for an H100, as `hopper` does: `python -m tests.kernels.hopper_elementwise`."""

import torch

from tests.kernels.hopper import ELEMENTS, Compiled, compiled_launches

WORTH_NAMING = ("wgmma", "ld.global.v4.b32", "st.global.v4.b32", "ld.global.v2.b64", "st.global.v2.b64")
"""The products of Hopper's tensor cores, and accesses of 16 bytes a thread."""


def launches() -> list[Compiled]:
    """All in bfloat16, as it is served; sampling for vocabularies of one and of many parts."""
    from kernels.gpu.cases_elementwise import cases
    from kernels.gpu.sampling import sample

    ELEMENTS.setdefault(torch.float64, "fp64")
    with compiled_launches() as compiled:
        for case in cases():
            if "bfloat16" in case.name.split(" ", 1)[1]:
                case.run(torch.device("cpu"))
        for vocab_size in (1001, 128256):
            rows = torch.ones(2, dtype=torch.float64)
            sample(torch.zeros(2, vocab_size, dtype=torch.bfloat16), rows, rows.int(), rows, rows, rows)
    return compiled


if __name__ == "__main__":
    for launch in launches():
        instructions = [name for name in WORTH_NAMING if name in launch.ptx]
        print(launch.name, launch.shared_bytes, *instructions)
