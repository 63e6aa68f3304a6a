"""What a recipe's weights will take, before anything is read of the checkpoint but its config."""

from __future__ import annotations

from math import prod

from tidegate.model.recipe import Recipe, format_of
from tidegate.model.registry import AnyArchitecture
from tidegate.model.roles import Role, roles

_SCALE_BITS = 16


def planned_bytes(arch: AnyArchitecture, recipe: Recipe) -> int:
    """Bytes of all weights with their scales and zero-points, to a few percent.

    Passes that take weights away are not foreseen.
    """
    bits = 0.0
    for name, role in roles(arch).items():
        if not role.is_linear:
            bits += 32 * prod(role.shape)
        elif recipe.target_bpw is not None:
            bits += recipe.target_bpw * prod(role.shape)
        else:
            bits += _linear_bits(role, recipe, name)
    return int(bits / 8)


def _linear_bits(role: Role, recipe: Recipe, name: str) -> float:
    wanted = format_of(recipe, name)
    values = prod(role.shape) * wanted.bits
    if wanted.bits == 32:
        return values
    outputs, inputs = role.shape
    groups = outputs * -(-inputs // (wanted.group_size or inputs))
    return values + groups * (_SCALE_BITS + (0 if wanted.symmetric else wanted.bits))
