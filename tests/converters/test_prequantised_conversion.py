"""A checkpoint that is quantised already becomes a bundle of the very same integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from everylogit import reference_logits
from prequantisedcheckpoints import write_quantised_checkpoint

from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.driver.pipeline import Job, compress
from tidegate.converters.driver.store import StoreWeights
from tidegate.converters.passes.base import Model
from tidegate.converters.recipe import make_recipe
from tidegate.converters.recipe_file import parse_recipe
from tidegate.edge.executors.choice import ExecutorSettings, open_executor
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.packed import PackedLinear
from tidegate.model.walk import Weights

TOLERANCE = 1e-4
"""On logits of scale 6, as in the tests of the backends."""

LAYOUTS = pytest.mark.parametrize(
    ("method", "bits", "group_size"),
    [("awq", 4, 32), ("gptq", 4, 64), ("gptq", 4, -1), ("gptq", 8, 128)],
)

PRUNED = """
name = "pruned"
[[formats]]
match = ["*"]
bits = 8
group_size = 128
[[passes]]
kind = "magnitude"
match = ["layers.*"]
"""


def stored(folder: Path, work: Path, recipe: str = "") -> tuple[Weights, dict[str, str]]:
    """What the driver makes of a checkpoint, and its notes."""
    parsed = (
        parse_recipe(recipe, "r.toml")
        if recipe
        else make_recipe(bits=8, group_size=32, symmetric=True)
    )
    work.mkdir()
    with Checkpoint.open(folder) as checkpoint:
        packed = compress(
            Job(
                recipe=parsed,
                model=Model(arch=checkpoint.architecture, weights=checkpoint.weights()),
                text=None,
                folder=work,
                progress=lambda what, done, total: None,
            )
        )
    return StoreWeights(packed.store), dict(packed.notes)


@LAYOUTS
def test_the_driver_keeps_its_integers_whatever_the_recipe_says(
    tmp_path: Path, method: str, bits: int, group_size: int
) -> None:
    weights = write_quantised_checkpoint(tmp_path / "c", method, bits=bits, group_size=group_size)
    for name, recipe in (("plain", ""), ("pruned", PRUNED)):
        found, notes = stored(tmp_path / "c", tmp_path / name, recipe)
        for role, part in (("o", "self_attn.o_proj"), ("down", "mlp.down_proj")):
            linear, expected = found.linear(f"layers.1.{role}"), weights[f"model.layers.1.{part}"]
            assert isinstance(linear, PackedLinear)
            assert linear.bits == bits
            assert np.array_equal(linear.dequantise(), expected.weight())
        table = found.linear("embed")
        assert isinstance(table, PackedLinear)
        assert table.bits == 8
        assert len(notes) == (14 if recipe else 0)


@LAYOUTS
def test_both_backends_multiply_those_integers(
    tmp_path: Path, method: str, bits: int, group_size: int
) -> None:
    write_quantised_checkpoint(tmp_path / "c", method, bits=bits, group_size=group_size)
    plan = ConversionPlan(
        model_id="tiny",
        targets=("onnx", "openvino"),
        recipe=make_recipe(bits=8, group_size=32, symmetric=True),
        context_tokens=64,
    )
    bundle = convert(tmp_path / "c", tmp_path / "bundle", plan)
    weights, _ = stored(tmp_path / "c", tmp_path / "work")
    tokens = np.arange(5, 14, dtype=np.int64)
    expected = reference_logits(bundle.manifest.decoder, weights, tokens)[-1:]
    for target in ("onnx", "openvino"):
        settings = ExecutorSettings(
            choice="onnx" if target == "onnx" else "openvino", context_tokens=64, rows=1, exact=True
        )
        executor = open_executor(bundle, settings)
        places: dict[str, object] = (
            {"slot": 0} if executor.kv.kind == "slots" else {"blocks": np.arange(1, dtype=np.int32)}
        )
        row = Row(tokens=tokens, past=0, **places)  # type: ignore[arg-type]
        logits = executor.execute(ExecutorStep(rows=(row,))).logits
        executor.close()
        assert logits is not None
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
