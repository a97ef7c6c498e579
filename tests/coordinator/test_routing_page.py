"""docs/routing.md works one decision out in numbers; here they are computed, and compared with what the policy does."""

from pathlib import Path

import numpy as np
import pytest
from routing_harness import Workers, decode, prefill

from coordinator import estimates
from coordinator.policies import POLICIES
from coordinator.policies.base import Work

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "routing.md").read_text()
TOKENS, TOKEN_S, TOKEN_BYTES, BYTE_S = 8000, 1 / 8000, 131_072, 1e-9
WAITING, QUEUED = 2000, 1
STREAMS = {"decode-0": 4, "decode-1": 2}
STREAM_S = 0.001
HELD = {"prefill-0": 6000, "prefill-1": 0, "decode-0": 2000, "decode-1": 0}


def seconds_to_compute(id: str) -> float:
    peers = max(HELD.values()) - HELD[id]
    saved = peers * estimates.saves_s(TOKEN_S, TOKEN_BYTES * BYTE_S)
    return float(estimates.compute_s(TOKENS - HELD[id], TOKEN_S) - saved)


def stay(id: str) -> float:
    return float(estimates.decode_s(STREAM_S, STREAMS[id], estimates.ANSWER_TOKENS))


def rows() -> list[tuple[float, str]]:
    """(cost, row of the page's table)"""
    found = []
    for decoder, streams in STREAMS.items():
        for prefiller in ("prefill-0", "prefill-1"):
            queue, others = (WAITING * TOKEN_S, QUEUED) if prefiller == "prefill-0" else (0.0, 0)
            compute = seconds_to_compute(prefiller)
            left = float(estimates.tail_s(TOKENS - HELD[decoder], TOKEN_BYTES * BYTE_S, compute))
            found.append((decoder, prefiller, queue, compute, others * compute, left, stay(decoder)))
        compute = seconds_to_compute(decoder)
        found.append((decoder, "itself", 0.0, compute, (streams + 1) * compute, 0.0, stay(decoder)))
    costs = [sum(each[2:]) for each in found]
    texts = [" | ".join((*each[:2], *(f"{part:.2f}" for part in (*each[2:], sum(each[2:]))))) for each in found]
    return [(cost, f"| {text} |") for cost, text in zip(costs, texts, strict=True)]


@pytest.mark.parametrize(("cost", "row"), rows())
def test_the_page_has_the_cost_of_every_route(cost: float, row: str) -> None:
    assert row in PAGE, f"docs/routing.md should say\n{row}"


def test_the_cheapest_is_what_the_policy_takes() -> None:
    fast = {
        "prefill_s": TOKEN_S,
        "handover_s": BYTE_S * TOKEN_BYTES,
        "kv_bytes_per_token": TOKEN_BYTES,
        "context_tokens": 16_000,
    }
    fast |= {"free_tokens": 32_000}
    workers = Workers(
        **{
            "prefill-0": prefill(waiting_prefill_tokens=WAITING, requests=QUEUED, **fast),
            "prefill-1": prefill(**fast),
            "decode-0": decode(requests=STREAMS["decode-0"], stream_s=STREAM_S, **fast),
            "decode-1": decode(requests=STREAMS["decode-1"], stream_s=STREAM_S, **fast),
        }
    )
    work = Work(TOKENS, TOKENS + 500, workers.cached(**HELD))
    route = workers.route(work, workers.router("cost_based"))
    _, cheapest = min(rows())
    assert cheapest.startswith(f"| {route.decode} | {route.prefill} |")
    assert f"TTFT is {route.ttft_s:.2f} s, ITL {1000 * route.itl_s:.0f} ms" in PAGE
    assert np.isclose(route.itl_s, estimates.itl_s(STREAM_S, STREAMS[route.decode] + 1))


def test_the_page_describes_every_policy() -> None:
    for name in POLICIES:
        assert f"| `{name}` |" in PAGE
