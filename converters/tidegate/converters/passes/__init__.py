"""One module per pass, named as the `kind` that recipes give it.

This module finds them; importing it imports none, since most need torch.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard, cast

from tidegate.model.recipe import Option

if TYPE_CHECKING:
    from tidegate.converters.passes.base import BlockPass, ModelPass, PassModule

_PARTS_OF_A_PASS = ("Options", "NEEDS_DATA", "make")


def find_pass(kind: str) -> PassModule | None:
    """The module of a pass; None when there is none of that name."""
    if kind not in _module_names():
        return None
    module = importlib.import_module(f"{__name__}.{kind}")
    return cast("PassModule", module) if _is_pass(module) else None


def known_passes() -> tuple[str, ...]:
    """The names of all passes, sorted; imports them all."""
    return tuple(name for name in _module_names() if find_pass(name) is not None)


def make_pass(kind: str, options: Mapping[str, Option], match: tuple[str, ...]) -> AnyPass:
    """The pass `kind` with all its options, as a checked recipe has them."""
    module = find_pass(kind)
    assert module is not None, kind
    return module.make(module.Options(**options), match)


def is_block_pass(one: AnyPass) -> TypeGuard[BlockPass]:
    """Whether a pass works block by block."""
    return next(iter(inspect.signature(one.apply).parameters)) == "block"


def is_model_pass(one: AnyPass) -> TypeGuard[ModelPass]:
    """Whether a pass takes a whole model."""
    return not is_block_pass(one)


def _module_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def _is_pass(module: object) -> bool:
    return all(hasattr(module, part) for part in _PARTS_OF_A_PASS)


if TYPE_CHECKING:
    AnyPass = BlockPass | ModelPass
