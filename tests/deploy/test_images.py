"""The Dockerfile: what it copies is there, what it leaves out stays out, and nobody in it is root."""

import re
import subprocess
import sys
import tomllib

from tests.deploy.manifests import CHART, ROOT

FOLDER = ROOT / "deploy" / "docker"
TEXT = (FOLDER / "Dockerfile").read_text()
STAGES = {match[2]: match[0] for match in re.finditer(r"^FROM (\S+) AS (\S+)\n(?:.(?!^FROM))*", TEXT, re.M | re.S)}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_both_images_end_as_a_user_that_the_chart_runs_them_as() -> None:
    (uid,) = set(re.findall(r"runAsUser: (\d+)", (CHART / "templates" / "_helpers.tpl").read_text()))
    assert f"useradd --uid {uid}" in STAGES["base"]
    for image in ("cpu", "cuda"):
        assert f"USER {uid}:{uid}\n" in STAGES[image]
        assert STAGES[image].rstrip().endswith('ENTRYPOINT ["baton"]')
        assert STAGES[image].startswith(f"FROM {image}-libraries "), "code is the last layer"


def test_the_context_has_every_package_and_no_weights_tests_or_environments() -> None:
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().split("\n")
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    packages = {each.rstrip("*") for each in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert kept == packages | {
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "deploy/docker/requirements.py",
    }
    assert all((ROOT / each).exists() for each in kept)
    sources = re.findall(r"source=(\S+?),", TEXT)
    assert sources
    assert set(sources) <= kept


def test_libraries_are_those_of_the_project_with_the_extras_of_the_image() -> None:
    for stage, extras in (("cpu-libraries", ["otel"]), ("cuda-libraries", ["gpu", "nixl", "otel"])):
        (words,) = re.findall(r"python /src/requirements.py /src/pyproject.toml(.*) >", STAGES[stage])
        assert words.split() == extras
        command = [sys.executable, str(FOLDER / "requirements.py"), str(ROOT / "pyproject.toml"), *extras]
        told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split("\n")[:-1]
        project = PROJECT["project"]
        assert told == [*project["dependencies"], *(p for e in extras for p in project["optional-dependencies"][e])]
