"""llama.cpp as a side, in its own environment: `run_llama_cpp.py FILE.gguf THREADS`.

Its low-level interface: one `llama_decode` a step for all sequences, the likeliest token by numpy from its logits in
place. Float16 KV, one KV stream a sequence, flash attention and micro-batches of 2048 tokens. Without flash attention
all is slower but decoding at 32 x 1024, which gains a tenth; smaller micro-batches prefill a little slower.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp
import numpy as np
from protocol import Timed, answer_lines, claim_output

UBATCH_TOKENS, WARM_TOKENS = 2048, 512
FLASH_ATTENTION = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED


class Context:
    """KV for `num_sequences` of up to `tokens` each, and one batch to fill."""

    def __init__(self, model: Any, threads: int, num_sequences: int, tokens: int) -> None:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = num_sequences * (tokens + -tokens % 256)
        parameters.n_seq_max = num_sequences
        parameters.n_batch = max(tokens, UBATCH_TOKENS)
        parameters.n_ubatch = UBATCH_TOKENS
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = FLASH_ATTENTION
        parameters.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(model, parameters)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(parameters.n_batch, 0, 1)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)

    def prompt(self, tokens: Sequence[int]) -> int:
        """Compute a prompt as sequence 0; its next token."""
        for place, token in enumerate(tokens):
            self._put(place, token, place, 0, place == len(tokens) - 1)
        return self._run(len(tokens), [len(tokens) - 1])[0]

    def copy_prompt(self, num_sequences: int) -> None:
        """Give sequences 1 .. num_sequences - 1 a copy of sequence 0's KV, each in its own stream."""
        for sequence in range(1, num_sequences):
            llama_cpp.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)

    def step(self, tokens: Sequence[int], position: int) -> list[int]:
        """One more token for sequence 0, 1, ..; their next tokens."""
        for sequence, token in enumerate(tokens):
            self._put(sequence, token, position, sequence, True)
        return self._run(len(tokens), range(len(tokens)))

    def _put(self, place: int, token: int, position: int, sequence: int, wants_logits: bool) -> None:
        batch = self._batch
        batch.token[place], batch.pos[place] = token, position
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
        batch.logits[place] = wants_logits

    def _run(self, num_tokens: int, places: Sequence[int]) -> list[int]:
        self._batch.n_tokens = num_tokens
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = llama_cpp.llama_get_logits(self._context)
        rows = np.ctypeslib.as_array(logits, shape=(len(places), self._vocabulary))
        return [int(token) for token in rows.argmax(axis=1)]

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)


class LlamaCpp:
    def __init__(self, file: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {file}")
        self._threads = threads

    def next_tokens(self, prompts: Sequence[list[int]]) -> list[int]:
        with self._context(1, max(map(len, prompts))) as context:
            result = []
            for prompt in prompts:
                context.forget()
                result.append(context.prompt(prompt))
            return result

    def decode(self, prompt: list[int], batch: int, new_tokens: int) -> Timed:
        with self._context(batch, len(prompt) + 1 + new_tokens) as context:
            steps = [[context.prompt(prompt)] * batch]
            context.copy_prompt(batch)
            start = time.perf_counter()
            for position in range(len(prompt), len(prompt) + new_tokens):
                steps.append(context.step(steps[-1], position))
            seconds = time.perf_counter() - start
        lengths = [len(prompt) + len(steps)] * batch
        return Timed(seconds, batch * (len(steps) - 1), lengths, [step[0] for step in steps])

    def prefill(self, prompt: list[int]) -> Timed:
        with self._context(1, len(prompt)) as context:
            start = time.perf_counter()
            token = context.prompt(prompt)
            return Timed(time.perf_counter() - start, len(prompt), [len(prompt) + 1], [token])

    @contextlib.contextmanager
    def _context(self, num_sequences: int, tokens: int) -> Iterator[Context]:
        """A context of the right size, which has worked before: its first steps would pay for memory and threads."""
        context = Context(self._model, self._threads, num_sequences, tokens)
        try:
            context.prompt([2] * min(tokens - 1, WARM_TOKENS))
            context.forget()
            context.step([2] * num_sequences, 0)
            context.forget()
            yield context
        finally:
            context.close()


if __name__ == "__main__":
    output_fd = claim_output()
    side = LlamaCpp(sys.argv[1], int(sys.argv[2]))
    answer_lines(side, output_fd, f"llama-cpp-python {llama_cpp.__version__}, flash attention, {sys.argv[2]} threads")
