"""What Baton is built from is written down whole, and an audit that knew nothing does not pass for a good one."""

import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from tests.security.supply import NO_DATABASE, ROOT, VULNERABLE, judged, sbom


def tool(name: str) -> Path:
    beside = Path(sys.executable).parent.parent / "scan" / "bin" / name
    found = os.environ.get("BATON_SCANNERS", "") and str(Path(os.environ["BATON_SCANNERS"]) / name)
    found = found or (str(beside) if beside.exists() else shutil.which(name) or "")
    if not found:
        pytest.skip(f"{name} is not installed: `make scanners`")
    return Path(found)


@pytest.mark.slow
def test_the_sbom_names_every_direct_dependency_with_its_version_and_licence(tmp_path: Path) -> None:
    bom = sbom(tool("cyclonedx-py"), tmp_path / "sbom.json")
    assert json.loads((tmp_path / "sbom.json").read_text()) == bom
    assert (bom["bomFormat"], bom["metadata"]["component"]["name"]) == ("CycloneDX", "baton-serve")
    components = {each["name"].lower().replace("_", "-"): each for each in bom["components"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = {match[0].lower() for each in project["dependencies"] if (match := re.match(r"[\w.-]+", each))}
    assert len(direct) > 10
    for name in direct:
        component = components[name]
        assert component["version"], name
        assert component["purl"].startswith("pkg:pypi/"), name
        names = [each.get("expression") or each["license"].get("id") or each["license"]["name"]
                 for each in component.get("licenses", ())]  # fmt: skip
        assert names, f"{name} names no licence; look at it, and add it to UNDECLARED"
        assert all(names), name


def test_an_audit_says_what_it_found_and_what_it_could_not_look_at() -> None:
    good = {"name": "good", "version": "1", "vulns": []}
    bad = {"name": "bad", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
    unknown = {"name": "unknown", "skip_reason": "not found"}
    assert judged(json.dumps({"dependencies": [good]}), "").status == 0
    found = judged(json.dumps({"dependencies": [good, bad, unknown]}), "")
    assert found.status == VULNERABLE
    assert "bad 2: PYSEC-1, fixed in 3" in found.says
    assert "not audited, as the database does not know them: unknown" in found.says
    for stdout, stderr in (
        ("", "ConnectionError: no route"),
        (json.dumps({"dependencies": [unknown]}), ""),
        ("[]", ""),
    ):
        nothing = judged(stdout, stderr)
        assert nothing.status == NO_DATABASE
        assert nothing.says.startswith("NOT AUDITED")
