"""The chart on a real cluster: `make kubernetes-check`, at the one that kubectl speaks to.

In a namespace of its own, under the *restricted* Pod Security Standard, it installs the chart with the demo model in
float32, keeps greedy streams running from a pod, lets happen what happens to pods and releases, and compares every
answer with those of before. It needs kubectl, nodes that have the image, and room for seven small pods.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import helm_python

from tests.deploy.manifests import CHART

RELEASE: Final = "check"
LOAD: Final = Path(__file__).with_name("load.py")
NUM_STREAMS: Final = 6
STEP_TIMEOUT_S: Final = 300.0
INSTANCE: Final = f"app.kubernetes.io/instance={RELEASE}"
_MEMORY: Final = {"requests": {"cpu": "100m", "memory": "600Mi"}, "limits": {"memory": "2Gi"}}
VALUES: Final[dict[str, Any]] = {
    "coordinator": {"drainTimeoutSeconds": 3, "resources": _MEMORY},
    "poolDefaults": {
        "replicas": 2,
        "drainTimeoutSeconds": 15,
        "flags": {"dtype": "float32", "kv-memory": "64MiB"},
        "resources": _MEMORY,
    },
}
RESTRICTED: Final = {
    "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip


class CheckError(Exception):
    """What was promised did not come."""


class Kubectl:
    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def __call__(self, *words: str, given: str = "", timeout_s: float = 60.0) -> str:
        command = ["kubectl", "--namespace", self._namespace, *words]
        ran = subprocess.run(command, input=given, capture_output=True, text=True, timeout=timeout_s)
        if ran.returncode:
            raise CheckError(f"kubectl {' '.join(words)}: {ran.stderr.strip()}")
        return ran.stdout

    def apply(self, *objects: dict[str, Any]) -> None:
        self("apply", "--filename", "-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def pods(self, pool: str) -> list[dict[str, Any]]:
        """Those of a pool, or of the coordinators, that are ready and do not go, the oldest first."""
        of = "app.kubernetes.io/component=coordinator" if pool == "coordinator" else f"baton/pool={pool}"
        found = json.loads(self("get", "pods", "--selector", f"{INSTANCE},{of}", "--output", "json"))["items"]
        ready = [
            each for each in found
            if "deletionTimestamp" not in each["metadata"]
            and any(it["type"] == "Ready" and it["status"] == "True" for it in each["status"].get("conditions", ()))
        ]  # fmt: skip
        return sorted(ready, key=lambda each: str(each["metadata"]["creationTimestamp"]))

    def is_settled(self) -> bool:
        """Every pod that is wanted is ready and up to date, and none other is left."""
        deployments = json.loads(self("get", "deployments", "--selector", INSTANCE, "--output", "json"))["items"]
        wanted = sum(each["spec"]["replicas"] for each in deployments)
        there = self("get", "pods", "--selector", INSTANCE, "--output", "name").split()
        return len(there) == wanted and all(
            each["status"].get("observedGeneration") == each["metadata"]["generation"]
            and each["status"].get("updatedReplicas", 0)
            == each["status"].get("readyReplicas", 0)
            == each["spec"]["replicas"]
            for each in deployments
        )


def wait_for(promise: Callable[[], bool], what: str, timeout_s: float = STEP_TIMEOUT_S) -> float:
    """Seconds that it took. Raises CheckError."""
    began = time.monotonic()
    while not promise():
        if time.monotonic() - began > timeout_s:
            raise CheckError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.5)
    return time.monotonic() - began


@dataclass(frozen=True, slots=True)
class Row:
    """What streams saw of one event."""

    event: str
    settled_s: float
    num_answers: int
    num_failed: int
    num_different: int
    longest_pause_s: float

    @property
    def is_right(self) -> bool:
        return self.num_answers > 0 and self.num_failed == self.num_different == 0


class Load:
    """The pod that asks. Its log is read whole each time, so that a reader that breaks off loses nothing."""

    def __init__(self, kubectl: Kubectl, image: str, url: str) -> None:
        self._kubectl = kubectl
        metadata = {"name": "load", "labels": {"app": "baton-check-load"}}
        kubectl.apply(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"load.py": LOAD.read_text()}},
            {
                "apiVersion": "v1", "kind": "Pod", "metadata": metadata,
                "spec": {
                    "restartPolicy": "Never", "automountServiceAccountToken": False,
                    "containers": [{
                        "name": "load", "image": image, "command": ["python", "/load/load.py", url, str(NUM_STREAMS)],
                        "securityContext": RESTRICTED, "volumeMounts": [{"name": "load", "mountPath": "/load"}],
                    }],
                    "volumes": [{"name": "load", "configMap": {"name": "load"}}],
                },
            },
        )  # fmt: skip
        kubectl("wait", "--for=condition=Ready", "pod/load", "--timeout=60s", timeout_s=70)
        self._undisturbed: dict[int, str] = {}
        self.wait_for_more(0, 2 * NUM_STREAMS)
        for each in self.answers():
            if each["error"] or self._undisturbed.setdefault(each["prompt"], each["text"]) != each["text"]:
                raise CheckError(f"answers differ, or fail, before anything happened: {each}")

    def answers(self) -> list[dict[str, Any]]:
        lines = self._kubectl("logs", "pod/load").split("\n")[:-1]
        if other := [line for line in lines if not line.startswith("{")]:
            raise CheckError("the load said: " + "\n".join(other))
        return [json.loads(line) for line in lines]

    def wait_for_more(self, before: int, count: int) -> None:
        wait_for(lambda: len(self.answers()) >= before + count, f"{count} more answers")

    def during(self, event: str, happens: Callable[[], object], settled: Callable[[], bool]) -> Row:
        before = len(self.answers())
        happens()
        settled_s = wait_for(settled, f"{event}: every pod is ready again")
        now = len(self.answers())
        self.wait_for_more(now, 2 * NUM_STREAMS)
        seen = self.answers()[before:]
        failed = [each for each in seen if each["error"]]
        for each in failed:
            print(f"  {event}: {each['error']} after {each['took_s']} s", file=sys.stderr)
        different = [each for each in seen if not each["error"] and each["text"] != self._undisturbed[each["prompt"]]]
        pause_s = max(each["pause_s"] for each in seen)
        return Row(event, settled_s, len(seen), len(failed), len(different), pause_s)


class Check:
    def __init__(self, namespace: str, image: str, drain_node: str) -> None:
        self._kubectl = Kubectl(namespace)
        self._namespace = namespace
        repository, _, tag = image.rpartition(":")
        self._image = image
        self._values = {**VALUES, "image": {"repository": repository, "tag": tag}}
        self._node = drain_node

    @contextmanager
    def _release(self) -> Iterator[helm_python.Config]:
        """Installed for as long as it lasts, in a namespace that goes with it."""
        metadata = {"name": self._namespace, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}
        self._kubectl("create", "--filename", "-", given=json.dumps(namespace))
        try:
            with helm_python.Config(namespace=self._namespace) as helm:
                helm.install(str(CHART), RELEASE, self._values, namespace=self._namespace)
                yield helm
        finally:
            self._kubectl("delete", "namespace", self._namespace, "--timeout=120s", timeout_s=130)

    def rows(self, only: str) -> Iterator[Row]:
        kubectl = self._kubectl
        with self._release() as helm:
            installed_s = wait_for(kubectl.is_settled, "the release is ready")
            print(f"ready {installed_s:.0f} s after it was installed", file=sys.stderr)
            address = kubectl("get", "service", f"{RELEASE}-baton", "--output", "jsonpath={.spec.clusterIP}")
            load = Load(kubectl, self._image, f"http://{address}:8000")
            for event, happens in self._events(helm):
                if only in event:
                    yield load.during(event, happens, kubectl.is_settled)
            helm.uninstall(RELEASE)
            gone_s = wait_for(
                lambda: not kubectl("get", "all", "--selector", INSTANCE, "--output", "name"), "the release is gone"
            )
            print(f"gone {gone_s:.0f} s after it was uninstalled", file=sys.stderr)

    def _events(self, helm: helm_python.Config) -> Iterator[tuple[str, Callable[[], object]]]:
        yield "nothing", lambda: None
        for pool in ("decode", "prefill", "coordinator"):
            yield f"{pool} pod deleted", partial(self._delete, pool)
            yield f"{pool} pod killed", partial(self._delete, pool, "--grace-period=0", "--force")
        if self._node:
            yield f"{self._node} drained", self._drain
        yield "release upgraded", partial(self._upgrade, helm)
        yield "release rolled back", partial(helm.rollback, RELEASE)
        for replicas in (3, 1, 2):
            scale = partial(self._kubectl, "scale", f"deployment/{RELEASE}-baton-decode", f"--replicas={replicas}")
            yield f"decode pool scaled to {replicas}", scale

    def _delete(self, pool: str, *words: str) -> None:
        """The oldest one of a pool, or of the coordinators."""
        oldest = self._kubectl.pods(pool)[0]["metadata"]["name"]
        self._kubectl("delete", "pod", oldest, "--wait=false", *words)

    def _upgrade(self, helm: helm_python.Config) -> None:
        """Every pod is replaced."""
        new = {"env": [{"name": "ROUND", "value": "2"}]}
        changed = {name: {**self._values[name], **new} for name in ("coordinator", "poolDefaults")}
        helm.upgrade(str(CHART), RELEASE, {**self._values, **changed}, namespace=self._namespace)

    def _drain(self) -> None:
        """Of the release's pods alone: others stay, though none comes meanwhile."""
        words = ("--pod-selector", INSTANCE, "--delete-emptydir-data", "--timeout=120s")
        try:
            self._kubectl("drain", self._node, *words, timeout_s=130)
        finally:
            self._kubectl("uncordon", self._node)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make kubernetes-check", description=__doc__)
    parser.add_argument("--image", required=True, help="repository:tag, of target cpu, that the nodes have or can pull")
    parser.add_argument("--namespace", default="baton-check", help="made, and deleted afterwards")
    parser.add_argument("--drain-node", default="", help="cordon and drain this node of the check's pods")
    parser.add_argument("--only", default="", help="events whose name has this text")
    parser.add_argument("--json", default="", help="file to write the table to")
    options = parser.parse_args(words)
    check = Check(options.namespace, options.image, options.drain_node)
    found = []
    print(f"{'event':32} {'settled s':>9} {'answers':>7} {'failed':>6} {'different':>9} {'longest pause s':>15}")
    try:
        for row in check.rows(options.only):
            found.append(row)
            print(
                f"{row.event:32} {row.settled_s:9.1f} {row.num_answers:7} {row.num_failed:6} {row.num_different:9} "
                f"{row.longest_pause_s:15.2f}",
                flush=True,
            )
    except CheckError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    if options.json:
        rows = [{name: getattr(row, name) for name in Row.__slots__} for row in found]
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if all(row.is_right for row in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
