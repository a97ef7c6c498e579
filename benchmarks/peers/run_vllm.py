"""vLLM on CPU as a side, in its own environment: `run_vllm.py MODEL_FOLDER THREADS`.

Its engine in this process, stepped by hand. The prompts of a batch have been answered once before the timed run, so
that its prefix cache lets all streams begin in the same step; each has blocks of its own, as all prompts differ.
"""

import itertools
import os
import random
import sys
import time
from collections.abc import Sequence

from protocol import Timed, answer_lines, claim_output

MAX_TOKENS = 8192
BLOCK_TOKENS = 32
"""Small, or the prefix cache would know nothing of prompts of 128 tokens."""


def prepare(threads: int) -> None:
    """What vLLM and libiomp5 read from the environment when they are imported.

    One thread a core, but not bound to it: other load on the machine hits bound threads hardest, and on an idle one
    it makes no difference. The pause after which threads sleep is what vLLM sets itself for its worker processes.
    """
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "KMP_BLOCKTIME": "5",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


class Vllm:
    def __init__(self, folder: str) -> None:
        from vllm import LLM

        self._engine = LLM(
            folder, dtype="bfloat16", max_model_len=MAX_TOKENS, max_num_seqs=32, max_num_batched_tokens=4096,
            block_size=BLOCK_TOKENS, enable_prefix_caching=True, disable_log_stats=True,
        ).llm_engine  # fmt: skip
        self._vocabulary = self._engine.model_config.get_vocab_size()
        self._ids = itertools.count()

    def next_tokens(self, prompts: Sequence[list[int]]) -> list[int]:
        return self._generate(prompts, 1).first_tokens

    def decode(self, prompt: list[int], batch: int, new_tokens: int) -> Timed:
        others = random.Random(len(prompt))
        prompts = [prompt] + [
            [others.randrange(3, self._vocabulary) for _ in prompt] for _ in range(1, batch)
        ]  # fmt: skip
        self._generate(prompts, 2)
        return self._generate(prompts, 1 + new_tokens).timed()

    def prefill(self, prompt: list[int]) -> Timed:
        run = self._generate([prompt], 1)
        return Timed(run.all_started - run.begin, len(prompt), [len(prompt) + 1], run.first_tokens)

    def _generate(self, prompts: Sequence[list[int]], new_tokens: int) -> "Run":
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        run = Run(prompts)
        for number in range(len(prompts)):
            name = f"{next(self._ids)}"
            run.numbers[name] = number
            self._engine.add_request(name, {"prompt_token_ids": prompts[number]}, sampling)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                run.take(run.numbers[output.request_id], list(output.outputs[0].token_ids))
            run.step_done()
        return run


class Run:
    """Follows the streams of one batch."""

    def __init__(self, prompts: Sequence[list[int]]) -> None:
        self.numbers: dict[str, int] = {}
        self._prompts = prompts
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._num_at_start = 0
        self.begin, self.all_started, self._end = time.perf_counter(), 0.0, 0.0

    def take(self, number: int, tokens: list[int]) -> None:
        self._tokens[number] = tokens

    def step_done(self) -> None:
        self._end = time.perf_counter()
        if not self.all_started and all(self._tokens):
            self.all_started, self._num_at_start = self._end, sum(map(len, self._tokens))

    @property
    def first_tokens(self) -> list[int]:
        return [tokens[0] for tokens in self._tokens]

    def timed(self) -> Timed:
        lengths = [len(prompt) + len(tokens) for prompt, tokens in zip(self._prompts, self._tokens, strict=True)]
        num_timed = sum(map(len, self._tokens)) - self._num_at_start
        return Timed(self._end - self.all_started, num_timed, lengths, self._tokens[0])


if __name__ == "__main__":
    output_fd = claim_output()
    prepare(int(sys.argv[2]))
    side = Vllm(sys.argv[1])
    from vllm import __version__

    answer_lines(side, output_fd, f"vllm-cpu {__version__}, libiomp5, {sys.argv[2]} threads")
