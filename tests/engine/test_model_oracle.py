"""The engine's arithmetic against transformers, StepPlans written by hand."""

import random

import pytest
import torch

from engine.loading import load_model
from engine.plan import PlannedSequence, SampleSpec, StepPlan
from engine.pool import BlockShape, KVPool
from engine.requests import SamplingParams
from engine.runner import ModelRunner
from tests.engine.tiny_models import FAMILIES, VOCAB_SIZE, reference_generate, write_tiny_model

PAGE = 16
NUM_BLOCKS = 128
NEW_TOKENS = 10
LENGTHS = (1, PAGE - 1, PAGE, PAGE + 1, 58, 100)
"""58: crosses the dynamic family's original context of 64 while decoding; 100: longer than that and every window."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"), request.param)


def prompt_of(length, seed=0):
    return random.Random(1000 * seed + length).choices(range(VOCAB_SIZE), k=length)


class Driver:
    """A scheduler of a few lines: fixed blocks for each sequence, chunks as told."""

    def __init__(self, folder, prompts):
        loaded = load_model(folder)
        self.pool = KVPool(BlockShape.of(loaded.config, PAGE, loaded.dtype), NUM_BLOCKS)
        self.pool.slabs.fill_(float("nan"))  # nothing but what this test writes may reach a result
        self.runner = ModelRunner(loaded, self.pool)
        self.prompts = prompts
        self.tokens = [list(prompt) for prompt in prompts]
        self.logprobs = [[] for _ in prompts]
        ids = list(range(NUM_BLOCKS))
        random.Random(5).shuffle(ids)
        self.blocks = []
        for prompt in prompts:
            count = -(-(len(prompt) + NEW_TOKENS) // PAGE)
            self.blocks.append(ids[:count])
            del ids[:count]

    def sequence(self, index, start, stop):
        spec = None
        if stop == len(self.tokens[index]):
            spec = SampleSpec(SamplingParams(logprobs=0), self.prompts[index], [])
        return PlannedSequence(
            str(index),
            self.tokens[index][start:stop],
            start,
            self.blocks[index],
            len(self.prompts[index]),
            spec,
        )

    def step(self, *sequences):
        for name, (sampled,) in self.runner.run(StepPlan(list(sequences), [])).sampled.items():
            self.tokens[int(name)].append(sampled.token_id)
            self.logprobs[int(name)].append(sampled.logprobs.chosen)

    def prefill(self, index, chunk):
        for start in range(0, len(self.prompts[index]), chunk):
            self.step(self.sequence(index, start, min(start + chunk, len(self.prompts[index]))))

    def decode(self, indices):
        self.step(*(self.sequence(i, len(self.tokens[i]) - 1, len(self.tokens[i])) for i in indices))

    def check(self, folder, indices):
        references = reference_generate(folder, [self.prompts[index] for index in indices], NEW_TOKENS)
        for index, reference in zip(indices, references, strict=True):
            count = len(self.tokens[index]) - len(self.prompts[index])
            assert count > 0
            assert self.tokens[index][len(self.prompts[index]) :] == reference.tokens[:count]
            assert self.logprobs[index] == pytest.approx(reference.logprobs[:count], abs=1e-4)


@pytest.mark.parametrize("length", LENGTHS)
def test_one_prompt_in_one_chunk_answers_as_transformers_does(folder, length):
    driver = Driver(folder, [prompt_of(length)])
    driver.prefill(0, length)
    for _ in range(NEW_TOKENS - 1):
        driver.decode([0])
    driver.check(folder, [0])


def test_chunked_prompts_answer_as_transformers_does(folder):
    driver = Driver(folder, [prompt_of(length) for length in LENGTHS])
    for index in range(len(LENGTHS)):
        driver.prefill(index, 7)
    for _ in range(NEW_TOKENS - 1):
        driver.decode(range(len(LENGTHS)))
    driver.check(folder, range(len(LENGTHS)))


def test_requests_decoding_beside_others_prefill_answer_as_if_alone(folder):
    driver = Driver(folder, [prompt_of(length) for length in LENGTHS])
    last = len(LENGTHS) - 1
    for index in range(last):
        driver.prefill(index, 64)
    prompt = driver.prompts[last]
    for start in range(0, len(prompt), 25):
        decodes = [driver.sequence(i, len(driver.tokens[i]) - 1, len(driver.tokens[i])) for i in range(last)]
        driver.step(*decodes, driver.sequence(last, start, start + 25))
    driver.decode(range(last + 1))
    driver.check(folder, range(last + 1))


def test_a_sequence_recomputed_after_preemption_answers_as_before(folder):
    driver = Driver(folder, [prompt_of(58)])
    driver.prefill(0, 64)
    for _ in range(7):
        driver.decode([0])
    driver.pool.slabs.fill_(float("nan"))
    driver.step(driver.sequence(0, 0, 30))
    driver.step(driver.sequence(0, 30, len(driver.tokens[0])))
    driver.decode([0])
    driver.check(folder, [0])


def test_a_copied_block_serves_like_its_source(folder):
    driver = Driver(folder, [prompt_of(20)])
    driver.prefill(0, 20)
    source, target = driver.blocks[0][1], NUM_BLOCKS - 1
    target = next(block for block in range(NUM_BLOCKS) if block not in driver.blocks[0])
    driver.blocks[0] = [driver.blocks[0][0], target]
    sequence = driver.sequence(0, 20, 21)
    sampled = driver.runner.run(StepPlan([sequence], [(source, target)])).sampled["0"][0]
    assert sampled.token_id == reference_generate(folder, [driver.prompts[0]], NEW_TOKENS)[0].tokens[1]


def test_long_prompts_answer_as_transformers_does(folder):
    driver = Driver(folder, [prompt_of(700), prompt_of(300)])
    driver.prefill(0, 700)
    driver.prefill(1, 128)
    driver.decode([0, 1])
    driver.decode([0, 1])
    driver.check(folder, [0, 1])
