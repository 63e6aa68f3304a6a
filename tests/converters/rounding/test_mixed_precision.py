"""Mixed precision: the budget is met as stored, and weights that matter get more bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tinyblocks import tiny_encoder
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.passes.base import CalibrationText, Model
from tidegate.converters.rounding import sensitivity
from tidegate.converters.rounding.mixed_precision import plan, stored_bits
from tidegate.converters.rounding.rtn import quantise
from tidegate.errors import ConversionError
from tidegate.model.architecture import Architecture
from tidegate.model.blocks import linear_roles
from tidegate.model.packed import Array, DenseLinear, Linear
from tidegate.model.recipe import Format, FormatRule, PassSpec, Recipe

ARCH = tiny_architecture(layers=2)
ROLES = linear_roles(ARCH)


def text(arch: Architecture = ARCH) -> CalibrationText:
    torch.set_num_threads(1)  # more cost time on matrices of this size
    rng = np.random.default_rng(0)
    sequences = [tuple(int(t) for t in rng.integers(0, arch.vocab, 40)) for _ in range(3)]
    return CalibrationText(name="random", sha256="", sequences=tuple(sequences))


def recipe(target_bpw: float, *rules: FormatRule) -> Recipe:
    rest = FormatRule(match=("*",), format=Format(bits=4, group_size=64))
    return Recipe(name="mixed", formats=(*rules, rest), passes=(), target_bpw=target_bpw)


def nothing(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


class Sensitive(RandomWeights):
    """Says the same for every layer, but the down projection of that one is hard to round.

    One value of each group is far larger, and what it multiplies as much smaller.
    """

    def __init__(self, layer: int) -> None:
        super().__init__(ARCH, seed=3)
        self.layer = layer

    def linear(self, role: str) -> Linear:
        found = super().linear(role)
        assert isinstance(found, DenseLinear)
        weight = found.weight.copy()
        if role == f"layers.{self.layer}.down":
            weight[:, ::32] *= 20
        elif role == f"layers.{self.layer}.up":
            weight[::32] /= 20
        return DenseLinear(weight=weight)


def bits_per_weight(formats: dict[str, Format]) -> float:
    """As stored, from packed weights."""
    bits = weights = 0
    for role, found in ROLES.items():
        one, outputs, inputs = formats[role], *found.shape
        weights += outputs * inputs
        assert one.bits != 32
        packed = quantise(
            DenseLinear(weight=np.ones((outputs, inputs), np.float32)),
            bits=one.bits,
            group_size=one.group_size,
            symmetric=one.symmetric,
        )
        bits += packed.nbytes * 8
    return bits / weights


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("target_bpw", [4.4, 4.8, 6.0])
def test_the_budget_is_met_and_used(target_bpw: float, symmetric: bool) -> None:
    rule = FormatRule(match=("*",), format=Format(bits=4, group_size=64, symmetric=symmetric))
    model = Model(arch=ARCH, weights=RandomWeights(ARCH))
    formats = dict(plan(model, recipe(target_bpw, rule), text(), nothing))
    assert set(formats) == set(ROLES)
    assert target_bpw - 0.3 < bits_per_weight(formats) <= target_bpw
    kinds = {one.symmetric for one in formats.values()}
    assert kinds == {True} if symmetric else False in kinds


def test_a_weight_that_is_hard_to_round_gets_8_bits() -> None:
    formats = plan(Model(arch=ARCH, weights=Sensitive(0)), recipe(5.2), text(), nothing)
    assert formats["layers.0.down"].bits == 8
    assert formats["layers.1.down"].bits == 4


def test_a_rule_of_32_bits_is_kept_and_counted() -> None:
    rule = FormatRule(match=("*.q",), format=Format(bits=32))
    model = Model(arch=ARCH, weights=RandomWeights(ARCH))
    formats = plan(model, recipe(8.0, rule), text(), nothing)
    assert formats["layers.0.q"].bits == 32
    weights = sum(np.prod(found.shape) for found in ROLES.values())
    bits = sum(
        stored_bits((found.shape[0], found.shape[1]), formats[role])
        for role, found in ROLES.items()
    )
    assert bits <= 8 * weights
    assert any(one.bits == 4 for one in formats.values())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("symmetric", [False, True])
def test_bits_are_counted_as_they_are_stored(
    bits: int, group_size: int | None, symmetric: bool
) -> None:
    wanted = Format(bits=bits, group_size=group_size, symmetric=symmetric)  # type: ignore[arg-type]
    weight: Array = np.ones((5, 200), np.float32)
    packed = quantise(
        DenseLinear(weight=weight),
        bits=bits,  # type: ignore[arg-type]
        group_size=group_size,
        symmetric=symmetric,
    )
    assert stored_bits((5, 200), wanted) == 8 * packed.nbytes


def test_measured_by_layer_the_same_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "MOST_MEASURED", 0)
    model = Model(arch=ARCH, weights=Sensitive(0))
    found = sensitivity.measure(model, {role: (Format(),) for role in ROLES}, (), text(), nothing)
    cost = {role: one[Format()] for role, one in found.items()}
    assert cost["layers.0.down"] > 3 * cost["layers.1.down"]
    assert all(one >= 0 for one in cost.values())


def test_the_cost_of_a_weight_is_the_divergence_it_causes() -> None:
    from tidegate.converters.evaluation.measures import compare
    from tidegate.converters.evaluation.reference import reference_logits

    class Rounded(RandomWeights):
        def linear(self, role: str) -> Linear:
            found = super().linear(role)
            assert isinstance(found, DenseLinear)
            if role != "layers.1.up":
                return found
            return quantise(found, bits=4, group_size=64, symmetric=False)

    sequences = text().sequences
    exact, rounded = (
        list(reference_logits(ARCH, weights, sequences))
        for weights in (RandomWeights(ARCH), Rounded(ARCH))
    )
    kl = np.concatenate(
        [compare(one, other, ()).kl for one, other in zip(exact, rounded, strict=True)]
    )
    wanted = {role: (Format(),) for role in ROLES}
    found = sensitivity.measure(
        Model(arch=ARCH, weights=RandomWeights(ARCH)), wanted, (), text(), nothing
    )
    assert found["layers.1.up"][Format()] == pytest.approx(float(kl.mean()), rel=1e-3)


def test_layers_that_are_rounded_with_feedback_cost_less_and_tables_do_not() -> None:
    model = Model(arch=ARCH, weights=RandomWeights(ARCH))
    wanted = {role: (Format(),) for role in ROLES}
    plain, fed = (sensitivity.measure(model, wanted, of, text(), nothing) for of in ((), ROLES))
    assert fed["embed"] == plain["embed"]
    layers = [role for role in ROLES if role.startswith("layers.")]
    assert sum(fed[role][Format()] for role in layers) < 0.8 * sum(
        plain[role][Format()] for role in layers
    )
    gptq = PassSpec(kind="gptq", match=("layers.*",), options={"damping": 0.01})
    more = [
        dict(plan(model, replace(recipe(4.8), passes=passes), text(), nothing))["embed"]
        for passes in ((), (gptq,))
    ]
    assert stored_bits((203, 128), more[1]) >= stored_bits((203, 128), more[0])


def test_an_impossible_target_is_refused_with_what_is_possible() -> None:
    model = Model(arch=ARCH, weights=RandomWeights(ARCH))
    with pytest.raises(ConversionError, match=r"target_bpw = 4\.01: must be at least 4\.1"):
        plan(model, recipe(4.01), text(), nothing)


def test_an_encoder_is_refused() -> None:
    arch = tiny_encoder()
    model = Model(arch=arch, weights=RandomWeights(arch))
    with pytest.raises(ConversionError, match="only a decoder"):
        plan(model, recipe(5.0), text(), nothing)


def test_experts_that_no_token_reached_have_a_cost_too() -> None:
    from tidegate.model.architecture import Experts

    experts = Experts(count=16, chosen=1, inner=32, normalised=True)
    arch = replace(ARCH, layers=1, kinds=(replace(ARCH.kinds[0], experts=experts),))
    model = Model(arch=arch, weights=RandomWeights(arch))
    few = CalibrationText(name="few", sha256="", sequences=((1, 2, 3),))
    formats = plan(model, recipe(4.6), few, nothing)
    assert set(formats) == set(linear_roles(arch))
