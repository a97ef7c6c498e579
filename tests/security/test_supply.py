"""What Baton is built from is written down whole, and an audit that knew nothing does not pass for a good one."""

import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from tests.security.advisories import Advisories, NoAdvisoriesError
from tests.security.supply import NO_DATABASE, ROOT, VULNERABLE, audit, judged, sbom


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


ADVISORY = """
id: {id}
modified: "2026-0{number}-01T00:00:00Z"
affected:
- package: {{ecosystem: PyPI, name: some-package}}
  ranges:
  - {{type: GIT, events: [{{introduced: "0"}}]}}
  - {{type: ECOSYSTEM, events: {events}}}
  versions: [{listed}]
"""


def advisories(folder: Path) -> Advisories:
    told = {
        "PYSEC-1": '[{introduced: "1.2"}, {fixed: "1.10"}]',
        "PYSEC-2": '[{fixed: "0.5"}, {introduced: "0"}, {introduced: "2.0rc1"}, {last_affected: "2.1"}]',
        "PYSEC-3": "[]",
    }
    (folder / "vulns" / "some-package").mkdir(parents=True)
    for number, (id, events) in enumerate(told.items(), 1):
        listed = "weird, 3.0" if id == "PYSEC-3" else ""
        text = ADVISORY.format(id=id, number=number, events=events, listed=listed)
        (folder / "vulns" / "some-package" / f"{id}.yaml").write_text(text)
    return Advisories(folder)


@pytest.mark.parametrize(
    ("version", "concerns"),
    [
        ("0.4", ["PYSEC-2"]), ("0.5", []), ("1.1.9", []), ("1.2", ["PYSEC-1"]), ("1.9.post1", ["PYSEC-1"]),
        ("1.10", []), ("2.0rc1", ["PYSEC-2"]), ("2.1", ["PYSEC-2"]), ("2.1.1", []), ("3.0", ["PYSEC-3"]), ("3.0.1", []),
    ],
)  # fmt: skip
def test_an_advisory_concerns_the_versions_that_it_says(tmp_path: Path, version: str, concerns: list[str]) -> None:
    found = advisories(tmp_path)
    assert [each["id"] for each in found.of("some-package", version)] == concerns
    assert found.of("another-package", version) == found.of("../some-package", version) == []
    assert found.newest() == "2026-03-01"


def test_a_folder_without_advisories_is_not_taken_for_one_with_none_that_concern(tmp_path: Path) -> None:
    with pytest.raises(NoAdvisoriesError, match="advisory-database"):
        Advisories(tmp_path)


@pytest.mark.slow
def test_an_audit_without_a_network_finds_what_the_advisories_here_know(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    for name, version in (("some_package", "1.9"), ("another", "1.9")):
        (packages / f"{name}-{version}.dist-info").mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (packages / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)
    found = audit(tool("pip-audit"), str(packages), advisories(tmp_path / "database"))
    assert found.status == VULNERABLE
    assert found.says.splitlines() == [
        "2 packages audited, 1 vulnerabilities known",
        "some-package 1.9: PYSEC-1, fixed in 1.10",
        "by advisories that know of nothing after 2026-03-01",
    ]
