"""What the check of a real cluster judges by, without a cluster."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coordinator_harness import running

from baton.client import AsyncClient
from tests.deploy.manifests import MISSING
from tests.kubernetes import load

pytest.importorskip("helm_python", reason=MISSING)
from tests.kubernetes.__main__ import CheckError, Kubectl, Row


def test_the_load_says_what_came_and_how_it_failed_and_no_text(run: Callable[..., None]) -> None:
    async def main() -> None:
        async with running() as system:
            async with AsyncClient(system.url) as client:
                refused = await load.answer(client, 0)
                assert str(refused["error"]).startswith("503 no worker")
                worker = await system.worker()
                first, again, other = [await load.answer(client, number) for number in (1, 1, 2)]
                assert len(worker.assignments) == 3
            assert first["error"] == again["error"] == ""
            assert first["text"] == again["text"]
            assert len(str(first["text"])) == 64
            assert 0 < float(str(first["pause_s"])) <= float(str(first["took_s"]))
            assert other["prompt"] == 2

    run(main())


def pod(name: str, created: str, ready: str = "True", **metadata: str) -> dict[str, Any]:
    condition = {"type": "Ready", "status": ready}
    return {
        "metadata": {"name": name, "creationTimestamp": created, **metadata}, "status": {"conditions": [condition]}
    }  # fmt: skip


def deployment(replicas: int, generation: int = 2, **status: int) -> dict[str, Any]:
    told = {"observedGeneration": 2, "updatedReplicas": replicas, "readyReplicas": replicas} | status
    return {"metadata": {"generation": generation}, "spec": {"replicas": replicas}, "status": told}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """kubectl says this of deployments and pods, and fails at everything else."""
    script = tmp_path / "kubectl"
    script.write_text(f"""#!/bin/sh
case "$*" in
*"get deployments"*) cat {tmp_path}/deployments ;;
*"get pods"*"--output name") sed 's/.*/pod/' {tmp_path}/names ;;
*"get pods"*) cat {tmp_path}/pods ;;
*) echo "no such thing" >&2; exit 1 ;;
esac
""")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def says(deployments: list[dict[str, Any]], pods: list[dict[str, Any]]) -> None:
        (tmp_path / "deployments").write_text(json.dumps({"items": deployments}))
        (tmp_path / "pods").write_text(json.dumps({"items": pods}))
        (tmp_path / "names").write_text("".join(f"{each['metadata']['name']}\n" for each in pods))

    return says


def test_a_release_is_settled_when_all_its_pods_are_new_and_ready_and_no_other_is_left(
    cluster: Callable[..., None],
) -> None:
    kubectl = Kubectl("somewhere")
    two = [pod("a", "2026-01-02T00:00:00Z"), pod("b", "2026-01-01T00:00:00Z")]
    cluster([deployment(1), deployment(1)], two)
    assert kubectl.is_settled()
    for deployments in (
        [deployment(1), deployment(2)],
        [deployment(2, readyReplicas=1)],
        [deployment(2, updatedReplicas=1)],
        [deployment(2, generation=3)],
        [deployment(1)],
    ):
        cluster(deployments, two)
        assert not kubectl.is_settled()


def test_the_oldest_pod_that_is_ready_and_stays_is_chosen_and_kubectl_is_quoted(cluster: Callable[..., None]) -> None:
    old, new = pod("old", "2026-01-01T00:00:00Z"), pod("new", "2026-01-03T00:00:00Z")
    goes = pod("goes", "2025-01-01T00:00:00Z", deletionTimestamp="2026-01-03T00:00:00Z")
    cluster([], [new, goes, pod("loads", "2025-01-01T00:00:00Z", ready="False"), old])
    assert [each["metadata"]["name"] for each in Kubectl("somewhere").pods("decode")] == ["old", "new"]
    with pytest.raises(CheckError, match="kubectl logs pod/load: no such thing"):
        Kubectl("somewhere")("logs", "pod/load")


def test_a_row_is_right_only_with_answers_none_of_which_failed_or_differs() -> None:
    assert Row("x", 1.0, 5, 0, 0, 0.1).is_right
    for counts in ((0, 0, 0), (5, 1, 0), (5, 0, 1)):
        assert not Row("x", 1.0, *counts, 0.1).is_right
