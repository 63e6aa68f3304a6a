"""Models shared by the system tests: one small bundle, one checkpoint that takes its time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openaiends import Ends
from services import Services, run_tidegate
from wordmodel import write_word_checkpoint


@pytest.fixture(scope="session")
def edge_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, 1024 tokens."""
    return write_word_checkpoint(tmp_path_factory.mktemp("models") / "edge")


@pytest.fixture(scope="session")
def bundle(edge_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The edge checkpoint, converted by the command line for both targets."""
    out = tmp_path_factory.mktemp("bundles") / "edge"
    done = run_tidegate("convert", str(edge_checkpoint), "--out", str(out), "--quiet")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def cloud_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, deep enough that several hundred tokens take seconds."""
    folder = tmp_path_factory.mktemp("models") / "cloud"
    return write_word_checkpoint(folder, layers=16, context=2048, seed=1)


@pytest.fixture(scope="module")
def ends(
    bundle: Path, cloud_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ends]:
    """A device and a cloud for the official client."""
    folder = tmp_path_factory.mktemp("openai")
    made = run_tidegate("keys", "api")
    (folder / "keys.txt").write_text(f"# who may call\n\n{made.stdout}")
    with Services(folder) as services:
        device = services.serve(bundle)
        cloud = services.cloud(cloud_checkpoint, "--api-key-file", str(folder / "keys.txt"))
        yield Ends(device=device, cloud=cloud, key=made.stderr.split()[-1])
