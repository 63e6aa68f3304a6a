"""Width pruning: MLPs really shrink, the silent channels go first, the rest makes up for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
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
from tidegate.converters.passes.prune_width import Options, make
from tidegate.converters.rounding.rtn import quantise
from tidegate.errors import ConfigError
from tidegate.model.architecture import Architecture, Experts
from tidegate.model.packed import dense_weight
from tidegate.model.roles import roles

ARCH = tiny_architecture()  # 192 inner channels
TEXT = random_text(ARCH)


def prune(weights: MemoryWeights, options: Options, arch: Architecture = ARCH) -> Model:
    model = Model(arch=arch, weights=weights)
    return make(options, ("*",)).apply(model, TEXT, silent)


def random_weights(arch: Architecture = ARCH, seed: int = 0) -> MemoryWeights:
    return MemoryWeights(arch, RandomWeights(arch, seed=seed))


def difference(model: Model, weights: MemoryWeights, arch: Architecture = ARCH) -> float:
    """Mean squared difference of the logits on other tokens than the calibration's."""
    assert isinstance(model.arch, Architecture)
    errors = [
        np.square(
            every_logit(model.arch, model.weights, tokens) - every_logit(arch, weights, tokens)
        )
        for tokens in random_text(arch, seed=9).sequences
    ]
    return float(np.concatenate(errors).mean())


@pytest.mark.parametrize("compensate", [True, False])
def test_channels_that_say_nothing_go_and_the_logits_stay(compensate: bool) -> None:
    weights = random_weights()
    rng = np.random.default_rng(4)
    for layer in range(ARCH.layers):
        silent_ones = rng.permutation(ARCH.inner)[:64]
        for part, axis in (("gate", 0), ("down", 1), ("up", 0)):
            role = f"layers.{layer}.{part}"
            weight = dense_weight(weights.linear(role)).copy()
            # In one layer nothing flows in, in the other nothing flows out.
            if (part == "down") == (layer == 1):
                weight[(silent_ones,) if axis == 0 else (slice(None), silent_ones)] = 0
            weights.change(role, weight)
    model = prune(weights, Options(keep=2 / 3, compensate=compensate))
    assert difference(model, weights) < 1e-8


def test_every_layer_gets_the_same_smaller_width_and_the_weights_fit_it() -> None:
    model = prune(random_weights(), Options(keep=0.6, multiple=32))
    assert isinstance(model.arch, Architecture)
    assert model.arch == replace(ARCH, inner=128)
    for name, role in roles(model.arch).items():
        found = model.weights.linear(name) if role.is_linear else None
        if found is not None:
            assert dense_weight(found).shape == role.shape
    assert model.arch.parameters == ARCH.parameters - 2 * 3 * 64 * ARCH.width


def test_biases_of_the_channels_that_stay_stay_with_them() -> None:
    arch = replace(ARCH, mlp_bias=True)
    weights = random_weights(arch)
    model = prune(weights, Options(keep=0.67, compensate=False), arch)
    gate, before = model.weights.linear("layers.0.gate"), weights.linear("layers.0.gate")
    assert gate.bias is not None
    assert before.bias is not None
    for row, bias in zip(dense_weight(gate), gate.bias, strict=True):
        (place,) = np.flatnonzero((dense_weight(before) == row).all(axis=1))
        assert before.bias[place] == bias
    assert model.weights.linear("layers.0.down").bias is weights.linear("layers.0.down").bias


def resembling(noise: float) -> MemoryWeights:
    """The second half of the channels is like the first, and counts less."""
    weights, rng = random_weights(), np.random.default_rng(7)
    for layer in range(ARCH.layers):
        for part in ("gate", "up"):
            role = f"layers.{layer}.{part}"
            weight = dense_weight(weights.linear(role)).copy()
            weight[96:] = weight[:96] + noise * weight.std() * rng.standard_normal((96, ARCH.width))
            weights.change(role, weight)
        role = f"layers.{layer}.down"
        factor = np.repeat(np.array([3, 0.2], np.float32), 96)
        weights.change(role, dense_weight(weights.linear(role)) * factor)
    return weights


