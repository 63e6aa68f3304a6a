"""The Dockerfiles. No builder runs here: what can be held against the tree is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from manifests import DEPLOY, ROOT, parsed

FILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """Name and rest of each, lines joined, comments gone."""
    text = re.sub(r"^#.*\n", "", path.read_text("utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_everything_that_the_package_is_made_of_is_copied(path: Path) -> None:
    copied = {
        source
        for name, rest in instructions(path)
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert all((ROOT / source).exists() for source in copied)
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {package.split("/")[0] for package in packages} <= copied
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= copied
    ignored = Path(f"{path}.dockerignore").read_text("utf-8").splitlines()
    assert {f"!{source}" for source in copied} <= set(ignored)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_process_is_not_root_and_gets_its_signals(path: Path) -> None:
    found = instructions(path)
    users = [rest for name, rest in found if name == "USER"]
    assert users == ["10001:10001"]
    (entry,) = (rest for name, rest in found if name == "ENTRYPOINT")
    assert json.loads(entry) == ["tidegate"]  # no shell between the signal and us
    assert ("STOPSIGNAL", "SIGTERM") in found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_image_asks_its_own_health(path: Path) -> None:
    found = dict(instructions(path))
    port = found["EXPOSE"]
    assert f"http://127.0.0.1:{port}/health" in found["HEALTHCHECK"]
    (command, _) = json.loads(found["CMD"])
    default = {"cloud": 8090, "serve": 8080}[command]
    assert int(port) == default
    assert parsed([command, "model"]).listen.endswith(f":{default}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_versions_are_pinned_and_extras_are_ours(path: Path) -> None:
    text = path.read_text("utf-8")
    assert re.search(r"^ARG PYTHON=3\.11\.\d+-slim-bookworm$", text, re.MULTILINE)
    assert "-c constraints.txt" in text
    extra = re.search(r"^ARG EXTRA=(\w+)$", text, re.MULTILINE)
    name = extra.group(1) if extra else re.findall(r'"\.\[(\w+)\]"', text)[0]
    assert name in PROJECT["project"]["optional-dependencies"]


def test_the_image_for_gpus_has_the_compiler_that_triton_calls() -> None:
    found = instructions(DEPLOY / "docker" / "cloud.Dockerfile")
    last = max(place for place, (name, _) in enumerate(found) if name == "FROM")
    final = found[last:]
    assert ("ARG", "EXTRA") in final
    (install,) = (rest for name, rest in final if name == "RUN" and "apt-get install" in rest)
    assert install.startswith('if [ "${EXTRA}" = gpu ]; then')
    assert {"gcc", "libc6-dev"} <= set(install.split())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_linter_has_nothing_to_say(path: Path) -> None:
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([linter, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
