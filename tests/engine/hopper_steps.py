"""Compiles for an H100 what steps of many shapes launch, and prints how many forms of each kernel that took.

Run in a process of its own with TRITON_INTERPRET=0, as `python -m tests.engine.hopper_steps`.
"""

import hashlib
from collections import Counter

import torch

from benchmarks.gpu import steps
from engine.gpu.runner import DeviceRunner
from engine.plan import PlannedSequence, SampleSpec, StepPlan
from engine.pool import BlockShape, KVPool
from engine.requests import SamplingParams
from tests.kernels.hopper import ELEMENTS, compiled_launches

SMALL = {
    "num_hidden_layers": 1, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 5000,
}  # fmt: skip
SPEC = SampleSpec(SamplingParams(temperature=1.0, top_k=5, top_p=0.9), [], [])


def single(name, start):
    return planned(name, 1, start)


def planned(name, count, start):
    return PlannedSequence(name, [1] * count, start, list(range(8)), 20, SPEC)


def main():
    ELEMENTS[torch.float64] = "fp64"
    steps.CONFIG.update(SMALL)
    loaded, _, _ = steps.random_8b(torch.device("cpu"))
    runner = DeviceRunner(loaded, KVPool(BlockShape.of(loaded.config, 16, torch.bfloat16), 64), max_rows=64)
    with compiled_launches() as launches:
        runner.record_graphs((1, 2, 4, 8), 1024, lambda function: function)
        for count in (5, 7, 16, 33, 64):
            runner.launch(StepPlan([planned("a", count, 0)], []))
        for batch in (1, 2, 3, 5, 8):
            singles = [single(str(row), 20 + row) for row in range(batch)]
            runner.launch(StepPlan(singles, []))
            runner.launch(StepPlan([*singles, planned("chunk", 9, 0)], []))
    forms = {(launch.name, hashlib.md5(launch.ptx.encode()).hexdigest()) for launch in launches}
    for name, count in Counter(name for name, _ in forms).items():
        print(name, count)


if __name__ == "__main__":
    main()
