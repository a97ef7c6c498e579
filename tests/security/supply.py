"""What Baton is built from: `make sbom` writes it down, `make audit` asks what of it is known to be vulnerable.

Both tools live in an environment of their own, so that what they need is not taken for what Baton needs.
"""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.security.advisories import Advisories, NoAdvisoriesError

ROOT: Final = Path(__file__).resolve().parents[2]
UNDECLARED: Final = {"fastokens": "Apache-2.0", "protobuf": "BSD-3-Clause"}
"""Licences of packages whose own metadata name none."""
VULNERABLE, NO_DATABASE = 1, 2


class Audit(NamedTuple):
    status: int
    says: str


def sbom(tool: Path, output: Path, python: str = sys.executable) -> dict[str, Any]:
    """CycloneDX 1.6 in JSON of the environment that `python` is of. Raises CalledProcessError."""
    words = [tool, "environment", "--pyproject", ROOT / "pyproject.toml", "--output-reproducible", "--of", "JSON"]
    made = subprocess.run([*words, python], check=True, capture_output=True, text=True, timeout=300)
    bom: dict[str, Any] = json.loads(made.stdout)
    for component in bom["components"]:
        if component["name"] in UNDECLARED and not component.get("licenses"):
            component["licenses"] = [{"license": {"acknowledgement": "concluded", "id": UNDECLARED[component["name"]]}}]
    output.write_text(json.dumps(bom, indent=2) + "\n")
    return bom


def audit(tool: Path, packages: str, advisories: Advisories | None = None) -> Audit:
    """Of what a folder of site packages has, by the advisory database of PyPI, or by advisories that are here."""
    words = [tool, "--path", packages, "--format", "json", "--progress-spinner", "off"]
    with ExitStack() as stack:
        if advisories is not None:
            words += ["--vulnerability-service", "osv", "--osv-url", stack.enter_context(advisories.served())]
        ran = subprocess.run(words, capture_output=True, text=True, timeout=900)
    result = judged(ran.stdout, ran.stderr)
    if advisories is not None and result.status != NO_DATABASE:
        return Audit(result.status, f"{result.says}\nby advisories that know of nothing after {advisories.newest()}")
    return result


def judged(stdout: str, stderr: str) -> Audit:
    """Of what pip-audit wrote: a package that it knows nothing of is not taken for a good one."""
    try:
        dependencies = json.loads(stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = stderr.strip().splitlines()[-1][:300] if stderr.strip() else "it said nothing"
        return Audit(NO_DATABASE, f"NOT AUDITED: the database of vulnerabilities was not reached ({reason})")
    found = [
        f"{each['name']} {each['version']}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions']) or 'no version'}"
        for each in dependencies
        for flaw in each.get("vulns", ())
    ]
    unknown = sorted(each["name"] for each in dependencies if "skip_reason" in each)
    audited = len(dependencies) - len(unknown)
    if not audited:
        return Audit(NO_DATABASE, f"NOT AUDITED: the database knows none of {len(unknown)} packages; is it a mirror?")
    lines = [f"{audited} packages audited, {len(found)} vulnerabilities known", *found]
    if unknown:
        lines.append(f"not audited, as the database does not know them: {', '.join(unknown)}")
    return Audit(VULNERABLE if found else 0, "\n".join(lines))


def main(words: Sequence[str]) -> int:
    """sbom TOOL FILE, or audit TOOL [FOLDER of advisories]."""
    what, tool, *rest = words
    if not os.access(tool, os.X_OK):
        print(f"NOT DONE: {tool} is not there; it is installed where a package index can be reached")
        return NO_DATABASE
    if what == "sbom":
        bom = sbom(Path(tool), Path(rest[0]))
        print(f"{rest[0]}: {len(bom['components'])} components")
        return 0
    try:
        advisories = Advisories(Path(rest[0])) if rest else None
    except NoAdvisoriesError as error:
        print(f"NOT AUDITED: {error}")
        return NO_DATABASE
    result = audit(Path(tool), sysconfig.get_path("purelib"), advisories)
    print(result.says)
    return result.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
