"""What weights will take, foreseen from sizes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from wordmodel import write_word_checkpoint

from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.planned import planned_bytes
from tidegate.converters.recipe_file import load_recipe, with_target
from tidegate.model.checkpoint import read_json_object
from tidegate.model.registry import describe


@pytest.mark.parametrize("name", ["fast", "tiny"])
def test_what_is_foreseen_is_what_a_conversion_comes_to(name: str, tmp_path: Path) -> None:
    checkpoint = write_word_checkpoint(tmp_path / "model", context=64)
    recipe = load_recipe(name)
    plan = ConversionPlan(model_id="tiny", targets=("packed",), recipe=recipe)
    made = convert(checkpoint, tmp_path / "made", plan).manifest.memory.weight_bytes
    arch = describe(read_json_object(checkpoint / "config.json"))
    assert planned_bytes(arch, recipe) == pytest.approx(made, rel=0.05)


def test_a_target_of_bits_counts_for_all_weights(tmp_path: Path) -> None:
    checkpoint = write_word_checkpoint(tmp_path / "model", context=64)
    arch = describe(read_json_object(checkpoint / "config.json"))
    low, high = (planned_bytes(arch, with_target(load_recipe("fast"), bpw)) for bpw in (4.5, 6.0))
    assert 1.2 < high / low < 6.0 / 4.5 + 0.01
