"""The native kernels against their references, in bfloat16. Slots that no query may see hold NaN."""

import itertools
import math
import random
from collections.abc import Sequence

import pytest
import torch

from baton.compiled import Unavailable
from kernels import reference
from kernels.cpu.native import NativeOps
from kernels.ops import HeadNorms, Rotation, TorchOps
from kernels.paged_attention import SequenceSpan, plan_write

LAYERS = 2
EPS = 1e-5
TOLERANCE = 2e-2


@pytest.fixture(scope="module")
def native() -> NativeOps:
    try:
        return NativeOps()
    except Unavailable as reason:
        pytest.skip(str(reason))


def random_bf16(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


@pytest.mark.parametrize("tokens", [0, 1, 2, 11, 12, 13, 25, 64])
@pytest.mark.parametrize(("rows", "columns"), [(32, 16), (96, 64), (320, 1024)])
@pytest.mark.parametrize("extras", [False, True])
def test_a_linear_layer_is_the_product_and_its_bias_and_residual(
    native: NativeOps, tokens: int, rows: int, columns: int, extras: bool
) -> None:
    x, weight = random_bf16(tokens, columns), random_bf16(rows, columns, seed=1, scale=columns**-0.5)
    bias = random_bf16(rows, seed=2) if extras else None
    residual = random_bf16(tokens, rows, seed=3) if extras else None
    expected = x.float() @ weight.float().T
    if bias is not None and residual is not None:
        expected += bias.float() + residual.float()
    result = native.linear(x, native.matrix(weight, bias), residual)
    torch.testing.assert_close(result.float(), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize("size", [16, 64, 1024])
def test_norms_and_activations_equal_their_references(native: NativeOps, rows: int, size: int) -> None:
    x, weight = random_bf16(rows, size, scale=3.0), random_bf16(size, seed=1)
    expected = reference.rms_norm(x.float(), weight.float(), EPS)
    torch.testing.assert_close(native.rms_norm(x, weight, EPS).float(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    gate_up = random_bf16(rows, 2 * size, seed=2, scale=20.0)
    expected = reference.silu_and_mul(gate_up.float())
    torch.testing.assert_close(native.silu_and_mul(gate_up).float(), expected, atol=TOLERANCE, rtol=TOLERANCE)


# temperature, top_k, top_p, min_p
CHOICES = [
    (0.0, 0, 1.0, 0.0), (9e-6, 2, 0.5, 0.0), (1.0, 0, 1.0, 0.0), (0.6, 1, 1.0, 0.0), (1.3, 40, 1.0, 0.0),
    (1.0, 100_000, 1.0, 0.0), (0.9, 0, 0.9, 0.0), (1.0, 0, 1e-6, 0.0), (1.0, 0, 0.0, 0.0), (1.0, 0, 0.9999, 0.0),
    (1.0, 0, 1.0, 0.1), (1.0, 0, 1.0, 1.0), (0.8, 50, 0.95, 0.0), (1.1, 7, 0.5, 0.3), (1.0, 4000, 1.0, 0.0),
    (1.0, 4095, 0.999, 0.0),
]  # fmt: skip
NUMBERS = (0.0, 0.1, 0.3, 0.5, 0.77, 0.9, 1 - 2**-52)


def choices_of(rows: Sequence[tuple[float, ...]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).T.contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [3.0, 0.01, 40.0])
def test_tokens_drawn_are_those_of_the_reference(native: NativeOps, dtype: torch.dtype, spread: float) -> None:
    """Rounding may move a draw that falls within 1e-6 of the edge between two tokens: hardly one does here."""
    numbers = NUMBERS if spread < 40.0 else NUMBERS[1:-1]  # where the ends are tokens that float32 rules out
    rows = [(*choice, number) for choice in CHOICES for number in numbers]
    logits = torch.randn(len(rows), 4096, generator=torch.Generator().manual_seed(5)).mul_(spread).to(dtype)
    choices = choices_of(rows)
    drawn, expected = native.sample(logits, choices), TorchOps().sample(logits, choices)
    assert int((drawn != expected).sum()) <= 1
    alone = [int(native.sample(logits[row : row + 1], choices[:, row : row + 1].contiguous())) for row in range(40)]
    assert alone == drawn[:40].tolist(), "neighbours do not matter"


def test_equal_scores_are_kept_or_dropped_together(native: NativeOps) -> None:
    logits = torch.full((1, 64), -3.0)
    logits[0, [5, 9, 33, 60]] = 1.0
    logits[0, 20] = 2.0
    for choice in ((1.0, 2, 1.0, 0.0), (1.0, 0, 0.5, 0.0), (1.0, 0, 1.0, 0.3)):
        drawn = {int(native.sample(logits, choices_of([(*choice, number / 100)]))) for number in range(100)}
        assert drawn == {5, 9, 20, 33, 60}


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_logits_that_rule_out_everything_give_some_token(native: NativeOps, value: float) -> None:
    logits = torch.full((len(CHOICES), 64), value)
    for ops in (native, TorchOps()):
        for number in NUMBERS:
            drawn = ops.sample(logits, choices_of([(*choice, number) for choice in CHOICES]))
            assert ((drawn >= 0) & (drawn < 64)).all()


def test_what_is_ruled_out_is_never_drawn(native: NativeOps) -> None:
    logits = torch.full((1, 64), -math.inf)
    logits[0, 7] = -5.0
    for number in NUMBERS:
        assert int(native.sample(logits, choices_of([(1.0, 0, 1.0, 0.0, number)]))) == 7


def test_activations_of_huge_values_stay_finite(native: NativeOps) -> None:
    gate_up = torch.tensor([[1e30, -1e30, 88.0, -88.0] * 4 + [1.0] * 16]).bfloat16()
    result = native.silu_and_mul(gate_up)[0, :4].float()
    torch.testing.assert_close(result, torch.tensor([1e30, 0.0, 88.0, 0.0]), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_the_highest_of_a_row_is_found_and_of_equals_the_first(native: NativeOps, rows: int) -> None:
    logits = random_bf16(rows, 4096)
    logits[:, [33, 700, 701, 4095]] = 9.0
    logits[0, 4095], logits[rows - 1, 16] = 10.0, 9.0
    assert native.argmax(logits).tolist() == TorchOps().argmax(logits).tolist()
    assert native.argmax(torch.full((1, 32), -torch.inf).bfloat16()).tolist() == [0]


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("with_norms", [False, True])
def test_heads_are_normed_rotated_and_stored_as_torch_does_it(
    native: NativeOps, head_dim: int, with_norms: bool
) -> None:
    tokens, heads, kv_heads, page = 21, 6, 2, 16
    qkv = random_bf16(tokens, (heads + 2 * kv_heads) * head_dim)
    angles = torch.randn(tokens, 1, head_dim // 2, generator=torch.Generator().manual_seed(1))
    rotation = Rotation(angles.cos(), angles.sin())
    norms = HeadNorms(random_bf16(head_dim, seed=2), random_bf16(head_dim, seed=3)) if with_norms else None
    slabs = torch.full((5, LAYERS, kv_heads, 2, page, head_dim), float("nan"), dtype=torch.bfloat16)
    positions = torch.arange(7, 7 + tokens)
    plan = plan_write(slabs, torch.tensor([3, 0])[positions // page], positions % page)
    expected_slabs = slabs.clone()
    expected = TorchOps().rotate_and_store(qkv.clone(), expected_slabs, 1, rotation, norms, EPS, plan)
    result = native.rotate_and_store(qkv, slabs, 1, rotation, norms, EPS, plan)
    torch.testing.assert_close(result.float(), expected.float(), atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(slabs, expected_slabs, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (2, 3), (1, 16)])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("page", [16, 64])
def test_attention_equals_the_reference_and_sees_no_stale_slot(
    native: NativeOps, head_dim: int, kv_heads: int, group: int, window: int | None, page: int
) -> None:
    lengths, new = [1, 2, 15, 16, 17, 33, 130, 2, 40, 77, 199], [1] * 7 + [2, 40, 13, 150]
    counts = [-(-length // page) for length in lengths]
    ids = random.Random(0).sample(range(sum(counts) + 3), sum(counts))
    slabs = torch.full((sum(counts) + 3, LAYERS, kv_heads, 2, page, head_dim), float("nan"), dtype=torch.bfloat16)
    spans = []
    for row, (length, start) in enumerate(zip(lengths, itertools.accumulate(counts, initial=0), strict=False)):
        blocks = ids[start : start + counts[row]]
        key, value = (random_bf16(length, kv_heads, head_dim, seed=10 * row + part) for part in (0, 1))
        reference.write_kv(slabs, 1, blocks, 0, key, value)
        spans.append(SequenceSpan(sum(new[:row]), new[row], length - new[row], blocks))
    # Queries lie in a wider matrix, as they do after the linear layer that makes them.
    wide = random_bf16(sum(new), kv_heads * (group + 2), head_dim, seed=99)
    query = wide[:, : kv_heads * group]
    result = native.attention(query, slabs, 1, native.plan_attention(slabs, spans, window))
    expected = [
        reference.paged_attention(
            query[span.first_row : span.first_row + span.count].float(), slabs, 1, span.block_ids, span.start, window
        )
        for span in spans
    ]
    torch.testing.assert_close(result.float(), torch.cat(expected).flatten(1), atol=TOLERANCE, rtol=TOLERANCE)


def test_models_of_odd_sizes_are_left_to_torch() -> None:
    assert NativeOps.unsupported([64, 96], [64, 128], 64, 4, 16) is None
    assert NativeOps.unsupported([199], [64], 64, 4, 16)
    assert NativeOps.unsupported([64], [24], 64, 4, 16)
    assert NativeOps.unsupported([64], [64], 80, 4, 16)
    assert NativeOps.unsupported([64], [64], 64, 17, 16)
    assert NativeOps.unsupported([64], [64], 64, 4, 8)
