"""The compose file: valid by the compose specification, and true of the program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from manifests import DEPLOY, ROOT, compose, parsed

FILE = DEPLOY / "compose" / "compose.yaml"


def checked(path: Path) -> subprocess.CompletedProcess[str]:
    schema = ("--builtin-schema", "vendor.compose-spec")
    return subprocess.run(
        [sys.executable, "-P", "-m", "check_jsonschema", *schema, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_file_is_valid_by_the_specification(tmp_path: Path) -> None:
    done = checked(FILE)
    assert done.returncode == 0, done.stdout
    wrong = compose()
    wrong["services"]["gw0"]["restarts"] = "always"
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(wrong))
    assert checked(tmp_path / "compose.yaml").returncode == 1


@pytest.mark.parametrize("name", ["gw0", "gw1"])
def test_the_arguments_are_ours(name: str) -> None:
    service = compose()["services"][name]
    arguments = parsed(service["command"])
    places = {volume.split(":")[1] for volume in service["volumes"]}
    for path in (arguments.checkpoint, arguments.state, arguments.keys):
        assert any(path.is_relative_to(place) for place in places), path
    assert int(service["stop_grace_period"].removesuffix("s")) >= 2 * arguments.drain + 5


def test_two_gateways_have_a_folder_of_keys_each() -> None:
    folders = [compose()["services"][name]["volumes"][2] for name in ("gw0", "gw1")]
    assert len(set(folders)) == 2


@pytest.mark.parametrize("name", compose()["services"])
def test_no_container_may_more_than_it_must(name: str) -> None:
    service = compose()["services"][name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service["user"].startswith("0")
    assert ":" in service["image"]
    assert not service["image"].endswith(":latest")


def test_the_image_is_built_from_a_file_that_there_is() -> None:
    build = compose()["services"]["gw0"]["build"]
    context = (FILE.parent / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]).is_file()
