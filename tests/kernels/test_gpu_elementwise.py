"""The Triton kernels but attention and sampling, in Triton's interpreter, against torch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kernels import elementwise
from kernels.gpu.activation import silu_and_mul
from kernels.gpu.cases_elementwise import cases
from kernels.gpu.linear import linear
from kernels.gpu.norm import rms_norm, rms_norm_with_residual
from kernels.gpu.quantise import FLOAT8, dequantise_kv, kv_scales, quantise_kv, quantise_kv_in_torch
from kernels.gpu.rotary import rotate_and_store

CPU = torch.device("cpu")


@pytest.fixture
def ordered_products(monkeypatch):
    """Products that add up in one order at every place of a tile, as tensor cores do.

    The interpreter's own are numpy's, whose library adds up the last rows of a tile in another order than the first.
    """

    def dot(_builder, a, b, total, *_options):
        return TensorHandle(np.einsum("mk,kn->mn", a.data, b.data, optimize=False) + total.data, total.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name.replace(" ", "-"))
def test_a_kernel_computes_what_torch_computes(case, ordered_products):
    for pair in case.run(CPU):
        pair.check()


def test_the_interpreters_own_products_give_the_same_linear_layer():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(70, 300, generator=generator), torch.randn(50, 300, generator=generator)
    torch.testing.assert_close(linear(x, weight), x @ weight.t(), atol=1e-4, rtol=1e-5)


def test_norms_and_activations_round_where_torch_rounds():
    """In float16, which the interpreter rounds as a GPU does: without the roundings in between a fifth would differ."""
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 8, 2048, generator=generator).half()
    weight = torch.randn(2048, generator=generator).half()
    for result, expected in (
        (rms_norm(x, weight, 1e-5, residual)[0], rms_norm_with_residual(x, weight, 1e-5, residual)[0]),
        (rms_norm(x, weight, 1e-5), elementwise.rms_norm(x, weight, 1e-5)),
        (silu_and_mul(x), elementwise.silu_and_mul(x)),
    ):
        assert (result == expected).float().mean() > 0.998


def test_rows_of_a_wider_tensor_are_read_where_they_are():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 100, generator=generator)
    weight = torch.ones(60)
    torch.testing.assert_close(rms_norm(wide[:, :60], weight, 1e-5), elementwise.rms_norm(wide[:, :60], weight, 1e-5))
    torch.testing.assert_close(silu_and_mul(wide[:, :60]), elementwise.silu_and_mul(wide[:, :60]))


def test_no_number_that_the_scales_were_computed_from_is_clamped():
    blocks = torch.randn(4, 2, 3, 2, 4, 8, generator=torch.Generator().manual_seed(0)) * 50
    blocks[:, 1, 2, 0] = 0  # a head that never says anything
    scales = kv_scales(blocks)
    restored = dequantise_kv(quantise_kv(blocks, scales), scales, torch.float32)
    assert scales.shape == (2, 3, 2)
    # Half a unit in the last of 3 bits, or half of the smallest number
    assert bool(((restored - blocks).abs() <= blocks.abs() / 16 + scales[..., None, None] * 2**-10).all())


def test_every_float8_number_survives_the_way_there_and_back():
    numbers = torch.arange(256, dtype=torch.uint8).view(FLOAT8)
    numbers = numbers[~numbers.float().isnan()]
    blocks = numbers.float().view(1, 1, 1, 2, 1, 127)
    one = torch.ones(1, 1, 2)
    assert torch.equal(quantise_kv(blocks, one).float(), blocks)
    assert torch.equal(dequantise_kv(quantise_kv_in_torch(blocks, one), one, torch.float32), blocks)


def test_storing_float8_gives_the_bytes_that_quantising_afterwards_gives():
    """So that a block written by the kernel and one converted on its way from another worker are the same block."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 4 * 64, generator=generator).half()
    cos, sin = torch.ones(3, 32), torch.zeros(3, 32)
    scales = torch.rand(1, 1, 2, generator=generator) * 0.01 + 1e-3
    wide = torch.zeros(1, 1, 1, 2, 16, 64, dtype=torch.float16)
    narrow = torch.zeros(1, 1, 1, 2, 16, 64).to(FLOAT8)
    block_ids, slots = torch.zeros(3, dtype=torch.int32), torch.arange(3)
    rotate_and_store(qkv, wide, 0, cos, sin, None, 1e-5, block_ids, slots)
    rotate_and_store(qkv, narrow, 0, cos, sin, None, 1e-5, block_ids, slots, scales)
    assert torch.equal(narrow.view(torch.uint8), quantise_kv(wide, scales).view(torch.uint8))


def test_slots_beyond_two_to_the_31_elements_are_found():
    """2 GiB of address space, of which three pages are touched."""
    last = 2**31 // (2 * 16 * 64) + 1
    slabs = torch.empty(last + 1, 1, 1, 2, 16, 64, dtype=FLOAT8)
    qkv = torch.ones(1, 3 * 64)
    block_ids, slots = torch.tensor([last], dtype=torch.int32), torch.tensor([9])
    rotate_and_store(
        qkv, slabs, 0, torch.ones(1, 32), torch.zeros(1, 32), None, 1e-5, block_ids, slots, torch.ones(1, 1, 2)
    )
    assert torch.equal(slabs[last, 0, 0, :, 9].float(), torch.ones(2, 64))


@pytest.mark.slow
def test_kernels_but_attention_compile_for_a_hopper_gpu(tmp_path: Path) -> None:
    """With tensor cores in every matrix product, and 16 bytes a thread wherever much memory is moved."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.hopper_elementwise"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[set[str]]] = {}
    for name, shared_bytes, *instructions in map(str.split, done.stdout.splitlines()):
        assert int(shared_bytes) <= 227 * 1024
        found.setdefault(name, []).append(set(instructions))
    assert all("wgmma" in instructions for instructions in found["_linear"])
    assert all({"ld.global.v2.b64", "st.global.v2.b64"} <= instructions for instructions in found["_copy_runs"])
    for name in ("_rms_norm", "_silu_and_mul", "_rotate_and_store", "_scale_part"):
        assert any({"ld.global.v4.b32", "st.global.v4.b32"} <= instructions for instructions in found[name]), name
    for name in ("_find_threshold", "_weigh_part", "_pick"):
        assert all("ld.global.v4.b32" in instructions for instructions in found[name]), name


def test_tensors_that_do_not_fit_are_refused():
    x = torch.zeros(2, 64)
    slabs = torch.zeros(2, 1, 1, 2, 16, 64).to(FLOAT8)
    with pytest.raises(ValueError, match="does not fit"):
        linear(x, torch.zeros(3, 65))
    with pytest.raises(ValueError, match="one dtype"):
        linear(x, torch.zeros(3, 64).half())
    with pytest.raises(ValueError, match="scales"):
        rotate_and_store(torch.zeros(2, 192), slabs, 0, x, x, None, 1e-5, torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="scales"):
        quantise_kv(torch.zeros(2, 1, 1, 2, 16, 64), torch.ones(1, 2, 2))
