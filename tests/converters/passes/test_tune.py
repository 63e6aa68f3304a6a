"""Tuning: nearer to the checkpoint on text it has not seen, in the same format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tinyblocks import tiny_encoder
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.evaluation.measures import compare
from tidegate.converters.evaluation.reference import reference_logits
from tidegate.converters.passes import tune
from tidegate.converters.passes.base import CalibrationText, Model, PassError
from tidegate.converters.rounding.rtn import quantise
from tidegate.errors import ConfigError
from tidegate.model.architecture import Architecture
from tidegate.model.packed import DenseLinear, Linear, PackedLinear
from tidegate.model.roles import roles
from tidegate.model.walk import Weights

ARCH = replace(tiny_architecture(layers=1), vocab=40)
OPTIONS = tune.Options(steps=60, batch_tokens=512, place_rate=0.02, scale_rate=0.002)


def rounded(role: str, linear: DenseLinear) -> Linear:
    return quantise(linear, bits=8 if role == "embed" else 4, group_size=64, symmetric="o" in role)


def text(arch: Architecture = ARCH, *, seed: int = 0, count: int = 300) -> CalibrationText:
    rng = np.random.default_rng(seed)
    sequences = [tuple(int(t) for t in rng.integers(0, arch.vocab, 16)) for _ in range(count)]
    return CalibrationText(name="random", sha256="", sequences=tuple(sequences))


def packed_model(
    arch: Architecture = ARCH,
    quantise: Callable[[str, DenseLinear], Linear] = rounded,
) -> Model:
    reference = Model(arch=arch, weights=RandomWeights(arch, seed=1))
    return Model(
        arch=arch, weights=RandomWeights(arch, seed=1, quantise=quantise), reference=reference
    )


def nothing(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def divergence(arch: Architecture, one: Weights, other: Weights) -> float:
    sequences = text(arch, seed=9, count=40).sequences
    pairs = zip(
        reference_logits(arch, one, sequences),
        reference_logits(arch, other, sequences),
        strict=True,
    )
    return float(np.concatenate([compare(a, b, ()).kl for a, b in pairs]).mean())


def tuned(model: Model, options: tune.Options = OPTIONS, *match: str) -> Model:
    torch.set_num_threads(1)
    return tune.make(options, match or ("*",)).apply(model, text(model_arch(model)), nothing)


def model_arch(model: Model) -> Architecture:
    assert isinstance(model.arch, Architecture)
    return model.arch


def test_it_comes_nearer_to_the_checkpoint_and_keeps_the_format() -> None:
    model = packed_model()
    assert model.reference is not None
    result = tuned(model)
    before = divergence(ARCH, model.reference.weights, model.weights)
    after = divergence(ARCH, model.reference.weights, result.weights)
    assert after < 0.8 * before
    moved = 0
    for role, found in roles(ARCH).items():
        if not found.is_linear:
            continue
        old, new = model.weights.linear(role), result.weights.linear(role)
        assert isinstance(old, PackedLinear)
        assert isinstance(new, PackedLinear)
        assert (new.bits, new.group_size, new.inputs) == (old.bits, old.group_size, old.inputs)
        assert np.array_equal(new.scales, new.scales.astype(np.float16))
        assert new.zeros is old.zeros or np.array_equal(new.zeros, old.zeros)  # type: ignore[arg-type]
        moved += int((new.values != old.values).sum())
    assert moved > 0


def test_what_was_trained_is_what_is_stored() -> None:
    model = packed_model()
    student = tune._Student.of(ARCH, model, ("*",))
    with torch.no_grad():
        for layer in student.layers.values():
            layer.places.add_(torch.randn(layer.places.shape))
            layer.logs.add_(0.05 * torch.randn(layer.logs.shape))
        for norm in student.norms.values():
            norm.add_(0.05 * torch.randn(norm.shape))
        sequences = text().sequences
        trained = student.logits(sequences)
    stored = np.concatenate(list(reference_logits(ARCH, student.frozen(), sequences)))
    np.testing.assert_allclose(trained.numpy(), stored, atol=2e-4)


SHORT = replace(OPTIONS, steps=15)


def test_padding_stays_nothing() -> None:
    def padded(role: str, linear: DenseLinear) -> Linear:
        return quantise(linear, bits=4, group_size=128, symmetric=False)

    model = packed_model(quantise=padded)
    result = tuned(model, SHORT)
    down = result.weights.linear("layers.0.down")
    assert isinstance(down, PackedLinear)
    assert down is not model.weights.linear("layers.0.down")
    assert down.inputs == 192
    assert down.zeros is not None
    assert (down.integers()[:, 1, 64:] == down.zeros[:, 1, None]).all()


def test_only_what_matches_changes() -> None:
    model = packed_model()
    result = tuned(model, SHORT, "layers.0.[qk]")
    changed = {
        role
        for role, found in roles(ARCH).items()
        if found.is_linear and result.weights.linear(role) is not model.weights.linear(role)
    }
    assert changed == {"layers.0.q", "layers.0.k"}
    assert np.array_equal(result.weights.vector("final_norm"), model.weights.vector("final_norm"))


def test_the_same_seed_gives_the_same_bits() -> None:
    short = replace(OPTIONS, steps=5)
    one, other = (tuned(packed_model(), short).weights.linear("layers.0.up") for _ in range(2))
    assert isinstance(one, PackedLinear)
    assert isinstance(other, PackedLinear)
    assert np.array_equal(one.values, other.values)
    assert np.array_equal(one.scales, other.scales)


def test_a_model_that_does_not_get_better_is_left_as_it_was() -> None:
    model = packed_model()
    wild = replace(OPTIONS, steps=3, place_rate=1.0, scale_rate=1.0)
    assert tuned(model, wild) is model


def test_weights_that_are_not_packed_are_not_trained() -> None:
    with pytest.raises(PassError, match="behind a packer"):
        tuned(packed_model(quantise=lambda role, linear: linear))


def test_it_needs_a_checkpoint_and_a_decoder() -> None:
    with pytest.raises(PassError, match="needs the checkpoint"):
        tuned(replace(packed_model(), reference=None))
    arch = tiny_encoder()
    weights = RandomWeights(arch)
    model = Model(arch=arch, weights=weights, reference=Model(arch=arch, weights=weights))
    with pytest.raises(PassError, match="trains decoders"):
        tune.make(OPTIONS, ("*",)).apply(model, text(), nothing)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"batch_tokens": 1}, {"place_rate": -0.1}, {"scale_rate": 2.0}]
)
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        tune.Options(**wrong)  # type: ignore[arg-type]
