"""Mixed precision: bits and group size of every weight, so that a budget costs the least quality.

What a weight costs is measured (`rounding.sensitivity`); formats are then chosen by
`rounding.allocation`. A weight may get 4 or 8 bits in groups of 32, 64 or 128, with
zero-points or without unless its rule says symmetric, or stay as its rule says; weights that a rule
leaves in float32 stay so and count with 32 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import product

from tidegate.converters.passes.base import CalibrationText, Model, Progress
from tidegate.converters.rounding.allocation import Choice, allocate
from tidegate.converters.rounding.sensitivity import measure
from tidegate.errors import ConversionError
from tidegate.model.architecture import Architecture
from tidegate.model.blocks import linear_roles
from tidegate.model.recipe import Format, GroupSize, Precision, Recipe, format_of, matches

_FEEDING = ("gptq", "scale_estimation")
_PACKERS = (*_FEEDING, "clip", "rtn")

_BITS: tuple[Precision, ...] = (4, 8)
_GROUP_SIZES: tuple[GroupSize, ...] = (32, 64, 128)


def plan(
    model: Model, recipe: Recipe, text: CalibrationText | None, progress: Progress
) -> Mapping[str, Format]:
    """The format of every linear layer and table, within `recipe.target_bpw` bits per weight.

    Bits are those of values, float16 scales and packed zero-points, over the number of weights.

    Raises:
        ConversionError: the model is no decoder, or no mixture of formats meets the target.
    """
    arch = model.arch
    assert recipe.target_bpw is not None
    assert text is not None
    if not isinstance(arch, Architecture):
        raise ConversionError(
            f"target_bpw = {recipe.target_bpw}: only a decoder's formats can be mixed, not those "
            f"of {arch.model_type}"
        )
    shapes = {role: _pair(found.shape) for role, found in linear_roles(arch).items()}
    rules = {role: format_of(recipe, role) for role in shapes}
    candidates = {role: _candidates(rules[role]) for role in shapes}
    losses = measure(model, candidates, _fed(recipe, shapes), text, progress)
    items = [
        [Choice(bits=stored_bits(shapes[role], one), loss=losses[role][one]) for one in options]
        for role, options in candidates.items()
    ]
    weights = sum(outputs * inputs for outputs, inputs in shapes.values())
    try:
        chosen = allocate(items, int(recipe.target_bpw * weights))
    except ValueError as error:
        least = sum(min(option.bits for option in options) for options in items) / weights
        raise ConversionError(
            f"target_bpw = {recipe.target_bpw}: must be at least {least:.3f} for this model"
        ) from error
    return {
        role: options[number]
        for (role, options), number in zip(candidates.items(), chosen, strict=True)
    }


def stored_bits(shape: tuple[int, int], wanted: Format) -> int:
    """Bits of a weight [out, in] as a bundle stores it, padding of the last group included."""
    outputs, inputs = shape
    if wanted.bits == 32:
        return outputs * inputs * 32
    size = wanted.group_size or inputs
    groups = -(-inputs // size)
    zeros = 0 if wanted.symmetric else 8 * -(-groups * wanted.bits // 8)
    return outputs * (groups * (8 * -(-size * wanted.bits // 8) + 16) + zeros)


def _candidates(rule: Format) -> tuple[Format, ...]:
    """What a weight may get, its rule's own format first."""
    if rule.bits == 32:
        return (rule,)
    mixed = (
        Format(bits=bits, group_size=size, symmetric=symmetric)
        for bits, size, symmetric in product(_BITS, _GROUP_SIZES, (rule.symmetric, True))
    )
    return tuple(dict.fromkeys((rule, *mixed)))


def _fed(recipe: Recipe, roles: Collection[str]) -> set[str]:
    """The roles that the recipe's first pass to pack them rounds with feedback."""
    return {role for role in roles if _is_fed(recipe, role)}


def _is_fed(recipe: Recipe, role: str) -> bool:
    for one in recipe.passes:
        if one.kind in _PACKERS and matches(role, one.match):
            feeds = one.options.get("rounding", "feedback") == "feedback"
            return one.kind in _FEEDING and feeds
    return False


def _pair(shape: tuple[int, ...]) -> tuple[int, int]:
    outputs, inputs = shape
    return outputs, inputs
