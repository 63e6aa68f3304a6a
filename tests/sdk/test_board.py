"""What `serve` and `convert` take of a profile, and that a flag always wins."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from wordmodel import write_word_checkpoint

from tidegate.cli import serve
from tidegate.cli.board import describe, read_profile, served
from tidegate.cli.main import main
from tidegate.edge.energy.profile_detect import detect, read_board
from tidegate.edge.energy.profile_files import read_library
from tidegate.model.bundle import Bundle


def flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(["bundle", *words])


def test_a_profile_fills_in_what_no_flag_says() -> None:
    taken = served(flags(), read_profile("raspberry-pi-5"), 8000 << 20)
    assert (taken.executor, taken.rows, taken.threads, taken.memory_mib) == ("auto", 2, 4, 6000)
    taken = served(flags(), read_profile("jetson-agx-thor"), 8000 << 20)
    assert (taken.executor, taken.rows, taken.threads) == ("onnx", 4, None)


def test_a_flag_wins_over_the_profile() -> None:
    words = ("--rows", "3", "--threads", "1", "--memory-mib", "500", "--executor", "openvino")
    taken = served(flags(*words), read_profile("jetson-orin-nano-8gb"), 8000 << 20)
    assert (taken.executor, taken.rows, taken.threads, taken.memory_mib) == ("openvino", 3, 1, 500)


def test_without_a_profile_everything_is_as_it_was() -> None:
    taken = served(flags(), None, 8000 << 20)
    assert (taken.executor, taken.rows, taken.threads, taken.memory_mib) == ("auto", 4, None, None)


def test_what_has_no_effect_is_said() -> None:
    profile = read_profile("jetson-orin-nano-8gb")
    line = describe(profile, served(flags(), profile, 8000 << 20))
    assert line.endswith("yet: kv_mib 1024; max_model_mib 4300; providers cuda, cpu")
    plain = read_profile("generic-x86-64")
    assert "without effect" not in describe(plain, served(flags(), plain, 8000 << 20))


def test_auto_is_the_detected_board() -> None:
    wanted = detect(read_board(), read_library().every()).profile.id
    assert read_profile("auto").id == wanted


def test_an_unknown_profile_is_refused_before_anything_is_opened(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for command in (["serve", str(tmp_path)], ["convert", str(tmp_path), "--out", "made"]):
        assert main([*command, "--profile", "toaster"]) == 1
        assert "profile = 'toaster': must be one of" in capsys.readouterr().err


def test_a_decoder_is_converted_by_the_recipe_of_the_profile(tmp_path: Path) -> None:
    checkpoint = write_word_checkpoint(tmp_path / "model", context=64)
    out = tmp_path / "made"
    words = ["convert", str(checkpoint), "--out", str(out), "--quiet", "--target", "onnx"]
    assert main([*words, "--profile", "rk3588"]) == 0
    assert Bundle.open(out).manifest.recipe.name == "fast"


@pytest.mark.parametrize(
    "words", [["--recipe", "fast"], ["--bits", "4"], ["--group-size", "32"], ["--symmetric"]]
)
def test_a_profile_and_a_flag_that_say_the_recipe_are_not_taken_together(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(tmp_path), "--out", str(tmp_path / "out"), "--profile", "rk3588"]
    assert main([*command, *words]) == 1
    assert f"{words[0][2:]} = " in capsys.readouterr().err
