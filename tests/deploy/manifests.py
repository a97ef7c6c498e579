"""What the chart writes for given values, and what a pod of it is.

`python -m tests.deploy.manifests` writes the base of kustomize, which is the chart with its defaults.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "k8s" / "chart"
BASE = ROOT / "deploy" / "k8s" / "base" / "baton.yaml"
EXAMPLES = sorted((ROOT / "deploy" / "k8s" / "values").glob("*.yaml"))
NAMESPACE = "models"
MISSING = "needs helm-python-sdk and kubernetes-validate: make chart-tools"
Object = dict[str, Any]
_OF_HELM = re.compile(r"^ *(app\.kubernetes\.io/managed-by|helm\.sh/\S+):.*\n|^ *\n", re.MULTILINE)


def render(values: Object, release: str = "chat", namespace: str = NAMESPACE) -> dict[str, str]:
    """Texts by template. Skips the test where helm is not."""
    helm = pytest.importorskip("helm_python", reason=MISSING)
    texts: dict[str, str] = helm.Chart.load(CHART).render(values, name=release, namespace=namespace)
    return {path.rpartition("/")[2]: text for path, text in sorted(texts.items())}


def objects(texts: dict[str, str]) -> list[Object]:
    yamls = (text for name, text in texts.items() if name.endswith(".yaml"))
    return [each for text in yamls for each in yaml.safe_load_all(text) if each]


def base() -> str:
    """The chart with its defaults, in any namespace, without what only helm understands."""
    texts = render({}, "baton", "default")
    whole = "\n".join(f"---\n{text}" for name, text in texts.items() if name.endswith(".yaml") and text.strip())
    text = re.sub(r"(?:---\n+)+", "---\n", _OF_HELM.sub("", whole))
    return (
        "# The chart with its defaults: make kustomize-base writes it, and kustomize changes it.\n"
        + text.strip()
        + "\n"
    )


class Pod(NamedTuple):
    owner: Object
    template: Object

    @property
    def name(self) -> str:
        return str(self.owner["metadata"]["name"])

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.template["metadata"]["labels"])

    @property
    def spec(self) -> Object:
        return dict(self.template["spec"])

    @property
    def main(self) -> Object:
        (container,) = self.spec["containers"]
        return dict(container)

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def words(self) -> list[str]:
        """The command line as the kubelet makes it."""
        requests = self.main["resources"]["requests"]
        known = {"POD_NAME": "pod-0", "POD_IP": "10.0.0.1", "CPUS": str(requests.get("cpu"))}
        env = {each["name"]: each.get("value", known.get(each["name"])) for each in self.main["env"]}
        return [re.sub(r"\$\((\w+)\)", lambda match: str(env[match[1]]), word) for word in self.main["args"]]


def pods(of: list[Object]) -> Iterator[Pod]:
    for each in of:
        if each["kind"] == "Deployment":
            yield Pod(each, each["spec"]["template"])
        elif each["kind"] == "LeaderWorkerSet":
            yield Pod(each, each["spec"]["leaderWorkerTemplate"]["workerTemplate"])


def of_kind(of: list[Object], *kinds: str) -> list[Object]:
    return [each for each in of if each["kind"] in kinds]


def selects(labels: dict[str, str], pod: Pod) -> bool:
    return labels.items() <= pod.labels.items()


if __name__ == "__main__":
    BASE.write_text(base())
