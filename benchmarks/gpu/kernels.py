"""Each kernel beside what else could do its work on the same GPU."""

import importlib.util
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.measuring import Budget, seconds
from benchmarks.report import Report
from kernels import elementwise
from kernels.gpu import activation, blocks, linear, norm, rotary, sampling
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.prefill_attention import prefill_attention, prefill_spans
from kernels.paged_attention import SequenceSpan

HEADS, KV_HEADS, HEAD_DIM, PAGE, LAYERS = 32, 8, 128, 16, 2
MAX_CACHE_BYTES = 36 << 30
TOKEN_BYTES = KV_HEADS * 2 * HEAD_DIM * 2
"""Of one layer."""
DECODE_GOAL, PREFILL_GOAL = ">= 0.9", ">= 0.75"
RESERVE_S = 20.0
"""What a measurement may take; with less left it is left out."""


def decode(
    report: Report, bandwidth: float, budget: Budget, contexts: tuple[int, ...], batches: tuple[int, ...]
) -> None:
    """Bytes of KV read in a second, as a share of what a copy reads and writes."""
    for context in contexts:
        for batch in batches:
            if context * batch * TOKEN_BYTES * LAYERS > MAX_CACHE_BYTES:
                report.note(f"decode attention, {batch} x {context}: more KV than this check takes memory for")
            elif budget.left < RESERVE_S:
                report.note(f"decode attention, {batch} x {context}: no time left")
            else:
                _decode(report, bandwidth, context, batch)
    if importlib.util.find_spec("flashinfer") is None:
        report.note("FlashInfer is not installed: decode attention has torch alone beside it")


def _decode(report: Report, bandwidth: float, context: int, batch: int) -> None:
    num_bytes = batch * context * TOKEN_BYTES
    what = f"{batch} x {context}"
    query = torch.randn(batch, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    ours, flashinfer_s = _paged_decode(query, context)
    goal = DECODE_GOAL if context >= 8192 and batch >= 32 else None
    share = num_bytes / ours / bandwidth
    report.row(f"decode attention, {what}", num_bytes / ours / 1e9, "GB/s", "copy bandwidth", share, goal)
    if flashinfer_s is not None:
        report.row(f"  FlashInfer, {what}", num_bytes / flashinfer_s / 1e9, "GB/s", "ours", ours / flashinfer_s)
    keys, values = torch.randn(2, batch, KV_HEADS, context, HEAD_DIM, dtype=torch.bfloat16, device="cuda").unbind()
    theirs = seconds(lambda: scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True), 3)
    report.row(f"  torch SDPA, not paged, {what}", num_bytes / theirs / 1e9, "GB/s", "ours", ours / theirs)


def _paged_decode(query: Tensor, context: int) -> tuple[float, float | None]:
    """Seconds of our kernel, and of FlashInfer's where it is installed."""
    batch, per_sequence = len(query), context // PAGE
    slabs = _slabs(batch * per_sequence)
    tables = torch.randperm(batch * per_sequence, device="cuda").int().view(batch, per_sequence)
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    ours = seconds(lambda: decode_attention(query, slabs, 1, tables, lengths, max_length=context))
    if importlib.util.find_spec("flashinfer") is None:
        return ours, None
    return ours, _flashinfer_decode(query, slabs, tables)


def _flashinfer_decode(query: Tensor, slabs: Tensor, tables: Tensor) -> float:
    import flashinfer  # type: ignore[import-not-found]

    batch, per_sequence = tables.shape
    pages = slabs[:, 1].transpose(1, 2).contiguous()  # [pages, 2, kv_heads, page, head_dim]
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32, device="cuda") * per_sequence, tables.flatten(),
        torch.full((batch,), PAGE, dtype=torch.int32, device="cuda"), HEADS, KV_HEADS, HEAD_DIM, PAGE,
        q_data_type=query.dtype, kv_data_type=query.dtype,
    )  # fmt: skip
    return seconds(lambda: wrapper.run(query, pages))


