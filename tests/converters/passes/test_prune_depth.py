"""Depth pruning: the layers that do least go, and what stays keeps its kind and its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from smallermodels import (
    MemoryWeights,
    assert_both_backends_run_it,
    every_logit,
    random_text,
    silent,
    tiny_encoder,
)
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.passes.base import Model, PassError
from tidegate.converters.passes.prune_depth import Options, make, without_layers
from tidegate.converters.training.sequences import SequenceOps
from tidegate.errors import ConfigError
from tidegate.kernels.torch_ops import WeightTensors
from tidegate.model.architecture import Architecture, LayerKind
from tidegate.model.packed import dense_weight
from tidegate.model.recipe import Format
from tidegate.model.rope import Rope
from tidegate.model.walk import embed, layer, logits

ARCH = tiny_architecture(layers=4)
TEXT = random_text(ARCH)
MEASURES = [Options(measure="cosine"), Options(measure="kl")]


def random_weights(arch: Architecture = ARCH) -> MemoryWeights:
    return MemoryWeights(arch, RandomWeights(arch))


def quietened(quiet: dict[int, float]) -> MemoryWeights:
    """Layers that add only a share of what they would to the residual stream."""
    weights = random_weights()
    for index, share in quiet.items():
        for part in ("o", "down"):
            role = f"layers.{index}.{part}"
            weights.change(role, dense_weight(weights.linear(role)) * np.float32(share))
    return weights


def prune(weights: MemoryWeights, options: Options, arch: Architecture = ARCH) -> Model:
    return make(options, ("*",)).apply(Model(arch=arch, weights=weights), TEXT, silent)


@pytest.mark.parametrize("options", MEASURES, ids=lambda options: options.measure)
def test_layers_that_add_nothing_go_and_the_logits_stay(options: Options) -> None:
    weights = quietened({1: 0.0, 3: 0.0})
    model = prune(weights, replace(options, drop=2))
    assert model.arch == replace(ARCH, layers=2)
    tokens = TEXT.sequences[0]
    assert isinstance(model.arch, Architecture)
    found = every_logit(model.arch, model.weights, tokens)
    np.testing.assert_allclose(found, every_logit(ARCH, weights, tokens), atol=1e-4)
    for new, old in enumerate((0, 2)):
        assert model.weights.linear(f"layers.{new}.q") is weights.linear(f"layers.{old}.q")
        norm = model.weights.vector(f"layers.{new}.mlp_norm")
        assert norm is weights.vector(f"layers.{old}.mlp_norm")


@pytest.mark.parametrize("options", MEASURES, ids=lambda options: options.measure)
def test_the_quietest_layer_goes_first(options: Options) -> None:
    weights = quietened({1: 0.3, 2: 0.05})
    model = prune(weights, options)
    kept = [model.weights.linear(f"layers.{index}.q") for index in range(3)]
    assert kept == [weights.linear(f"layers.{index}.q") for index in (0, 1, 3)]
    model = prune(weights, replace(options, drop=2))
    assert model.weights.linear("layers.1.q") is weights.linear("layers.3.q")


def test_the_divergence_is_that_of_the_next_token_from_the_whole_model() -> None:
    weights = random_weights()
    losses = []
    for candidate in range(ARCH.layers):
        rest = [index for index in range(ARCH.layers) if index != candidate]
        shorter = without_layers(Model(arch=ARCH, weights=weights), rest)
        assert isinstance(shorter.arch, Architecture)
        loss = 0.0
        for tokens in TEXT.sequences:
            full, found = (
                torch.from_numpy(every_logit(arch, of, tokens)).double().log_softmax(-1)
                for arch, of in ((ARCH, weights), (shorter.arch, shorter.weights))
            )
            loss += float((full.exp() * (full - found)).sum())
        losses.append(loss)
    gone = losses.index(min(losses))
    kept = [weights.linear(f"layers.{index}.q") for index in range(ARCH.layers) if index != gone]
    model = prune(weights, Options(measure="kl"))
    assert [model.weights.linear(f"layers.{index}.q") for index in range(3)] == kept


KINDS = (
    LayerKind(rope=Rope.plain(10000.0, 32)),
    LayerKind(rope=None),
    LayerKind(rope=Rope.plain(500.0, 32), window=5),
)


@pytest.mark.parametrize(
    ("kept", "pattern", "kinds"),
    [
        ((0, 2, 3), (0, 2, 1), KINDS),
        ((2, 3), (1, 0), KINDS[1:]),
        ((1, 2), (0, 0), KINDS[2:]),
    ],
)
def test_every_layer_that_stays_keeps_its_kind(
    kept: tuple[int, ...], pattern: tuple[int, ...], kinds: tuple[LayerKind, ...]
) -> None:
    arch = replace(ARCH, kinds=KINDS, pattern=(0, 2, 2, 1))
    weights = random_weights(arch)
    formats = {f"layers.{index}.q": Format(bits=8 if index == 3 else 4) for index in range(4)}
    model = without_layers(Model(arch=arch, weights=weights, formats=formats), kept)
    assert isinstance(model.arch, Architecture)
    assert (model.arch.pattern, model.arch.kinds) == (pattern, kinds)
    assert model.formats == {
        f"layers.{new}.q": formats[f"layers.{old}.q"] for new, old in enumerate(kept)
    }
    tokens = TEXT.sequences[1]
    with torch.no_grad():
        ops = SequenceOps([tokens], WeightTensors())
        x = embed(ops, arch, weights)
        for index in kept:
            x = layer(ops, arch, weights, x, index)
        expected = logits(ops, arch, weights, x).numpy()
    found = every_logit(model.arch, model.weights, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_both_backends_run_the_shorter_model(tmp_path: Path) -> None:
    model = prune(random_weights(), Options(drop=2))
    assert isinstance(model.arch, Architecture)
    assert model.arch.layers == 2
    assert_both_backends_run_it(model.arch, model.weights, tmp_path)


def test_a_model_keeps_at_least_a_layer() -> None:
    with pytest.raises(PassError, match=r"drop = 4: the model has 4 layers"):
        prune(random_weights(), Options(drop=4))


def test_an_encoder_is_refused() -> None:
    arch = tiny_encoder()
    model = Model(arch=arch, weights=MemoryWeights(arch, RandomWeights(arch)))
    with pytest.raises(PassError, match="encoder"):
        make(Options(), ("*",)).apply(model, TEXT, silent)


def test_options_and_patterns_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="drop"):
        Options(drop=0)
    with pytest.raises(ConfigError, match="measure"):
        Options(measure="taste")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="match"):
        make(Options(), ("layers.*.q",))
