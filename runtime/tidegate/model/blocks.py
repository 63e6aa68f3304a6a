"""Blocks: the pieces of a model that are in memory together, in the order of the walk.

`embed` holds the tables that are looked up, `layers.i` one layer, and `final` what comes after the
last: its norm, and the head or the pooler and classifier.
"""

from __future__ import annotations

from tidegate.model.registry import AnyArchitecture
from tidegate.model.roles import Role, layer_roles, roles

EMBED, FINAL = "embed", "final"

_EMBED_ROLES = ("embed", "positions", "token_types", "embed_norm", "embed_norm.bias")


def block_names(arch: AnyArchitecture) -> tuple[str, ...]:
    """The names of all blocks. An encoder without a pooler and a classifier has no `final`."""
    names = (EMBED, *(f"layers.{layer}" for layer in range(arch.layers)), FINAL)
    return tuple(name for name in names if block_roles(arch, name))


def block_of(role: str) -> str:
    """The block that a role is in."""
    if role.startswith("layers."):
        return ".".join(role.split(".")[:2])
    return EMBED if role in _EMBED_ROLES else FINAL


def layer_of(block: str) -> int | None:
    """The number of a block's layer; None for `embed` and `final`."""
    return int(block.removeprefix("layers.")) if block.startswith("layers.") else None


def block_roles(arch: AnyArchitecture, block: str) -> dict[str, Role]:
    """The roles of one block, in the order of the walk."""
    layer = layer_of(block)
    if layer is not None:
        return layer_roles(arch, layer)
    return {name: role for name, role in roles(arch).items() if block_of(name) == block}


def linear_roles(arch: AnyArchitecture) -> dict[str, Role]:
    """Every linear layer and table of a model."""
    return {name: role for name, role in roles(arch).items() if role.is_linear}
