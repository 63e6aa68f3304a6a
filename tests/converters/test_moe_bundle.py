"""Mixture-of-experts checkpoints to bundles: both layouts, both targets, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hfcheckpoints import hf_logits, load_hf_model, write_hf_checkpoint

from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import make_recipe
from tidegate.edge.executors.choice import ExecutorSettings, open_executor
from tidegate.engine.executor import ExecutorStep, PagedGeometry, Row
from tidegate.model.bundle import Bundle
from tidegate.model.manifest import DEVICE_TARGETS, DeviceTarget
from tidegate.model.recipe import Format, FormatRule, Recipe

DENSE = Recipe(
    name="float32",
    formats=(FormatRule(match=("*",), format=Format(bits=32, group_size=None)),),
    passes=(),
)

MODELS: dict[str, dict[str, Any]] = {
    # Heads of 16, and layers of both kinds where a model has them.
    "mixtral": {"head_dim": 16, "sliding_window": 7},
    "qwen3_moe": {"mlp_only_layers": [1], "norm_topk_prob": True},
    "olmoe": {"hidden_size": 64, "clip_qkv": 0.6},
}

PROMPT = np.random.default_rng(5).integers(2, 200, 21)


def checkpoint_of(folder: Path, model_type: str) -> Path:
    return write_hf_checkpoint(folder, model_type, **MODELS[model_type])


def plan(recipe: Recipe) -> ConversionPlan:
    return ConversionPlan(model_id="moe", targets=DEVICE_TARGETS, recipe=recipe)


def logits(bundle: Bundle, target: DeviceTarget) -> np.ndarray:
    """Logits after the prompt, which is given in two steps."""
    executor = open_executor(bundle, ExecutorSettings(choice=target, rows=1, threads=1, exact=True))
    paged = isinstance(executor.kv, PagedGeometry)
    blocks = np.arange(2, dtype=np.int32) if paged else None
    for past, end in ((0, 13), (13, len(PROMPT))):
        row = Row(tokens=PROMPT[past:end], past=past, slot=None if paged else 0, blocks=blocks)
        found = executor.execute(ExecutorStep(rows=(row,))).logits
    executor.close()
    return np.array(found[0])


@pytest.mark.parametrize("model_type", MODELS)
def test_a_float_bundle_says_what_transformers_says(model_type: str, tmp_path: Path) -> None:
    folder = checkpoint_of(tmp_path / "checkpoint", model_type)
    (expected,) = hf_logits(folder, [PROMPT.tolist()])
    bundle = convert(folder, tmp_path / "b", plan(DENSE))
    for target in DEVICE_TARGETS:
        np.testing.assert_allclose(logits(bundle, target), expected[-1], atol=1e-4)


@pytest.mark.parametrize("model_type", MODELS)
def test_experts_apart_or_together_make_the_same_bundle(model_type: str, tmp_path: Path) -> None:
    apart = checkpoint_of(tmp_path / "apart", model_type)
    together = tmp_path / "together"
    load_hf_model(apart).save_pretrained(together, save_original_format=False)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (together / name).write_bytes((apart / name).read_bytes())
    recipe = plan(make_recipe(bits=4, group_size=32, symmetric=False))
    one = convert(apart, tmp_path / "one", recipe).manifest
    other = convert(together, tmp_path / "other", recipe).manifest
    assert one.files == other.files
    assert one.tensor_bits["layers.0.router"] == 8
    assert one.tensor_bits["layers.0.experts.3.down"] == 4
