"""`tidegate profile calibrate` on a tiny bundle: real executors, a file that the daemon takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from wordmodel import write_word_checkpoint

from tidegate.cli.main import main
from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import make_recipe
from tidegate.edge.energy.board_costs import explained_costs
from tidegate.edge.energy.profile_files import read_library
from tidegate.edge.executors.choice import ExecutorSettings
from tidegate.model.bundle import Bundle

BOARD = "generic-x86-64"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("calibrated")
    checkpoint = write_word_checkpoint(folder / "model", context=160)
    recipe = make_recipe(bits=4, group_size=64, symmetric=False)
    plan = ConversionPlan(model_id="tiny", targets=("onnx",), recipe=recipe)
    return convert(checkpoint, folder / "bundle", plan)


def calibrate(bundle: Bundle, output: Path, *flags: str) -> int:
    """Run the command for as short as it can."""
    return main(
        [
            *("profile", "calibrate", str(bundle.folder), "--profile", BOARD),
            *("--overlays", str(output.parent / "none"), "--output", str(output)),
            *("--rows", "1", "--threads", "1", "--minutes", "0.01"),
            *("--power-switching", "off", *flags),
        ]
    )


def test_what_was_measured_is_what_the_daemon_takes(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "calibration.toml"
    assert calibrate(bundle, output) == 0
    text = capsys.readouterr()
    assert "tiny on onnx, rows 1, threads 1" in text.out
    assert "points, quiet time: prompts" in text.out
    assert "both as they ran: " in text.out
    assert f"kept in {output}" in text.out
    assert "executor auto, rows 1, threads 1" in text.err
    assert main(["profile", "check", "--calibration", str(output)]) == 0
    library = read_library(tmp_path / "none", None)
    # However busy this machine was.
    output.write_text(re.sub("_error = .*", "_error = 0.1", output.read_text()))
    costs = explained_costs(
        library.profile(BOARD),
        bundle,
        ExecutorSettings(threads=1, rows=1),
        modes=("as it is",),
        rows=1,
        calibration=output,
    ).costs
    assert costs.source == "calibrated"
    assert costs.load_s > 0
    assert 0 < costs.modes[0].step_s < 1


def test_json_holds_every_prediction_beside_its_measurement(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "calibration.toml"
    assert calibrate(bundle, output, "--json") == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["profile"] == BOARD
    assert told["rounds"] >= 5
    (mode,) = told["modes"]
    for row in (*mode["held_out_prefill"], *mode["held_out_decode"]):
        error = row["predicted_s"] / row["measured_s"] - 1
        assert row["error"] == pytest.approx(error, abs=0.02)
    assert told["cost"]["mode"][0]["name"] == "as it is"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--minutes", "0"), "minutes = 0.0: must be more than 0"),
        (("--modes", "turbo"), "modes = 'turbo': must be of as it is"),
        (("--context", "80"), "calibrate.context = "),
        (("--profile", "toaster"), "profile = 'toaster'"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_nothing_is_kept(
    bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    told: str,
) -> None:
    output = tmp_path / "calibration.toml"
    assert calibrate(bundle, output, *flags) == 1
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_file_of_another_board_is_refused_before_the_model_is_loaded(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "calibration.toml"
    text = 'schema = 1\napplies_to = "raspberry-pi-5"\n'
    output.write_text(text, encoding="utf-8")
    assert calibrate(bundle, output) == 1
    assert "must be of this board (generic-x86-64)" in capsys.readouterr().err
    assert output.read_text(encoding="utf-8") == text
