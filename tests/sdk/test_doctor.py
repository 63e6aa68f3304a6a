"""`tidegate doctor` on this machine, with and without a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nativebuild import native_folder
from wordmodel import write_word_checkpoint

from tidegate.cli.doctor import _print
from tidegate.cli.main import main
from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import make_recipe
from tidegate.edge.executors.native import find_native
from tidegate.edge.executors.openvino_model import openvino_release


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    checkpoint = write_word_checkpoint(folder / "model", context=256)
    recipe = make_recipe(bits=4, group_size=64, symmetric=False)
    plan = ConversionPlan(model_id="tiny", targets=("onnx", "openvino"), recipe=recipe)
    return convert(checkpoint, folder / "bundle", plan).folder


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    assert main(["doctor", *arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_the_machine_and_what_is_installed_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor(capsys)
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["read_gb_per_s"] > 0
    assert found["installed"]["openvino"].startswith("2026.4")
    native = found["native"]
    assert native["path"] is not None or (native["reason"] and native["how"])


def test_a_path_that_auto_would_not_take_is_not_shown_as_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    library = find_native(openvino_release(), native_folder()).library
    library.tidegate_native_force_path(b"portable")
    try:
        native = doctor(capsys)["native"]
    finally:
        library.tidegate_native_force_path(b"")
    assert native["path"] is None
    assert native["reason"] == "it has no fast path for this processor"


@pytest.mark.parametrize("executor", ["onnx", "openvino"])
def test_a_bundle_is_loaded_and_says_which_path_runs(
    executor: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--executor", executor, "--rows", "2", "--threads", "1"]
    found = doctor(capsys, str(bundle), *arguments)["bundle"]
    assert (found["runs"], found["context_tokens"], found["rows"]) == (True, 256, 2)
    assert found["executor"]["runtime"].startswith(
        f"{'onnxruntime' if executor == 'onnx' else executor} "
    )
    assert found["executor"]["linear"]
    assert found["executor"]["load_s"] > 0
    memory = found["memory"]
    parts = [nbytes for name, nbytes in memory.items() if name != "sum_bytes"]
    assert memory["sum_bytes"] == sum(parts)
    assert found["executor"]["kv_bytes"] <= memory["kv_bytes"]


def test_the_sum_covers_the_kv_that_the_executor_takes(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for precision in ("u4", "u8", "f16", "f32"):
        arguments = ["--executor", "openvino", "--kv-precision", precision]
        found = doctor(capsys, str(bundle), *arguments)["bundle"]
        assert found["executor"]["kv_precision"] == precision
        assert found["executor"]["kv_bytes"] <= found["memory"]["kv_bytes"]


def test_more_requests_than_memory_are_refused_with_the_sum(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = doctor(capsys, str(bundle), "--rows", "100000000", status=1)["bundle"]
    assert found["runs"] is False
    assert "MB of memory: " in found["reason"]


def test_what_cannot_run_is_said_in_the_executors_words(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--executor", "onnx", "--kv-precision", "u4"]
    found = doctor(capsys, str(bundle), *arguments, status=1)["bundle"]
    assert found["reason"] == "kv_precision = 'u4': must be u8, f16 or f32 on ONNX Runtime"


def test_people_get_tables(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(bundle), "--rows", "1", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    for word in ("machine", "read gb per s", "installed", "native", "sum bytes", "linear", "yes"):
        assert word in shown


def test_what_a_board_is_called_is_shown_and_never_obeyed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _print({"board": {"model": "[red] [/]"}})
    assert "[red] [/]" in capsys.readouterr().out
