"""vLLM on CPU under long prompts, in its own environment: `run_vllm_stalls.py MODEL_FOLDER THREADS SHAPE`.

Its asynchronous engine as its server runs it, with the server's defaults. Prints an `arrivals.Stall` as JSON.
"""

import asyncio
import itertools
import json
import os
import sys
import time
from dataclasses import asdict

from arrivals import Shape, Stall, measure
from protocol import claim_output
from run_vllm import MAX_TOKENS, prepare


async def stall(folder: str, shape: Shape) -> Stall:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(model=folder, dtype="bfloat16", max_model_len=MAX_TOKENS)
    engine = AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.OPENAI_API_SERVER)
    ids = itertools.count()

    async def follow(prompt: list[int], max_tokens: int, times: list[float]) -> None:
        sampling = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        async for output in engine.generate({"prompt_token_ids": prompt}, sampling, f"{next(ids)}"):
            times.extend([time.perf_counter()] * len(output.outputs[0].token_ids))

    try:
        await follow([2] * 512, 8, [])  # warm
        return await measure(follow, shape)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    output_fd = claim_output()
    prepare(int(sys.argv[2]))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # as its server does
    result = asyncio.run(stall(sys.argv[1], Shape(**json.loads(sys.argv[3]))))
    with os.fdopen(output_fd, "w") as output:
        print(json.dumps(asdict(result)), file=output)