def prefill(report: Report, budget: Budget, shapes: tuple[tuple[int, int], ...]) -> None:
    """Arithmetic of causal attention over whole prompts, `shapes` of (prompts, tokens of each)."""
    for prompts, tokens in shapes:
        if budget.left < RESERVE_S:
            report.note(f"prefill attention, {prompts} x {tokens}: no time left")
            continue
        slabs, per_prompt = _slabs(prompts * tokens // PAGE), tokens // PAGE
        query = torch.randn(prompts * tokens, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        spans = prefill_spans([
            SequenceSpan(index * tokens, tokens, 0, range(index * per_prompt, (index + 1) * per_prompt))
            for index in range(prompts)
        ], slabs, HEADS)  # fmt: skip
        flop = 4 * prompts * HEADS * HEAD_DIM * tokens * (tokens + 1) / 2
        ours = seconds(partial(prefill_attention, query, slabs, 1, spans))
        peers = _library_prefill(prompts, tokens)
        best = min(peers, key=lambda name: peers[name], default=None)
        report.row(
            f"prefill attention, {prompts} x {tokens}", flop / ours / 1e12, "TFLOP/s",
            best and f"SDPA {best}", peers[best] / ours if best else None, PREFILL_GOAL if best else None,
        )  # fmt: skip
        for name, theirs in peers.items():
            report.row(f"  SDPA {name}, {prompts} x {tokens}", flop / theirs / 1e12, "TFLOP/s", "ours", ours / theirs)


def _library_prefill(prompts: int, tokens: int) -> dict[str, float]:
    """Seconds of torch's backends that take these shapes; keys and values are repeated for all heads beforehand."""
    query, key, value = torch.randn(
        3, prompts, HEADS, tokens, HEAD_DIM, dtype=torch.bfloat16, device="cuda"
    ).unbind()  # fmt: skip
    found: dict[str, float] = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):
            try:
                found[name] = seconds(lambda: scaled_dot_product_attention(query, key, value, is_causal=True))
            except RuntimeError as error:
                print(f"SDPA {name} cannot: {str(error).splitlines()[0]}")
    return found


def others(report: Report) -> None:
    """What is neither attention nor cuBLAS, at the sizes of a Llama-3-8B, beside torch."""
    for name, ours, theirs in _others():
        mine, other = seconds(ours), seconds(theirs)
        report.row(name, mine * 1e6, "us", "torch", other / mine)


def _others() -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
    hidden, ffn, vocab_size = 4096, 14336, 128256
    x, gate_up, residual = (_random(64, columns) for columns in (hidden, 2 * ffn, hidden))
    weight, matrix = _random(hidden), _random(hidden, hidden)
    qkv = _random(64, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    angles = torch.randn(64, 1, HEAD_DIM // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    slabs = _slabs(256)
    places = torch.arange(64, dtype=torch.int32, device="cuda")
    slots = places % PAGE
    ids = torch.randperm(256, device="cuda")[:64]
    staged = torch.empty_like(slabs[:64])
    logits = torch.randn(64, vocab_size, dtype=torch.bfloat16, device="cuda")
    column = torch.ones(64, dtype=torch.float64, device="cuda")
    choices = (column, (40 * column).int(), 0.9 * column, 0.01 * column, 0.5 * column)

    def rotate_in_torch() -> None:
        heads = qkv.view(64, -1, HEAD_DIM)
        elementwise.rotate(heads[:, :HEADS], cos, sin)
        slabs[places.long(), 1, :, 0, slots.long()] = elementwise.rotate(heads[:, HEADS : HEADS + KV_HEADS], cos, sin)
        slabs[places.long(), 1, :, 1, slots.long()] = heads[:, HEADS + KV_HEADS :]

    def sample_in_torch() -> Tensor:
        scores, order = logits.float().sort(descending=True)
        probabilities = scores.softmax(-1)
        late = probabilities.cumsum(-1) - probabilities > 0.9
        late[:, 40:] = True
        return order.gather(1, probabilities.masked_fill(late, 0.0).multinomial(1))

    return [
        ("rms_norm, 64 x 4096", lambda: norm.rms_norm(x, weight, 1e-5),
         lambda: torch.nn.functional.rms_norm(x, (hidden,), weight, 1e-5)),
        ("silu_and_mul, 64 x 14336", lambda: activation.silu_and_mul(gate_up),
         lambda: elementwise.silu_and_mul(gate_up)),
        ("rotate and store, 64 tokens",
         lambda: rotary.rotate_and_store(qkv, slabs, 1, cos, sin, None, 1e-5, places, slots), rotate_in_torch),
        ("sample, top-k top-p min-p, 64 x 128256", lambda: sampling.sample(logits, *choices), sample_in_torch),
        ("gather 64 blocks", lambda: blocks.gather_blocks(slabs, ids, staged),
         lambda: torch.index_select(slabs, 0, ids, out=staged)),
        ("deterministic linear, 64 x 4096 x 4096", lambda: linear.linear(x, matrix, None, residual),
         lambda: torch.addmm(residual, x, matrix.t())),
    ]  # fmt: skip


def _random(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.bfloat16, device="cuda") / math.sqrt(sizes[-1])


def _slabs(num_blocks: int) -> Tensor:
    return torch.randn(num_blocks, LAYERS, KV_HEADS, 2, PAGE, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
