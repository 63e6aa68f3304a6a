"""`Recipe`: what was done to a checkpoint's weights, pass by pass, as a bundle records it.

A recipe is written as TOML (docs/recipes.md) and read by the converter; it lies here because the
manifest holds it in full. Patterns are shell-style, over the roles of `tidegate.model.roles`:
`layers.*.down` is the down projection of every layer, `layers.[01].*` all of the first two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

Precision = Literal[4, 8, 32]
"""Bits per weight; 32 leaves the weight as float32."""

GroupSize = Literal[32, 64, 128]

Option = bool | int | float | str


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How a weight is stored."""

    bits: Precision = 4
    group_size: GroupSize | None = 64
    """Inputs that share a scale; None for a whole row."""
    symmetric: bool = False
    """No zero-points."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatRule:
    """The format of the linear layers and tables whose role matches one of the patterns."""

    match: tuple[str, ...]
    format: Format


@dataclass(frozen=True, kw_only=True, slots=True)
class PassSpec:
    """One step of a recipe."""

    kind: str
    """A name that `tidegate.converters.passes` knows, such as `gptq`."""
    match: tuple[str, ...] = ("*",)
    """Which roles it works on."""
    options: Mapping[str, Option]
    """The pass's own settings, all of them, defaults included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that was done, in order."""

    name: str
    formats: tuple[FormatRule, ...]
    """The first rule that matches a role decides; the last matches every role."""
    passes: tuple[PassSpec, ...]
    target_bpw: float | None = None
    """Bits per weight to meet by giving single layers more or fewer bits than their rule says."""


def matches(role: str, patterns: tuple[str, ...]) -> bool:
    """Whether a role matches one of the patterns."""
    return any(fnmatchcase(role, pattern) for pattern in patterns)


def format_of(recipe: Recipe, role: str) -> Format:
    """The format a recipe's rules give to a role, before any mixed precision."""
    for rule in recipe.formats:
        if matches(role, rule.match):
            return rule.format
    raise LookupError(f"no rule of recipe {recipe.name!r} matches {role!r}")
