"""Checkpoints by their id on a hub, without one: only what is no folder is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from wordmodel import write_word_checkpoint

from tidegate.converters.hub import FILES, find_checkpoint, model_name
from tidegate.errors import CheckpointError
from tidegate.model.bundle import Bundle


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def test_a_folder_is_taken_as_it_is_even_if_it_looks_like_an_id(tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert find_checkpoint("org/name") == Path("org/name")
    assert find_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["nowhere", "/a/b", "a/b/c", "../x/y", "org/misspelt", ""])
def test_what_is_no_id_is_never_asked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "org").mkdir()
    assert find_checkpoint(name) == Path(name)


def test_an_id_that_cannot_be_fetched_is_one_clear_error(tmp_path: Path) -> None:
    # A process of its own: the library reads its settings when it is imported.
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tidegate.cli", "convert", "some/model", "--out", "b"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "tidegate: some/model: is no folder, and the hub cannot be reached, and it is not in "
        "the cache\n"
    )
    assert list(tmp_path.glob("*b*/manifest.json")) == []


def test_a_checkpoint_in_the_cache_is_converted_by_its_id(tmp_path: Path) -> None:
    # As the library lays it out: a name of its own for the commit that a branch points to.
    cached, commit = tmp_path / "hub" / "hub" / "models--org--small-model", "0" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    write_word_checkpoint(cached / "snapshots" / commit, context=64)
    command = [sys.executable, "-P", "-m", "tidegate.cli", "convert", "org/small-model"]
    done = subprocess.run(
        [*command, "--out", "b", "--target", "onnx", "--quiet"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert Bundle.open(tmp_path / "b").manifest.model_id == "small-model"


def test_a_fetched_checkpoint_is_called_by_its_id(tmp_path: Path) -> None:
    (tmp_path / "edge").mkdir()
    assert model_name("org/small-model", tmp_path / "snapshots" / "abc123") == "small-model"
    assert model_name("edge", tmp_path / "edge") == "edge"


def test_no_file_is_fetched_that_could_run_code() -> None:
    assert all(pattern.endswith((".json", ".jinja", ".safetensors")) for pattern in FILES)


def test_offline_the_library_says_so_by_an_error_of_ours() -> None:
    with pytest.raises(CheckpointError, match="org/name: is no folder"):
        find_checkpoint("org/name")
