"""`make gpu-check`: are the GPU kernels and the engine on them right, and how near are they to the GPU's limits?

Correctness first, then figures, each beside the limit or the library that it is judged by. Needs nothing installed but
torch, triton, transformers and what these bring. Without a GPU it says so and ends well.
"""

import argparse
import os
import sys

import torch

from benchmarks.report import Report, add_common_arguments

FULL_S, QUICK_S = 450.0, 110.0
INTERPRETED_POSITIONS = 70
MAX_SHOWN_FAILURES = 10


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--interpret", action="store_true", help="tiny correctness cases in Triton's interpreter")
    arguments = parser.parse_args(words)
    if not arguments.interpret and not torch.cuda.is_available():
        print("gpu-check: torch finds no CUDA device here, so there is nothing to check")
        return 0
    # Triton decides while kernels are imported, which the functions below do.
    os.environ["TRITON_INTERPRET"] = "1" if arguments.interpret else "0"
    if arguments.interpret:
        return _check(torch.device("cpu"), INTERPRETED_POSITIONS, full=False)
    device = torch.device("cuda", torch.cuda.current_device())
    status = _check(device, 2048 if arguments.quick else 131072, full=not arguments.quick)
    _measure(arguments)
    return status


def _check(device: torch.device, longest: int, *, full: bool) -> int:
    """1 when anything is wrong."""
    from benchmarks.gpu import correctness

    results = list(correctness.kernel_failures(device, longest, full))
    failures = [f"{name}: {wrong}" for name, wrong in results if wrong]
    if wrong := correctness.sampling_failure(device, 128256 if device.type == "cuda" else 300):
        failures.append(f"sampling: {wrong}")
    new_tokens = correctness.NEW_TOKENS if device.type == "cuda" else 3
    if wrong := correctness.engine_tokens_are_equal(device, new_tokens):
        failures.append(f"engine, float32: {wrong}")
    if device.type == "cuda":
        ours, theirs = correctness.engine_is_as_close_as_transformers(device)
        if not ours <= correctness.CLOSENESS * theirs:
            failures.append(f"engine, 8B shape: {ours:.3g} from float32, transformers {theirs:.3g}")
    for failure in failures[:MAX_SHOWN_FAILURES]:
        print("WRONG", failure)
    print(
        f"gpu-check: {len(results)} kernel cases, sampling and the engine on {device}, {len(failures)} wrong",
        flush=True,
    )
    return int(bool(failures))


def _measure(arguments: argparse.Namespace) -> None:
    from benchmarks.gpu import kernels, relaying, steps
    from benchmarks.gpu.measuring import Budget, copy_bandwidth, matmul_rate

    budget = Budget(QUICK_S if arguments.quick else FULL_S)
    report = Report(f"GPU kernels and engine on {torch.cuda.get_device_name()}")
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    report.row("copy bandwidth, read and written", bandwidth / 1e9, "GB/s")
    report.row("bf16 matrix product", rate / 1e12, "TFLOP/s")
    if arguments.quick:
        kernels.decode(report, bandwidth, budget, (8192,), (1, 32))
        kernels.prefill(report, budget, ((1, 8192),))
        steps.measure(report, bandwidth, rate, budget, (1, 64))
    else:
        steps.measure(report, bandwidth, rate, budget, (1, 8, 32, 64))
        kernels.decode(report, bandwidth, budget, (1024, 8192, 32768, 131072), (1, 8, 32, 128))
        kernels.prefill(report, budget, ((4, 2048), (1, 8192), (1, 16384)))
        relaying.measure(report, budget)
    kernels.others(report)
    report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
