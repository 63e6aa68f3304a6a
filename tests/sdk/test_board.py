"""What `serve` and `convert` take of a profile, and that a flag always wins."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
from wordmodel import write_word_checkpoint

from tidegate.cli import serve
from tidegate.cli.board import check_fits, check_weights, describe, read_profile, served
from tidegate.cli.main import main
from tidegate.converters.recipe_file import load_recipe
from tidegate.edge.energy.profile import Runtime
from tidegate.edge.energy.profile_detect import detect, read_board
from tidegate.edge.energy.profile_files import read_library
from tidegate.errors import ConfigError
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


def test_all_that_a_profile_says_of_running_takes_effect() -> None:
    profile = read_profile("jetson-orin-nano-8gb")
    taken = served(flags(), profile, 8000 << 20, available=("cuda", "cpu"))
    assert taken.providers == ("cuda", "cpu")
    assert (taken.kv_mib, taken.max_model_mib, taken.lacking) == (1024, 4300, ())
    line = describe(profile, taken)
    assert "providers cuda, cpu, rows 4" in line
    assert line.endswith(
        "at most 1024 MiB of KV, at most 4300 MiB of weights, at most 6000 MiB in all"
    )
    settings = serve._executor(flags(), taken)
    assert (settings.providers, settings.kv_mib, settings.runtime) == (
        ("cuda", "cpu"),
        1024,
        "onnx",
    )


def test_a_provider_that_is_not_installed_falls_to_the_next_and_is_named() -> None:
    profile = read_profile("jetson-orin-nano-8gb")
    taken = served(flags(), profile, 8000 << 20, available=("cpu",))
    assert (taken.providers, taken.lacking) == (("cpu",), ("cuda",))
    assert describe(profile, taken).endswith("; not in this ONNX Runtime: cuda")
    assert served(flags(), profile, 8000 << 20, available=()).providers == ("cpu",)


def test_a_flag_insists_on_its_providers() -> None:
    taken = served(flags("--providers", "tensorrt, cuda"), None, 1, available=("cpu",))
    assert (taken.providers, taken.lacking) == (("tensorrt", "cuda"), ())
    with pytest.raises(ConfigError, match=r"providers = \['npu'\]: must be some of cpu, cuda"):
        serve._executor(flags(), served(flags("--providers", "npu"), None, 1))
    profile = read_profile("jetson-orin-nano-8gb")
    other = served(flags("--executor", "openvino"), profile, 1, available=("cuda", "cpu"))
    assert (other.executor, other.providers, other.lacking) == ("openvino", ("cpu",), ())


def test_the_limits_have_flags_too() -> None:
    words = ("--kv-mib", "10", "--max-model-mib", "20", "--kv-precision", "u4")
    taken = served(flags(*words), read_profile("raspberry-pi-5"), 8000 << 20)
    assert (taken.kv_mib, taken.max_model_mib, taken.kv_precision) == (10, 20, "u4")


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


def test_a_model_that_a_board_would_refuse_is_refused_before_it_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_word_checkpoint(tmp_path / "model", context=64)
    small = replace(read_profile("rk3588"), runtime=Runtime(recipe="fast", max_model_mib=1))
    recipe = load_recipe("fast")
    check_fits(checkpoint, recipe, small.runtime)
    weight_bytes = (1 << 20) * 10
    with pytest.raises(ConfigError, match=r"max_model_mib = 1: must be at least 12, which is"):
        check_weights(weight_bytes, small.runtime)
    check_weights(weight_bytes, Runtime())
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"vocab_size": 10_000_000}
    (checkpoint / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("tidegate.cli.convert.read_profile", lambda wanted: small)
    out = tmp_path / "made"
    words = ["convert", str(checkpoint), "--out", str(out), "--quiet", "--target", "onnx"]
    assert main([*words, "--profile", "rk3588"]) == 1
    assert "max_model_mib = 1: must be at least" in capsys.readouterr().err
    assert not out.exists()


def test_a_board_with_a_gpu_gets_the_graph_that_it_runs(tmp_path: Path) -> None:
    checkpoint = write_word_checkpoint(tmp_path / "model", context=64)
    out = tmp_path / "made"
    words = ["convert", str(checkpoint), "--out", str(out), "--quiet", "--target", "onnx"]
    assert main([*words, "--profile", "jetson-agx-thor"]) == 0
    files = Bundle.open(out).manifest.files
    assert "onnx/model.fp16.onnx" in files
    bare = [*words[:3], str(tmp_path / "bare"), *words[4:]]
    assert main([*bare, "--profile", "raspberry-pi-5"]) == 0
    assert "onnx/model.fp16.onnx" not in Bundle.open(tmp_path / "bare").manifest.files


@pytest.mark.parametrize("name", read_library().ids())
def test_every_board_names_a_recipe_and_the_graph_of_its_gpu(name: str) -> None:
    runtime = read_profile(name).runtime
    assert runtime.recipe is not None
    assert load_recipe(runtime.recipe).name == runtime.recipe
    gpu = [provider for provider in runtime.providers if provider != "cpu"]
    assert ("fp16" in runtime.graphs) == bool(gpu)


def test_a_bundle_that_is_too_large_is_not_served_and_the_sum_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_word_checkpoint(tmp_path / "model", context=64)
    out = tmp_path / "made"
    words = ["convert", str(checkpoint), "--out", str(out), "--quiet", "--target", "onnx"]
    assert main([*words, "--profile", "raspberry-pi-4"]) == 0
    assert main(["serve", str(out), "--profile", "raspberry-pi-4", "--max-model-mib", "0"]) == 1
    told = capsys.readouterr().err
    assert "max_model_mib = 0: must be at least 1, which is" in told
    assert "weights, packed by the runtime" in told
