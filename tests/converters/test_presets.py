"""Every preset makes a packed model of a small checkpoint, within the bits that it promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.driver.pipeline import Job, compress
from tidegate.converters.driver.store import StoreWeights
from tidegate.converters.passes.base import CalibrationText, Model
from tidegate.converters.recipe_file import load_recipe, preset_names
from tidegate.model.blocks import linear_roles
from tidegate.model.packed import PackedLinear
from tidegate.model.recipe import Recipe

BITS = {"tiny": 4.25, "fast": 5.0, "balanced": 5.0, "quality": 4.5, "tuned": 4.5, "int8": 8.125}
"""Bits per weight, at most; the 8-bit table is an eighth of this model."""


def short(recipe: Recipe) -> Recipe:
    """The recipe, with only a step of training."""
    passes = (
        replace(one, options={**one.options, "steps": 1}) if one.kind == "tune" else one
        for one in recipe.passes
    )
    return replace(recipe, passes=tuple(passes))


def silent(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def test_every_preset_is_named_here() -> None:
    assert set(preset_names()) == set(BITS)


@pytest.mark.parametrize("name", BITS)
def test_a_preset_packs_a_whole_decoder(tmp_path: Path, name: str) -> None:
    torch.set_num_threads(1)
    arch = replace(tiny_architecture(layers=1, width=256), inner=256)
    model = Model(arch=arch, weights=RandomWeights(arch))
    rng = np.random.default_rng(0)
    sequences = tuple(tuple(int(t) for t in rng.integers(0, arch.vocab, 24)) for _ in range(10))
    text = CalibrationText(name="random", sha256="0" * 64, sequences=sequences)
    job = Job(
        recipe=short(load_recipe(name)), model=model, text=text, folder=tmp_path, progress=silent
    )
    weights = StoreWeights(compress(job).store)
    bits = values = 0
    for role, found in linear_roles(arch).items():
        linear = weights.linear(role)
        assert isinstance(linear, PackedLinear), role
        assert (linear.outputs, linear.inputs) == found.shape
        bits, values = bits + 8 * linear.nbytes, values + linear.outputs * linear.inputs
    assert bits / values <= BITS[name]
