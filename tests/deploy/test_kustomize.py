"""The base of kustomize is the chart with its defaults, and the example over it is one that works."""

import shutil
import subprocess

import pytest
import yaml

from tests.deploy.manifests import BASE, ROOT, base, of_kind, pods

OVERLAY = ROOT / "deploy" / "k8s" / "overlays" / "example"


def test_the_base_is_what_the_chart_writes() -> None:
    assert base() == BASE.read_text(), "the chart was changed: make kustomize-base"


def test_every_file_that_is_named_is_there() -> None:
    for path in (BASE.parent, OVERLAY):
        content = yaml.safe_load((path / "kustomization.yaml").read_text())
        assert all((path / each).exists() for each in content["resources"])


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which has kustomize in it")
def test_the_example_changes_model_image_namespace_and_number() -> None:
    command = ["kubectl", "kustomize", str(OVERLAY)]
    made = subprocess.run(command, check=True, capture_output=True, timeout=60, text=True).stdout
    whole = [each for each in yaml.safe_load_all(made) if each]
    assert {each["metadata"]["namespace"] for each in whole} == {"chat"}
    (binding,) = of_kind(whole, "RoleBinding")
    assert {each["namespace"] for each in binding["subjects"]} == {"chat"}
    for pod in pods(whole):
        assert pod.main["image"] == "registry.example.com/baton:0.1.0-cpu"
        assert pod.words()[-1] == "--model=/models/my-model", "the last one counts"
        if pod.name == "baton-decode":
            assert pod.owner["spec"]["replicas"] == 3
