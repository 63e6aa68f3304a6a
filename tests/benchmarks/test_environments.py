"""The peers' environments: pinned, and named when they are missing."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

environments: Any = import_module("peers.environments")
engines: Any = import_module("peers.engines")


@pytest.mark.parametrize("name", environments.NAMES)
def test_every_package_of_a_peer_is_pinned(name: str) -> None:
    assert all(version[0].isdigit() for version in environments.pins(name).values())


def test_a_peer_that_is_not_built_is_missing_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TIDEGATE_PEERS", str(tmp_path))
    missing = {one.name: one.missing() for one in engines.every_engine()}
    assert f"{tmp_path / 'llama'} is not there" in missing[engines.LLAMA]
    assert all(missing[name] for name in (engines.OPENVINO, engines.GENAI_32, engines.GENAI_64))
    assert {missing[name] for name in (engines.LIBRARY, engines.ONNX)} == {None}


def test_an_environment_with_another_version_says_which(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TIDEGATE_PEERS", str(tmp_path))
    python = tmp_path / "ovgenai" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nprintf '2026.4.1\\n2025.1\\n2026.4.1\\nnone\\n'\n")
    python.chmod(0o755)
    problem = environments.problem("ovgenai")
    assert problem is not None
    assert "openvino is 2025.1, numpy is none" in problem
    assert "openvino-genai" not in problem
