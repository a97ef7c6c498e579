"""How long a tenant's short request waits for its first token while another tenant floods the worker with long prompts.

One engine with the demo model, greedy. The same request alone, beside the flood as another tenant's, and in the flood's
own line, which is what it would be without tenants. And what the queue costs a step of the scheduler, in its own time.
"""

import argparse
import random
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

import engine as engine_package
from baton.config import EngineOptions
from benchmarks.report import Report, add_common_arguments
from cli.assembly import assemble
from engine.blocks import BlockAllocator
from engine.engine import Engine
from engine.limits import SchedulerLimits
from engine.loading import load_model
from engine.plan import Sampled, StepResult
from engine.requests import EngineRequest, SamplingParams, Standing
from engine.scheduler import Scheduler

MODEL = Path(engine_package.__file__).parent / "demo_model"
OPTIONS = EngineOptions(kv_memory="256MiB", max_batch_tokens=256)
SHORT_TOKENS, LONG_TOKENS, NUM_LONG = 20, 800, 64
WARM_UP_STEPS = 10
RUNNING = 64


def request(number: int, num_tokens: int, tenant: str, rng: random.Random) -> EngineRequest:
    prompt = tuple(rng.randrange(10, 4000) for _ in range(num_tokens))
    sampling = SamplingParams(max_tokens=1)
    return EngineRequest(f"{number}", prompt, num_tokens, sampling, b"root", standing=Standing(tenant))


def timed_step(engine: Engine) -> float:
    began = time.perf_counter()
    engine.step()
    return time.perf_counter() - began


class Wait(NamedTuple):
    """In seconds."""

    first_token_s: float
    flood_step_s: float
    """What a step took, in the median, before the short request came; 0 without a flood."""


def wait(engine: Engine, tenant: str, num_long: int, rng: random.Random) -> Wait:
    """Of a short request of `tenant`; "flood" has sent `num_long` long ones before."""
    for number in range(num_long):
        engine.add(request(number, LONG_TOKENS, "flood", rng))
    steps = [timed_step(engine) for _ in range(WARM_UP_STEPS if num_long else 0)]
    engine.add(request(num_long, SHORT_TOKENS, tenant, rng))
    began = time.perf_counter()
    while not any(token.request_id == f"{num_long}" for token in engine.step().tokens):
        pass
    seconds = time.perf_counter() - began
    for number in range(num_long):
        engine.abort(f"{number}")
    while engine.has_work():
        engine.step()
    return Wait(seconds, median(steps) if steps else 0.0)


def step_s(num_tenants: int, num_steps: int) -> float:
    """Seconds of this process that planning and applying a step of decodes takes, with as many waiting as running."""
    scheduler = Scheduler(BlockAllocator(40_000), SchedulerLimits(16, 512, RUNNING, 8192), lambda num_tokens: 0)
    for number in range(2 * RUNNING):
        sampling, standing = SamplingParams(max_tokens=8000), Standing(f"{number % num_tenants}")
        scheduler.add(EngineRequest(f"{number}", (7,) * 8, 8, sampling, b"root", standing=standing))
    best = float("inf")
    for _ in range(num_steps // 100):
        began = time.process_time()
        for _ in range(100):
            plan = scheduler.plan()
            scheduler.apply(plan, StepResult({each.request_id: [Sampled(5)] for each in plan.sequences}))
        best = min(best, (time.process_time() - began) / 100)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    arguments = parser.parse_args()
    rounds, rng = 3 if arguments.quick else 10, random.Random(1)
    engine = assemble(load_model(MODEL), OPTIONS).engine
    report = Report("A short request beside a flood of another tenant's prompts")
    alone = median(wait(engine, "other", 0, rng).first_token_s for _ in range(rounds))
    waits = [wait(engine, "other", NUM_LONG, rng) for _ in range(rounds)]
    beside, flood_step = (median(each) for each in zip(*waits, strict=True))
    in_line = wait(engine, "flood", NUM_LONG, rng).first_token_s
    report.row(f"first token of {SHORT_TOKENS} tokens, alone", 1e3 * alone, "ms")
    report.row("a step of the flood", 1e3 * flood_step, "ms", "alone", flood_step / alone)
    report.row(f"first token, beside {NUM_LONG} prompts of {LONG_TOKENS}", 1e3 * beside, "ms", "a step of the flood",
               beside / flood_step, "<= 2")  # fmt: skip
    report.row("the same in the flood's own line", 1e3 * in_line, "ms", "beside it", in_line / beside, ">= 10")
    num_steps = 400 if arguments.quick else 2000
    one, many = step_s(1, num_steps), step_s(16, num_steps)
    report.row(f"scheduler, a step of {RUNNING}, one tenant", 1e6 * one, "us")
    report.row("the same, 16 tenants", 1e6 * many, "us", "one tenant", many / one, "<= 1.25")
    report.note(f"Model: the demo model, on {torch.get_num_threads()} threads; no wires, no hand-over.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