def test_channels_that_repeat_others_are_made_up_for_entirely() -> None:
    weights = resembling(noise=0.0)
    options = Options(keep=0.5, multiple=96)
    bare = difference(prune(weights, replace(options, compensate=False)), weights)
    assert bare > 0.01
    assert difference(prune(weights, options), weights) < 1e-3 * bare


def test_compensation_lowers_the_error_on_text_it_has_not_seen() -> None:
    weights = resembling(noise=0.2)
    text = random_text(ARCH, count=40, seed=1)
    errors = []
    for compensate in (True, False):
        options = Options(keep=0.5, multiple=96, compensate=compensate)
        model = Model(arch=ARCH, weights=weights)
        errors.append(difference(make(options, ("*",)).apply(model, text, silent), weights))
    assert errors[0] < 0.7 * errors[1]


def test_a_channel_counts_by_what_it_says_and_not_by_its_weights_alone() -> None:
    weights = random_weights()
    gate = dense_weight(weights.linear("layers.0.gate")).copy()
    up = dense_weight(weights.linear("layers.0.up")).copy()
    down = dense_weight(weights.linear("layers.0.down")).copy()
    # Large in `down`, and hardly ever more than nothing before it.
    down[:, :64] *= 10
    gate[:64], up[:64] = gate[:64] * 1e-4, up[:64] * 1e-4
    for part, weight in (("gate", gate), ("up", up), ("down", down)):
        weights.change(f"layers.0.{part}", weight.astype(np.float32))
    model = prune(weights, Options(keep=2 / 3, compensate=False))
    kept = dense_weight(model.weights.linear("layers.0.gate"))
    assert np.array_equal(kept, gate[64:])


def test_both_backends_run_the_narrower_model(tmp_path: Path) -> None:
    model = prune(random_weights(), Options(keep=0.67))
    assert isinstance(model.arch, Architecture)
    assert_both_backends_run_it(model.arch, model.weights, tmp_path)


def test_what_cannot_be_narrowed_is_refused() -> None:
    with pytest.raises(PassError, match=r"leaves 192 of the 192 channels"):
        prune(random_weights(), Options(keep=0.9))
    mixed = replace(
        ARCH,
        kinds=(
            *ARCH.kinds,
            replace(ARCH.kinds[0], experts=Experts(count=2, chosen=1, inner=64, normalised=True)),
        ),
        pattern=(0, 1),
    )
    with pytest.raises(PassError, match="a layer has experts"):
        prune(random_weights(mixed), Options(), mixed)
    weights = random_weights()
    weights.linears["layers.1.up"] = quantise(
        weights.linears["layers.1.up"],  # type: ignore[arg-type]
        bits=4,
        group_size=64,
        symmetric=False,
    )
    with pytest.raises(PassError, match=r"layers\.1\.up: is a PackedLinear"):
        prune(weights, Options(keep=0.67))


def test_channels_that_are_infinite_are_refused_by_layer() -> None:
    weights = random_weights()
    weights.change("layers.1.up", dense_weight(weights.linear("layers.1.up")) * np.float32(1e38))
    with pytest.raises(PassError, match=r"layers\.1\.down: the inputs' second moment"):
        prune(weights, Options(keep=0.67))


def test_an_encoder_is_refused() -> None:
    arch = tiny_encoder()
    model = Model(arch=arch, weights=MemoryWeights(arch, RandomWeights(arch)))
    with pytest.raises(PassError, match="encoder"):
        make(Options(), ("*",)).apply(model, TEXT, silent)


@pytest.mark.parametrize("options", [{"keep": 0.0}, {"keep": 1.0}, {"multiple": 0}])
def test_options_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Options(**options)  # type: ignore[arg-type]


def test_some_layers_alone_cannot_be_narrowed() -> None:
    with pytest.raises(ConfigError, match="match"):
        make(Options(), ("layers.0.*",))
