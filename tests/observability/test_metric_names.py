"""Whatever /metrics shows is explained, with its type and labels, and nothing is explained that it cannot show."""

from pathlib import Path

from coordinator_harness import DECODE, PREFILL, System, running
from prometheus_client.core import Metric as Exported
from tenant_files import KeyFile

from baton.metric_names import METRICS, SECTIONS, Kind
from baton.metric_page import page
from baton.metrics import TIER_COUNTERS, TIERS, WORKER_COUNTERS
from baton.v1 import worker_link_pb2 as wire

ROOT = Path(__file__).resolve().parents[2]
REAL = wire.WorkerHeartbeat(
    blocks=wire.BlockCounts(total=4096, free=4096),
    counters=dict.fromkeys(WORKER_COUNTERS, 1.0)
    | {
        f"kv_{tier}_{name}": 1.0
        for tier in TIERS
        for name in (*TIER_COUNTERS, "bytes", "capacity_bytes", "on", "pinned")
    },
    lanes_in_use={"prefill-0": "shm"},
)


async def exported(tmp_path: Path) -> list[Exported]:
    """By a coordinator with everything that can be counted, after it has answered, refused and retried."""
    keys = KeyFile(tmp_path / "keys.toml", one="")
    async with running(keys=str(keys.path), audit_log=str(tmp_path / "audit.log")) as system:
        for id, role in (("prefill-0", PREFILL), ("decode-0", DECODE), ("decode-1", DECODE)):
            worker = await system.worker(id, role)
            worker.heartbeat = REAL
            await worker.beat()
        system.workers[1].fail_at = 2
        await answer(system, keys, [1, 2, 3] * 100)
        await answer(system, keys, [1, 2, 3] * 100)
        await answer(system, keys, [])
        return list(system.coordinator.metrics.registry.collect())


async def answer(system: System, keys: KeyFile, prompt: list[int]) -> None:
    body = {"model": "demo", "prompt": prompt, "max_tokens": 5}
    async with system.http.post("/v1/completions", json=body, headers=keys.headers("one")) as response:
        await response.read()
        assert response.status == (200 if prompt else 400)


def test_whatever_is_exported_is_listed_and_whatever_is_listed_can_be_exported(run, tmp_path) -> None:
    families = run(exported(tmp_path))
    assert {family.name for family in families} == set(METRICS)
    samples = 0
    for family in families:
        listed = METRICS[family.name]
        assert (family.type, family.documentation) == (listed.kind.value, listed.meaning), family.name
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            samples += 1
            assert sample.name in listed.series, family.name
            assert sample.labels.keys() - {"le"} == set(listed.labels), family.name
    assert samples > 300


def test_no_name_is_listed_twice() -> None:
    names = [series for section in SECTIONS for metric in section.metrics for series in metric.series]
    assert len(names) == len(set(names))
    assert len(METRICS) == sum(len(section.metrics) for section in SECTIONS)


def test_a_name_says_its_unit() -> None:
    for metric in METRICS.values():
        assert metric.unit
        assert metric.meaning
        if metric.kind is Kind.HISTOGRAM:
            assert metric.unit in metric.name, metric.name


def test_the_page_of_metrics_is_up_to_date() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == page(), "make docs-metrics"
