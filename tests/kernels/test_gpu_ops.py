"""GpuOps in Triton's interpreter beside TorchOps: one interface, the same numbers."""

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kernels.gpu.ops import DeterministicGpuOps, GpuOps, Places, to_device
from kernels.ops import HeadNorms, Rotation, TorchOps
from kernels.paged_attention import SequenceSpan, plan_write

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM, PAGE, LAYERS, LAYER = 4, 2, 64, 16, 2, 1
GPU, TORCH = GpuOps(CPU, HEADS, max_length=64), TorchOps()


def random(*sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def slabs(num_blocks=8):
    return random(num_blocks, LAYERS, KV_HEADS, 2, PAGE, HEAD_DIM)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("bias", [None, random(48)])
@pytest.mark.parametrize("residual", [None, random(3, 48)])
def test_linear_layers(bias, residual):
    weight, x = random(48, 80), random(3, 80)
    before = None if residual is None else residual.clone()
    results = [ops.linear(x, ops.matrix(weight.clone(), bias), residual) for ops in (GPU, TORCH)]
    same(*results)
    assert residual is None or bool((residual == before).all()), "the residual stream is read again later"


def test_norm_and_activation():
    x, weight = random(3, 80), random(80)
    same(GPU.rms_norm(x, weight, 1e-5), TORCH.rms_norm(x, weight, 1e-5))
    same(GPU.silu_and_mul(x), TORCH.silu_and_mul(x))


@pytest.mark.parametrize("norms", [None, HeadNorms(random(HEAD_DIM), 1 + random(HEAD_DIM))])
def test_rotation_stores_what_torch_stores(norms):
    qkv = random(3, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    angles = random(3, 1, HEAD_DIM // 2)
    blocks, slots = torch.tensor([5, 1, 1]), torch.tensor([0, 15, 3])
    mine, theirs = slabs(), slabs()
    rotation = Rotation(angles.cos(), angles.sin())
    ours = GPU.rotate_and_store(qkv, mine, LAYER, rotation, norms, 1e-6, Places(blocks.int(), slots.int()))
    plan = plan_write(theirs, blocks, slots)
    same(ours, TORCH.rotate_and_store(qkv.clone(), theirs, LAYER, rotation, norms, 1e-6, plan))
    same(mine, theirs)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(
    "counts",
    [[(1, 33), (1, 0)], [(5, 0), (20, 30)], [(1, 40), (1, 3), (7, 10), (1, 20)]],
    ids=["singles", "chunks", "a single after a chunk"],
)
def test_attention_of_any_mixture_of_singles_and_chunks(counts, window):
    spans, row = [], 0
    for index, (count, start) in enumerate(counts):
        blocks = [(3 * index + place) % 16 for place in range(-(-(start + count) // PAGE))]
        spans.append(SequenceSpan(row, count, start, blocks))
        row += count
    kv, query = slabs(16), random(row, HEADS, HEAD_DIM)
    same(*(ops.attention(query, kv, LAYER, ops.plan_attention(kv, spans, window)) for ops in (GPU, TORCH)))


def row_by_row(_builder, a, b, total, *_options):
    """A product whose rows do not depend on their place, as on tensor cores; numpy's do."""
    return TensorHandle(np.einsum("mk,kn->mn", a.data, b.data, optimize=False) + total.data, total.dtype.scalar)


def test_deterministic_kernels_give_a_token_the_same_bits_alone_and_in_company(monkeypatch):
    monkeypatch.setattr(InterpreterBuilder, "create_dot", row_by_row)
    ops = DeterministicGpuOps(CPU, HEADS, max_length=64)
    matrix, residual = ops.matrix(random(48, HEADS * HEAD_DIM), random(48)), random(36, 48)
    kv, query, blocks = slabs(16), random(36, HEADS, HEAD_DIM), [3, 9, 4]
    together = [SequenceSpan(0, 1, 40, [7, 2, 5]), SequenceSpan(1, 30, 10, blocks), SequenceSpan(31, 5, 20, [8, 1])]

    def layer(rows, spans):
        attended = ops.attention(query[rows], kv, LAYER, ops.plan_attention(kv, spans, None))
        return ops.linear(attended, matrix, residual[rows])

    expected = layer(slice(0, 36), together)
    same(expected, TORCH.linear(TORCH.attention(query, kv, LAYER, TORCH.plan_attention(kv, together, None)),
                                TORCH.matrix(matrix.data, matrix.bias), residual))  # fmt: skip
    for row, count in ((1, 1), (9, 7), (30, 1), (0, 1)):
        start, own = (9 + row, blocks) if row else (40, [7, 2, 5])
        alone = layer(slice(row, row + count), [SequenceSpan(0, count, start, own)])
        assert torch.equal(alone, expected[row : row + count])


def test_tokens_are_chosen_by_row():
    logits = random(4, 300)
    assert GPU.argmax(logits).tolist() == logits.argmax(-1).tolist()
    choices = torch.tensor([[1.0, 1, 1, 0, 0.99], [0, 0, 1, 0, 0.5], [2.0, 0, 1e-6, 0, 0.3], [1.0, 0, 1, 1.0, 0.9]])
    drawn = GPU.sample(logits, choices.double().t().contiguous())
    assert drawn.tolist() == logits.argmax(-1).tolist(), "top_k 1, temperature 0, a tiny top_p and min_p 1 are greedy"


def test_arrays_arrive_whole_and_aligned():
    arrays = [np.arange(7, dtype=np.int32).reshape(1, 7), np.zeros((0, 3), np.int32), np.arange(5, dtype=np.int32)]
    sent = to_device(CPU, *arrays)
    assert [tensor.tolist() for tensor in sent] == [array.tolist() for array in arrays]
    assert all(tensor.data_ptr() % 16 == sent[0].data_ptr() % 16 for tensor in sent if tensor.numel())
    arrays[0][:] = 0
    assert sent[0].sum() == 21, "the sender may change its arrays at once"


@pytest.mark.parametrize(("head_dim", "page_size"), [(16, 16), (72, 16), (288, 16), (64, 8)])
def test_sizes_that_the_kernels_cannot_serve_are_named(head_dim, page_size):
    assert "multiples of 16" in (GpuOps.unsupported(head_dim, page_size) or "")
    assert GpuOps.unsupported(64, 16) is None
