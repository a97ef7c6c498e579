"""Alerts do what they say, and neither they nor the dashboard ask for what nobody exports."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton.metric_names import METRICS

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "observability"
SERIES = {series: metric for metric in METRICS.values() for series in metric.series}
GROUPS = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
ALERTS = [rule for rule in RULES if "alert" in rule]
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
PROMETHEUS_OWN = {"job", "instance", "le"}
UNITS = {"reqps", "s", "none", "percentunit", "bytes", "Bps", "ops"}


def check_query(query: str) -> None:
    """It names registered metrics and recorded rules only, with labels that they have."""
    names = set(re.findall(r"\b(?:baton[:_]|vllm:)[\w:]+", query))
    assert names or query.startswith("up{"), query
    assert names <= SERIES.keys() | RECORDED, f"{names - SERIES.keys() - RECORDED}: {query}"
    for name, selector in re.findall(r"\b((?:baton_|vllm:)[\w:]+)\{([^}]*)\}", query):
        labels = set(re.findall(r"(\w+)\s*[=!]~?\"", selector))
        assert labels <= PROMETHEUS_OWN | set(SERIES[name].labels), query
    grouped = {label.strip() for labels in re.findall(r"\bby \(([^)]*)\)", query) for label in labels.split(",")}
    known = {label for name in names & SERIES.keys() for label in SERIES[name].labels}
    assert grouped <= known | PROMETHEUS_OWN, query


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("record") or rule["alert"])
def test_rules_ask_only_for_what_is_exported(rule: dict[str, Any]) -> None:
    check_query(rule["expr"])


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alerts_say_what_is_wrong_and_who_is_to_look(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["description"].endswith(".")


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels_say_what_they_show_in_which_unit_and_ask_only_for_what_is_exported(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["targets"]
    for target in panel["targets"]:
        check_query(target["expr"])
        assert target["legendFormat"]


def test_panels_neither_overlap_nor_share_an_id() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_promtool_finds_the_rules_right_and_their_tests_pass() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not here: make system-packages")
    for command in ("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml"):
        done = subprocess.run([promtool, *command], cwd=FOLDER, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
