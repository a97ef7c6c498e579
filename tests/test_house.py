"""The house is as its plan says."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from baton import config
from baton.metrics import WORKER_COUNTERS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cli", "coordinator", "prefill", "decode", "worker", "engine", "kvtransfer", "kernels", "baton")


def sources() -> list[Path]:
    return [path for name in PACKAGES for path in (ROOT / name).rglob("*.py") if "v1" not in path.parts]


def test_kernels_can_be_imported_by_strangers() -> None:
    """`import transformers` executes any top-level `kernels` package it finds."""
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_part_says_what_it_is_for(name: str) -> None:
    assert ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text()))
    assert f"`{name}/`" in (ROOT / "docs" / "architecture.md").read_text()


def test_every_counter_that_is_counted_is_registered_and_every_registered_one_is_counted() -> None:
    counted: set[str] = set()
    for path in sources():
        if path.name != "metrics.py":
            text = path.read_text()
            counted |= {name for name in WORKER_COUNTERS if re.search(rf'"{name}"|\b{name}=', text)}
            unknown = set(re.findall(r'counters\["(\w+)"\]', text)) - set(WORKER_COUNTERS)
            assert not unknown, f"{path.name} counts {unknown}"
    assert counted == set(WORKER_COUNTERS)


def test_no_flag_takes_a_secret_itself() -> None:
    """Everybody on a machine sees command lines: what is secret comes from files, or the environment."""
    options = [value for value in vars(config).values() if dataclasses.is_dataclass(value)]
    assert options
    secret = re.compile(r"(^|_)(key|login|password|secret|credential|token)$")
    for each in options:
        for field in dataclasses.fields(each):
            if secret.search(field.name):
                assert re.match("PEM private key|file with", field.metadata["help"]), field.name


def test_links_between_pages_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} points to {target}"
