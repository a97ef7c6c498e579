"""Transformers as a side: `run_transformers.py MODEL_FOLDER THREADS`; also the naive path for long contexts.

Naive is precisely this: `generate` with its own defaults, that is scaled-dot-product attention of torch over a
`DynamicCache` that a step extends by concatenation, every stream as long as the longest, no compilation, bfloat16. The
prompt is computed once and its cache repeated for the batch, which `generate` then continues from.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

from protocol import Timed, answer_lines, claim_output


class Transformers:
    def __init__(self, folder: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self._model.generation_config.eos_token_id = None
        self._generate(torch.full((1, 16), 2), 2)

    def next_tokens(self, prompts: Sequence[list[int]]) -> list[int]:
        tensors = [self._torch.tensor([prompt]) for prompt in prompts]
        return [self._generate(prompt, 1).tokens[0, -1].item() for prompt in tensors]

    def decode(self, prompt: list[int], batch: int, new_tokens: int) -> Timed:
        with self._torch.inference_mode():
            cache = self._model(self._torch.tensor([prompt[:-1]]), logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(batch)
        run = self._generate(self._torch.tensor([prompt] * batch), 1 + new_tokens, cache)
        lengths = [len(row) for row in run.tokens.tolist()]
        seconds = run.times[-1] - run.times[0]
        return Timed(seconds, batch * (len(run.times) - 1), lengths, run.tokens[0, len(prompt) :].tolist())

    def prefill(self, prompt: list[int]) -> Timed:
        start = time.perf_counter()
        run = self._generate(self._torch.tensor([prompt]), 1)
        return Timed(run.times[0] - start, len(prompt), [run.tokens.shape[1]], run.tokens[0, -1:].tolist())

    def _generate(self, prompts: Any, new_tokens: int, cache: Any = None) -> "Run":
        run = Run()
        run.tokens = self._model.generate(
            prompts, attention_mask=self._torch.ones_like(prompts), do_sample=False, max_new_tokens=new_tokens,
            pad_token_id=0, past_key_values=cache, stopping_criteria=[run.step_done],
        )  # fmt: skip
        return run


class Run:
    """When each token of a batch came."""

    def __init__(self) -> None:
        self.tokens: Any = None
        self.times: list[float] = []

    def step_done(self, token_ids: Any, scores: Any, **_: Any) -> Any:
        """A stopping criterion that never stops."""
        self.times.append(time.perf_counter())
        return token_ids.new_zeros(len(token_ids), dtype=bool)


if __name__ == "__main__":
    output_fd = claim_output()
    import transformers

    side = Transformers(sys.argv[1], int(sys.argv[2]))
    answer_lines(side, output_fd, f"transformers {transformers.__version__}, {sys.argv[2]} threads")
