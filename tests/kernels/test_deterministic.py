"""Deterministic kernels give each row and each query the same bits, whatever is computed beside it."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from baton.compiled import Unavailable
from baton.errors import ConfigurationError
from kernels import deterministic, reference
from kernels.deterministic import DeterministicNativeOps, DeterministicOps, agreeing_widths, bits_depend_on, pieces
from kernels.ops import HeadNorms, Ops, Rotation, TorchOps
from kernels.paged_attention import SequenceSpan, plan_write

HEADS, KV_HEADS, LAYERS = 6, 2, 2
EPS = 1e-5
KINDS = ("torch-float32", "torch-bfloat16", "native-bfloat16")
COUNTS = (1, 2, 3, 4, 7, 12, 13, 31, 32, 33, 65, 130)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ops_of(kind: str) -> Ops[Any]:
    try:
        return DeterministicNativeOps() if kind.startswith("native") else DeterministicOps(HEADS)
    except Unavailable as reason:
        pytest.skip(str(reason))


def dtype_of(kind: str) -> torch.dtype:
    return torch.float32 if kind.endswith("float32") else torch.bfloat16


def numbers(*shape: int, kind: str, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype_of(kind))


def assert_rows_stand_alone(rows: torch.Tensor, function: Any) -> None:
    """Any number of rows, from anywhere, in any order, give what they give among all rows."""
    whole = function(rows)
    shuffle = torch.randperm(len(rows), generator=torch.Generator().manual_seed(9))
    assert torch.equal(function(rows[shuffle].clone()), whole[shuffle])
    for count in COUNTS:
        for first in (0, 1, len(rows) - count):
            part = function(rows[first : first + count].clone())
            assert torch.equal(part, whole[first : first + count]), f"{count} rows from {first} on differ"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (224, 112), (1536, 1024)])
def test_a_row_of_a_linear_layer_has_the_same_bits_in_any_batch(kind: str, rows: int, columns: int) -> None:
    ops = ops_of(kind)
    matrix = ops.matrix(numbers(rows, columns, kind=kind, scale=columns**-0.5), numbers(rows, kind=kind, seed=1))
    x = numbers(300, columns + rows, kind=kind, seed=2)
    assert_rows_stand_alone(x, lambda x: ops.linear(x[:, :columns].contiguous(), matrix, x[:, columns:].contiguous()))


def test_ordinary_linear_layers_do_depend_on_the_batch() -> None:
    """What the tests above look for is there."""
    ops = TorchOps()
    matrix = ops.matrix(numbers(1536, 1024, kind="torch-float32"), None)
    with pytest.raises(AssertionError, match="rows from"):
        assert_rows_stand_alone(numbers(300, 1024, kind="torch-float32", seed=2), lambda x: ops.linear(x, matrix))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, 112, 2816])
def test_norms_and_activations_of_a_row_have_the_same_bits_in_any_batch(kind: str, size: int) -> None:
    ops = ops_of(kind)
    weight = numbers(size, kind=kind, seed=1)
    assert_rows_stand_alone(numbers(300, size, kind=kind), lambda x: ops.rms_norm(x, weight, EPS))
    gate_up = numbers(300, 2 * size, kind=kind, scale=3.0)
    assert_rows_stand_alone(gate_up, ops.silu_and_mul)
    if size > 16:
        expected = reference.silu_and_mul(gate_up.float())
        torch.testing.assert_close(ops.silu_and_mul(gate_up).float(), expected, atol=2e-2, rtol=2e-2)


def test_activations_of_huge_values_stay_finite() -> None:
    gate_up = torch.tensor([[1e30, -1e30, 200.0, -200.0, 1.0, 1.0, 1.0, 1.0]])
    result = ops_of("torch-float32").silu_and_mul(gate_up)
    torch.testing.assert_close(result, torch.tensor([[1e30, 0.0, 200.0, 0.0]]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [32, 96])
def test_a_token_has_the_same_query_key_and_value_in_any_batch(kind: str, head_dim: int) -> None:
    ops, page = ops_of(kind), 16
    norms = HeadNorms(numbers(head_dim, kind=kind, seed=2), numbers(head_dim, kind=kind, seed=3))
    angles = torch.randn(300, 1, head_dim // 2, generator=torch.Generator().manual_seed(1))
    qkv = numbers(300, (HEADS + 2 * KV_HEADS) * head_dim, kind=kind)

    def heads(rows: torch.Tensor) -> torch.Tensor:
        """Query, key and value of qkv rows whose number in the whole comes first."""
        which = rows[:, 0].long()
        slabs = torch.full((20, LAYERS, KV_HEADS, 2, page, head_dim), float("nan"), dtype=dtype_of(kind))
        plan = plan_write(slabs, which // page, which % page)
        rotation = Rotation(angles[which].cos(), angles[which].sin())
        query = ops.rotate_and_store(qkv[which].clone(), slabs, 1, rotation, norms, EPS, plan)
        stored = slabs[which // page, 1, :, :, which % page]
        return torch.cat([query.flatten(1), stored.flatten(1)], dim=1)

    assert_rows_stand_alone(torch.arange(300)[:, None], heads)


class Context:
    """Sequences whose keys and values are all known, of which each test writes what a step would find."""

    def __init__(self, kind: str, head_dim: int, page: int, lengths: Sequence[int]) -> None:
        self.kind, self.page, self.lengths = kind, page, lengths
        counts = [-(-length // page) for length in lengths]
        ids = random.Random(1).sample(range(sum(counts) + 3), sum(counts))
        self.blocks = [[ids.pop() for _ in range(count)] for count in counts]
        self.shape = (sum(counts) + 3, LAYERS, KV_HEADS, 2, page, head_dim)
        self.kv = [numbers(length, KV_HEADS, 2, head_dim, kind=kind, seed=row) for row, length in enumerate(lengths)]
        self.queries = [
            numbers(length, HEADS, head_dim, kind=kind, seed=99 + row) for row, length in enumerate(lengths)
        ]

    def attend(self, ops: Ops[Any], spans: Sequence[tuple[int, int, int]], window: int | None) -> list[torch.Tensor]:
        """For (sequence, start, end): queries at those positions, with nothing but NaN written from `end` on."""
        slabs = torch.full(self.shape, float("nan"), dtype=dtype_of(self.kind))
        rows, planned = 0, []
        for row, start, end in spans:
            where = torch.arange(end)
            blocks = torch.tensor(self.blocks[row])[where // self.page]
            slabs[blocks, 1, :, :, where % self.page] = self.kv[row][:end]
            planned.append(SequenceSpan(rows, end - start, start, self.blocks[row][: -(-end // self.page)]))
            rows += end - start
        query = torch.cat([self.queries[row][start:end] for row, start, end in spans])
        # Queries lie in a wider matrix, as they do after the linear layer that makes them.
        query = torch.cat([query, query], dim=1)[:, :HEADS] if self.kind.startswith("native") else query
        result = ops.attention(query, slabs, 1, ops.plan_attention(slabs, planned, window))
        return list(result.split([end - start for _, start, end in spans]))

    def expected(self, row: int, window: int | None) -> torch.Tensor:
        slabs = torch.zeros(self.shape)
        reference.write_kv(slabs, 1, self.blocks[row], 0, *self.kv[row].float().unbind(2))
        query = self.queries[row].float()
        return reference.paged_attention(query, slabs, 1, self.blocks[row], 0, window).flatten(1)


LENGTHS = (1, 2, 15, 17, 63, 64, 65, 140, 200)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 1, 40, 100])
@pytest.mark.parametrize(("head_dim", "page"), [(32, 16), (96, 32), (64, 128)])
def test_a_query_has_the_same_bits_however_its_prompt_is_cut(
    kind: str, window: int | None, head_dim: int, page: int
) -> None:
    ops, context = ops_of(kind), Context(kind, head_dim, page, LENGTHS)
    whole = [context.attend(ops, [(row, 0, length)], window)[0] for row, length in enumerate(LENGTHS)]
    for row in (4, 8):
        torch.testing.assert_close(whole[row].float(), context.expected(row, window), atol=2e-2, rtol=2e-2)
    together = context.attend(ops, [(row, 0, length) for row, length in enumerate(LENGTHS)], window)
    for alone, among in zip(whole, together, strict=True):
        assert torch.equal(alone, among)
    for position in range(0, 200, 11):
        assert torch.equal(
            context.attend(ops, [(8, position, position + 1)], window)[0], whole[8][position : position + 1]
        )
    for chunk in (16, 37):
        parts = [
            context.attend(ops, [(8, start, min(start + chunk, 200))], window)[0] for start in range(0, 200, chunk)
        ]
        assert torch.equal(torch.cat(parts), whole[8])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 70])
def test_a_query_has_the_same_bits_alone_and_among_prompts_and_single_queries(kind: str, window: int | None) -> None:
    chooser = random.Random(4)
    lengths = [chooser.randint(1, 300) for _ in range(33)]
    ops, context = ops_of(kind), Context(kind, 64, 16, lengths)
    spans = [
        (row, chooser.choice([length - 1, chooser.randrange(length)]), length) for row, length in enumerate(lengths)
    ]
    alone = [context.attend(ops, [span], window)[0] for span in spans]
    for count in (2, 8, 33):
        chosen = chooser.sample(range(33), count)
        for row, result in zip(chosen, context.attend(ops, [spans[row] for row in chosen], window), strict=True):
            assert torch.equal(result, alone[row])


def test_ordinary_attention_does_depend_on_how_a_prompt_is_cut() -> None:
    context = Context("torch-float32", 64, 16, [700])
    whole, half, single = (context.attend(TorchOps(), [(0, start, 700)], None)[0] for start in (0, 350, 699))
    assert not (torch.equal(whole[350:], half) and torch.equal(whole[-1:], single))


@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_page_does_not_change_a_bit(kind: str, page: int) -> None:
    ops = ops_of(kind)
    small, large = (Context(kind, 32, size, LENGTHS).attend(ops, [(8, 150, 200)], 80)[0] for size in (page, 64))
    assert torch.equal(small, large)


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_does_not_change_a_bit(kind: str) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ops, context = ops_of(kind), Context(kind, 64, 16, [400, 300])
        matrix = ops.matrix(numbers(1024, 512, kind=kind, scale=0.1), None)
        x = numbers(300, 512, kind=kind, seed=1)
        products = [ops.linear(x[:count], matrix) for count in (1, 5, 8, 33, 300)]
        assert all(torch.equal(product, products[-1][: len(product)]) for product in products)
        norms = ops.rms_norm(products[-1], products[-1][0].clone(), EPS)
        attended = context.attend(ops, [(0, 10, 400), (1, 299, 300)], None)
        results.append((products[-1], norms, ops.silu_and_mul(products[-1]), *attended))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 1100])
def test_a_long_context_gives_the_same_bits_beside_a_longer_one_and_in_a_prompt(kind: str, window: int | None) -> None:
    ops, context = ops_of(kind), Context(kind, 32, 16, [1500, 2000])
    (alone,) = context.attend(ops, [(0, 1499, 1500)], window)
    assert torch.equal(context.attend(ops, [(0, 1499, 1500), (1, 1999, 2000)], window)[0], alone)
    for start in (1390, 1450):  # what its prompt sees begins in other tiles
        assert torch.equal(context.attend(ops, [(0, start, 1500)], window)[0][-1:], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_sharing_rows_between_threads_does_not_change_a_bit(kind: str) -> None:
    """In the middle of a row, where their number is odd."""
    ops = ops_of(kind)
    gate_up = numbers(3001, 2 * 48, kind=kind, scale=3.0)
    alone = ops.silu_and_mul(gate_up)
    torch.set_num_threads(2)
    assert torch.equal(ops.silu_and_mul(gate_up), alone)
    assert torch.equal(ops.silu_and_mul(gate_up[1500:1501].clone()), alone[1500:1501])


def test_contexts_that_exceed_the_cache_are_cut_into_shorter_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ops, context = ops_of("torch-float32"), Context("torch-float32", 32, 16, [200])
    (expected,) = context.attend(ops, [(0, 0, 200)], None)
    monkeypatch.setattr(deterministic, "MAX_GROUP_NUMBERS", 2**14)
    (cut,) = context.attend(ops, [(0, 0, 200)], None)
    assert torch.equal(cut, expected)


# -- Libraries that keep no order --------------------------------------------------------------------------------------


def test_widths_that_give_other_bits_are_not_used() -> None:
    rows = torch.rand(256, 8)
    assert agreeing_widths("", rows, [lambda x: x + (len(x) < 16)]) == (16, 32, 64, 128, 256)
    # The other product only agrees up to 32 rows.
    assert agreeing_widths("", rows, [lambda x: x, lambda x: x + (len(x) > 32)]) == (4, 8, 16, 32)


def test_a_product_that_depends_on_the_place_of_a_row_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="products of this depend on the size of the batch"):
        agreeing_widths("products of this", torch.rand(256, 8), [lambda x: x + torch.arange(len(x))[:, None]])


def test_functions_that_depend_on_the_batch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.exp
    monkeypatch.setattr(torch, "exp", lambda x: exact(x) * (1 + 2e-7) if x.numel() % 32 else exact(x))
    with pytest.raises(ConfigurationError, match="--deterministic cannot be kept"):
        DeterministicOps(HEADS)


@pytest.mark.parametrize("widths", [(4, 8, 16, 32, 64, 128, 256), (16,), (64, 128)])
def test_pieces_cover_every_row_and_only_the_last_is_padded(widths: tuple[int, ...]) -> None:
    for count in (*range(1, 70), 255, 256, 257, 700):
        chosen = list(pieces(count, widths))
        assert set(chosen) <= set(widths)
        assert sum(chosen) >= count > sum(chosen[:-1])
    assert list(pieces(31, (4, 8, 16, 32, 64))) == [32], "a matrix is not read three times for few rows"


def test_what_bits_depend_on_names_kernels_libraries_and_processor() -> None:
    words = bits_depend_on(ops_of("torch-float32"))
    assert words[:2] == ["deterministic torch", torch.__version__]
    assert bits_depend_on(ops_of("native-bfloat16"))[0] != words[0]
