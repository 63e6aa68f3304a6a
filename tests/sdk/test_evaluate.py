"""`tidegate evaluate` and `convert --compare`, on a small random model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from encodercheckpoints import write_encoder
from wordmodel import write_word_checkpoint

from tidegate.cli.comparing import plans_of
from tidegate.cli.main import main
from tidegate.converters.convert import ConversionPlan
from tidegate.converters.recipe_file import load_recipe
from tidegate.model.bundle import Bundle, replace_manifest
from tidegate.model.quality import Quality
from tidegate.model.recipe import PassSpec


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_word_checkpoint(tmp_path_factory.mktemp("evaluate") / "model", context=256)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "bundle"
    assert main(["convert", str(checkpoint), "--out", str(out), "--quiet"]) == 0
    return out


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    lines = [
        {"messages": [{"role": "user", "content": f"w{i} w{i + 1}"}], "answer": "w3 w4"}
        for i in range(6)
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in [*lines, {"text": "w1 w2 w3 w4"}]))
    return path


def evaluated(
    capsys: pytest.CaptureFixture[str], bundle: Path, checkpoint: Path, text: Path, *more: str
) -> dict[str, object]:
    capsys.readouterr()
    wanted = ["--reference", str(checkpoint), "--text", str(text), "--json", *more]
    assert main(["evaluate", str(bundle), *wanted]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_a_bundle_with_exact_arithmetic_is_off_by_its_weights_and_both_executors_agree(
    capsys: pytest.CaptureFixture[str], bundle: Path, checkpoint: Path, tasks: Path
) -> None:
    found = [
        evaluated(capsys, bundle, checkpoint, tasks, "--exact", "--executor", executor)
        for executor in ("onnx", "openvino")
    ]
    for one, backend in zip(found, ("onnx", "openvino"), strict=True):
        assert one["backend"] == backend
        assert isinstance(one["kl_mean"], float)
        assert 0 < one["kl_mean"] < 1
        assert one["exact_match"] == one["reference_exact_match"] == 0
    assert found[0]["kl_mean"] == pytest.approx(found[1]["kl_mean"], rel=1e-3)
    assert found[0]["positions"] == found[1]["positions"]


def test_a_recorded_result_is_in_the_manifest_and_voids_the_signature(
    capsys: pytest.CaptureFixture[str], bundle: Path, checkpoint: Path, tasks: Path, tmp_path: Path
) -> None:
    assert main(["keys", "signing", str(tmp_path / "maker")]) == 0
    assert main(["bundle", "sign", str(bundle), "--key", str(tmp_path / "maker.key")]) == 0
    found = evaluated(capsys, bundle, checkpoint, tasks, "--record")
    manifest = Bundle.open(bundle).manifest
    assert manifest.signature is None
    assert isinstance(manifest.quality, Quality)
    assert manifest.quality.kl_mean == found["kl_mean"]
    assert found["weight_bytes"] == manifest.memory.weight_bytes
    assert isinstance(found["bits_per_weight"], float)
    assert 4 < found["bits_per_weight"] < 10
    capsys.readouterr()
    assert main(["inspect", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert f"mean KL divergence {manifest.quality.kl_mean:.5f}" in shown
    assert "signed by   nobody" in shown
    assert sum(one.share for one in manifest.quality.confidence) == pytest.approx(1)


def test_plain_text_is_measured_without_tasks_and_a_page_shows_the_layers(
    capsys: pytest.CaptureFixture[str], bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "plain.txt").write_text("w1 w2 w3 w4 w5 w6 w7 " * 10)
    plot = tmp_path / "page.html"
    found = evaluated(
        capsys, bundle, checkpoint, tmp_path / "plain.txt", "--plot", str(plot), "--tokens", "40"
    )
    assert found["exact_match"] is None
    assert found["positions"] == 40
    assert "Error per layer" in plot.read_text()
    assert "<script src" not in plot.read_text()
    errors = found["layer_errors"]
    assert isinstance(errors, dict)
    assert errors
    assert all(0 < error < 1 for error in errors.values())


@pytest.mark.parametrize(
    ("plot", "allowed"),
    [("page.png", "ends in .html"), ("nowhere/page.html", "in a folder that exists")],
)
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path, plot: str, allowed: str
) -> None:
    wanted = ["--reference", "nowhere", "--text", "nowhere", "--plot", str(tmp_path / plot)]
    assert main(["evaluate", str(bundle), *wanted]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert allowed in told.err


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "two tokens"),
        ("{", "line 1"),
        ('{"messages": 3}', "line 1"),
        ("[1]", "line 1"),
        (None, "readable"),
    ],
)
def test_a_text_that_cannot_be_measured_is_one_clear_error(
    capsys: pytest.CaptureFixture[str],
    bundle: Path,
    checkpoint: Path,
    tmp_path: Path,
    content: str | None,
    problem: str,
) -> None:
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    capsys.readouterr()
    wanted = ["--reference", str(checkpoint), "--text", str(path), "--quiet"]
    assert main(["evaluate", str(bundle), *wanted]) == 1
    told = capsys.readouterr().err
    assert problem in told
    assert "Traceback" not in told


def test_recipes_are_compared_in_one_table_with_the_best_marked(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tasks: Path, tmp_path: Path
) -> None:
    out, plot = tmp_path / "tried", tmp_path / "page.html"
    wanted = ["--compare", "fast,tiny", "--measure", str(tasks), "--plot", str(plot), "--quiet"]
    assert main(["convert", str(checkpoint), "--out", str(out), *wanted]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:3]] == ["tiny", "fast"]
    assert "*" in table[1]
    assert plot.read_text().count("<circle") == 2
    assert Bundle.open(out / "tiny").manifest.quality is not None


def test_comparing_without_a_text_or_twice_the_same_is_refused(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tasks: Path, tmp_path: Path
) -> None:
    base = ["convert", str(checkpoint), "--out", str(tmp_path / "tried"), "--quiet"]
    assert main([*base, "--compare", "fast"]) == 1
    assert "measure" in capsys.readouterr().err
    measured = ["--compare", "fast", "--measure", str(tasks)]
    assert main([*base, *measured, "--target-bpw", "5"]) == 1
    assert "target-bpw = 5.0: must be left out with --compare" in capsys.readouterr().err
    assert main([*base, *measured, "--lora", str(tmp_path)]) == 1
    assert "must be left out with --measure, which holds it against" in capsys.readouterr().err
    assert main([*base, *measured, "--text", str(tasks)]) == 1
    assert "none of the recipes looks at data" in capsys.readouterr().err
    assert main([*base, "--compare", "fast,fast", "--measure", str(tasks)]) == 1
    assert "different names" in capsys.readouterr().err


def test_an_encoder_is_not_compared_and_nothing_is_converted(
    capsys: pytest.CaptureFixture[str], tasks: Path, tmp_path: Path
) -> None:
    encoder, out = write_encoder(tmp_path / "model", "bert"), tmp_path / "tried"
    wanted = ["--out", str(out), "--compare", "fast", "--measure", str(tasks), "--quiet"]
    assert main(["convert", str(encoder), *wanted]) == 1
    assert "is an encoder" in capsys.readouterr().err
    assert not out.exists()


def test_a_bundle_with_an_adapter_is_said_to_be_held_against_the_checkpoint_without(
    capsys: pytest.CaptureFixture[str], bundle: Path, checkpoint: Path, tasks: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(bundle, merged)
    opened = Bundle.open(merged)
    recipe = replace(opened.manifest.recipe, passes=(PassSpec(kind="lora", options={}),))
    replace_manifest(opened, replace(opened.manifest, recipe=recipe))
    wanted = ["--reference", str(checkpoint), "--text", str(tasks), "--tokens", "20", "--quiet"]
    for folder, said in ((merged, True), (bundle, False)):
        assert main(["evaluate", str(folder), *wanted]) == 0
        assert ("has a LoRA merged" in capsys.readouterr().err) == said


def test_calibration_text_goes_to_the_compared_recipes_that_look_at_one(tmp_path: Path) -> None:
    plan = ConversionPlan(
        model_id="x", targets=("onnx",), recipe=load_recipe("fast"), text=tmp_path / "notes.txt"
    )
    plans = plans_of("fast,balanced", plan)
    assert {name: one.text for name, one in plans.items()} == {"fast": None, "balanced": plan.text}


def test_an_encoder_is_measured_by_the_angle_of_its_embeddings(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checkpoint = write_encoder(tmp_path / "model", "bert")
    out, text = tmp_path / "bundle", tmp_path / "lines.txt"
    text.write_text("one sentence\n\nanother one\nand a third\n")
    assert main(["convert", str(checkpoint), "--out", str(out), "--bits", "8", "--quiet"]) == 0
    found = evaluated(capsys, out, checkpoint, text, "--record", "--plot", str(tmp_path / "p.html"))
    assert found["sentences"] == 3
    assert isinstance(found["cosine_min"], float)
    assert 0.99 < found["cosine_min"] <= 1.0001
    assert Bundle.open(out).manifest.quality is not None


def test_what_a_conversion_cost_is_in_the_manifest_when_it_is_measured(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tasks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    wanted = ["--bits", "8", "--measure", str(tasks), "--quiet"]
    assert main(["convert", str(checkpoint), "--out", str(out), *wanted]) == 0
    quality = Bundle.open(out).manifest.quality
    assert isinstance(quality, Quality)
    assert 0 < quality.kl_mean < 0.1
    assert "KL divergence" in capsys.readouterr().out
    assert main(["convert", str(checkpoint), "--out", str(out), *wanted, "--lora", str(out)]) == 1
    assert "lora" in capsys.readouterr().err


def test_an_encoder_gets_eight_bits_unless_told_otherwise(tmp_path: Path) -> None:
    checkpoint = write_encoder(tmp_path / "model", "bert")
    for flags, bits in (([], 8), (["--bits", "4"], 4)):
        out = tmp_path / f"bundle-{bits}"
        assert main(["convert", str(checkpoint), "--out", str(out), "--quiet", *flags]) == 0
        assert Bundle.open(out).manifest.tensor_bits["layers.0.q"] == bits
