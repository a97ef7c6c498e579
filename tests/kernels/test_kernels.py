"""Each kernel against its plain reference. Slots that no query may see hold NaN: one that leaks in shows everywhere."""

import random

import pytest
import torch

from kernels import elementwise, reference
from kernels.paged_attention import SequenceSpan, paged_attention, plan_attention, plan_write, write_kv

LAYERS, KV_HEADS, PAGE, HEAD_DIM = 2, 2, 4, 8
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Of values around 1. In bfloat16 scores and probabilities are rounded to 8 bits between the two products."""


def random_heads(generator, tokens, heads, dtype):
    return torch.randn(tokens, heads, HEAD_DIM, generator=generator).to(dtype)


class Sequences:
    """Slabs full of NaN, in which each sequence of the given (context, new) lengths has its KV written."""

    def __init__(self, lengths, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        total = sum(-(-(context + new) // PAGE) for context, new in lengths)
        ids = random.Random(seed).sample(range(total + 3), total)
        self.slabs = torch.full((total + 3, LAYERS, KV_HEADS, 2, PAGE, HEAD_DIM), float("nan"), dtype=dtype)
        self.spans, self.new = [], []
        row = 0
        for context, new in lengths:
            blocks = [ids.pop() for _ in range(-(-(context + new) // PAGE))]
            for layer in range(LAYERS):
                key, value = (random_heads(generator, context + new, KV_HEADS, dtype) for _ in range(2))
                reference.write_kv(self.slabs, layer, blocks, 0, key, value)
            self.spans.append(SequenceSpan(row, new, context, blocks))
            row += new
        self.query = random_heads(generator, row, 3 * KV_HEADS, dtype)

    def attend(self, layer, window):
        return paged_attention(self.query, self.slabs, layer, plan_attention(self.slabs, self.spans, window))

    def expected(self, layer, window):
        return torch.cat(
            [
                reference.paged_attention(
                    self.query[span.first_row : span.first_row + span.count],
                    self.slabs,
                    layer,
                    span.block_ids,
                    span.start,
                    window,
                )
                for span in self.spans
            ]
        )


DECODES = [(0, 1), (3, 1), (4, 1), (5, 1), (17, 1), (120, 1)]
PREFILLS = [(0, 2), (0, 4), (0, 70), (3, 5), (30, 68)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("lengths", [DECODES, PREFILLS, DECODES[:3] + PREFILLS[2:]], ids=["decode", "prefill", "both"])
def test_paged_attention_equals_the_reference_and_sees_no_stale_slot(lengths, window, dtype):
    sequences = Sequences(lengths, dtype)
    torch.testing.assert_close(
        sequences.attend(1, window), sequences.expected(1, window), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


def test_short_tiles_of_very_long_contexts_give_the_same(monkeypatch):
    sequences = Sequences([(10, 33)])
    expected = sequences.attend(0, None)
    monkeypatch.setattr("kernels.paged_attention.MAX_TILE_SCORES", 6 * 43 * 5)
    torch.testing.assert_close(sequences.attend(0, None), expected)


def test_decodes_of_very_different_lengths_are_not_padded_to_the_longest():
    sequences = Sequences([(2, 1)] * 6 + [(400, 1)])
    plan = plan_attention(sequences.slabs, sequences.spans, None)
    assert [len(group.rows) for group in plan.decodes] == [6, 1]


def test_groups_of_decodes_stay_within_their_memory(monkeypatch):
    monkeypatch.setattr("kernels.paged_attention.MAX_GROUP_KEYS", 10 * KV_HEADS * PAGE * HEAD_DIM)
    sequences = Sequences([(15, 1)] * 5)
    plan = plan_attention(sequences.slabs, sequences.spans, None)
    assert [len(group.rows) for group in plan.decodes] == [2, 2, 1]
    torch.testing.assert_close(sequences.attend(0, None), sequences.expected(0, None))


def test_writing_kv_touches_the_given_slots_and_no_other():
    generator = torch.Generator().manual_seed(0)
    key, value = (random_heads(generator, 7, KV_HEADS, torch.float32) for _ in range(2))
    slabs = torch.full((5, LAYERS, KV_HEADS, 2, PAGE, HEAD_DIM), float("nan"))
    expected = slabs.clone()
    reference.write_kv(expected, 1, [3, 0, 2], 3, key, value)
    positions = torch.arange(3, 10)
    plan = plan_write(slabs, torch.tensor([3, 0, 2])[positions // PAGE], positions % PAGE)
    write_kv(slabs, 1, plan, key, value)
    torch.testing.assert_close(slabs, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elementwise_kernels_equal_their_references(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 2 * HEAD_DIM, generator=generator).to(dtype)
    weight = torch.randn(2 * HEAD_DIM, generator=generator).to(dtype)
    angles = torch.randn(5, 1, HEAD_DIM, generator=generator)
    pairs = [
        (elementwise.rms_norm(x, weight, 1e-5), reference.rms_norm(x.float(), weight.float(), 1e-5)),
        (elementwise.silu_and_mul(x), reference.silu_and_mul(x.float())),
        (elementwise.rotate(x, angles.cos(), angles.sin()), reference.rotate(x.float(), angles.cos(), angles.sin())),
    ]
    for result, expected in pairs:
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_norms_of_huge_bfloat16_values_do_not_overflow():
    x = torch.full((1, 4), 3e38, dtype=torch.bfloat16)
    assert not torch.isnan(elementwise.rms_norm(x / 1e19, torch.ones(4, dtype=torch.bfloat16), 1e-5)).any()
