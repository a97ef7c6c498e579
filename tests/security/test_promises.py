"""The page of security names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()


def test_every_promise_names_tests_that_exist() -> None:
    table = PAGE.partition("**Promises**")[2].partition("\n\n**")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 20
    sources: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        sources[path.name] = sources.get(path.name, "") + path.read_text()
    for promise, shown_by in rows:
        proofs = re.findall(r"`([^`]+)`", shown_by)
        assert proofs, f"no test: {promise}"
        for proof in proofs:
            name, _, test = proof.partition("::")
            assert f"def {test}(" in sources[name], proof


def test_every_file_of_tests_of_security_is_named() -> None:
    for path in Path(__file__).parent.glob("test_*.py"):
        if path.name not in ("test_promises.py", "test_supply.py"):
            assert f"`{path.name}::" in PAGE, path.name
