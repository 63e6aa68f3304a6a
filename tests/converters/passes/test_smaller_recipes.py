"""Recipes that make models smaller, from a checkpoint folder to bundles that both backends run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from smallermodels import TOLERANCE
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.convert import Conversion, ConversionPlan, convert
from tidegate.converters.driver.pipeline import looks_at_data
from tidegate.converters.recipe_file import parse_recipe
from tidegate.edge.executors.choice import ExecutorSettings, open_executor
from tidegate.engine.executor import ExecutorStep, Logits, Row

ARCH = tiny_architecture(layers=3)

STEPS = "steps = 2\nbatch_tokens = 100\n"


def recipe(*kinds: str) -> str:
    """Passes by kind; a kind may be followed by lines of options."""
    return "\n".join(
        f'[[passes]]\nkind = "{kind.partition(" ")[0]}"\n{kind.partition(" ")[2]}' for kind in kinds
    )


def made(tmp_path: Path, passes: str) -> Conversion:
    torch.set_num_threads(1)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", ARCH, RandomWeights(ARCH))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    parsed = parse_recipe(f'name = "smaller"\n{passes}', "smaller.toml")
    plan = ConversionPlan(
        model_id="tiny",
        targets=("onnx", "openvino"),
        recipe=parsed,
        context_tokens=64,
        text=text if looks_at_data(parsed) else None,
    )
    return convert(checkpoint, tmp_path / "bundle", plan)


def logits(bundle: Conversion, target: str) -> Logits:
    """After a few tokens, with activations in floats."""
    settings = ExecutorSettings(
        choice="onnx" if target == "onnx" else "openvino", context_tokens=64, rows=1, exact=True
    )
    executor = open_executor(bundle, settings)
    tokens = np.arange(5, 14, dtype=np.int64)
    slots = executor.kv.kind == "slots"
    row = (
        Row(tokens=tokens, past=0, slot=0)
        if slots
        else Row(tokens=tokens, past=0, blocks=np.arange(1, dtype=np.int32))
    )
    found = executor.execute(ExecutorStep(rows=(row,))).logits
    executor.close()
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("passes", "layers", "inner"),
    [
        (recipe("magnitude"), 3, 192),
        (recipe('wanda pattern = "2:4"'), 3, 192),
        (recipe("low_rank ratio = 0.5"), 3, 192),
        (recipe("prune_width keep = 0.7"), 3, 128),
        (recipe("prune_depth", f"distill {STEPS}"), 2, 192),
        (recipe('prune_depth measure = "kl"', "prune_width keep = 0.7", "wanda"), 2, 128),
        (recipe(f"qat {STEPS}"), 3, 192),
    ],
    ids=["magnitude", "wanda", "low rank", "width", "distilled", "all of them", "qat"],
)
def test_a_recipe_ends_in_a_bundle_that_both_backends_run_alike(
    tmp_path: Path, passes: str, layers: int, inner: int
) -> None:
    bundle = made(tmp_path, passes)
    arch = bundle.manifest.decoder
    assert (arch.layers, arch.inner) == (layers, inner)
    onnx, openvino = logits(bundle, "onnx"), logits(bundle, "openvino")
    np.testing.assert_allclose(onnx, openvino, atol=TOLERANCE, rtol=0)


def test_what_a_pass_leaves_as_it_is_is_told(tmp_path: Path) -> None:
    bundle = made(tmp_path, recipe("magnitude"))
    assert set(bundle.notes) == {"embed"}
    assert "a table that is looked up" in bundle.notes["embed"]


def test_a_smaller_recipe_makes_a_smaller_bundle(tmp_path: Path) -> None:
    sizes = {}
    for name, passes in {
        "plain": "",
        "low rank": recipe("low_rank ratio = 0.5"),
        "narrow": recipe("prune_width keep = 0.7"),
        "short": recipe("prune_depth"),
    }.items():
        (tmp_path / name).mkdir()
        sizes[name] = made(tmp_path / name, passes).manifest.memory.weight_bytes
    assert max(sizes[name] for name in ("low rank", "narrow", "short")) < 0.9 * sizes["plain"]
