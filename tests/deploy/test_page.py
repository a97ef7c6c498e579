"""docs/deploy/kubernetes.md: what it names is there."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.deploy.manifests import CHART, ROOT
from tests.deploy.test_chart import exported

TEXT = (ROOT / "docs" / "deploy" / "kubernetes.md").read_text()
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def blocks() -> Iterator[Any]:
    for indent, block in re.findall(r"^( *)```yaml\n(.*?)^ *```", TEXT, re.M | re.S):
        yield yaml.safe_load("\n".join(line.removeprefix(indent) for line in block.splitlines()))


def test_metrics_and_files_that_it_names_exist() -> None:
    there = exported()
    named = set(re.findall(r"`((?:baton_|vllm:)\w+[a-z])[`{]", TEXT))
    assert len(named) > 5
    assert named <= there
    for path in re.findall(r"\b((?:deploy|tests)/[\w./-]+\w)", TEXT):
        assert (ROOT / path).exists(), path
    examples = {path.name for path in (ROOT / "deploy" / "k8s" / "values").iterdir()}
    assert set(re.findall(r"^\| `([\w-]+\.yaml)`", TEXT, re.M)) == examples


def test_settings_that_it_names_exist() -> None:
    pool = {"role", *VALUES["poolDefaults"]}
    groups = "|".join(set(VALUES) - {"pools", "poolDefaults"})
    for name in set(re.findall(rf"`((?:{groups})\.(?!yaml|baton)[\w.]+)", TEXT)):
        found: Any = VALUES
        for part in name.split("."):
            assert part in found, name
            found = found[part]
    for name in re.findall(r"`pools\.NAME\.(\w+)", TEXT):
        assert name in pool
    camel = set(re.findall(r"`([a-z]+[A-Z]\w+)", TEXT))
    assert len(camel) > 5
    everywhere = pool | set(VALUES) | {name for group in VALUES.values() for name in group}
    assert camel - {"emptyDir", "defaultMode", "terminationGracePeriodSeconds"} <= everywhere


def test_the_adapter_is_told_of_what_the_hpa_asks_for() -> None:
    rule = next(block for block in blocks() if "rules" in block)["rules"]["custom"][0]
    (pattern,) = re.findall(r'__name__=~"([^"]+)"', rule["seriesQuery"])
    asked = {name for name in exported() if re.fullmatch(pattern, name)}
    assert asked == {"baton_worker_waiting_prefill_tokens", "baton_worker_running_requests"}
    assert rule["resources"]["overrides"]["worker"] == {"resource": "pod"}


def test_the_picker_is_told_of_the_port_for_monitors() -> None:
    epp = next(block for block in blocks() if "router" in block)["router"]["epp"]
    told = yaml.safe_load(epp["pluginsCustomConfig"][epp["pluginsConfigFile"]])
    source = told["plugins"][0]
    assert source["parameters"] == {"scheme": "http", "path": "/metrics/load", "port": 9090}
    scorers = {each["pluginRef"] for each in told["schedulingProfiles"][0]["plugins"]}
    assert scorers <= {each["type"] for each in told["plugins"]}
