"""Finds the module of an architecture: `architectures/<model_type>.py`, and nothing else to edit.

A module is found by its name, described by `ArchitectureModule`, and tells where in a checkpoint
each role's numbers lie. `docs/architectures.md` adds one step by step.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

from tidegate.errors import CheckpointError
from tidegate.model.architecture import Architecture
from tidegate.model.config import Config
from tidegate.model.encoder import EncoderArchitecture

AnyArchitecture = Architecture | EncoderArchitecture


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where the numbers of one role lie in a checkpoint."""

    tensor: str
    """Full name, such as `model.layers.0.self_attn.qkv_proj.weight`."""
    rows: tuple[int, int] | None = None
    """Rows of a tensor (and of its bias) that holds several roles, one above the other; or of one
    that holds a single role and more rows than the model is to use."""
    index: int | None = None
    """Place in a tensor [E, out, in] that holds all experts."""
    bias: str | None = None
    """Full name of the bias; None when the layer has none."""
    plus: float = 0.0
    """Added to every number: Gemma keeps norms as their difference from 1."""


class ArchitectureModule(Protocol):
    """What a module in `tidegate.model.architectures` provides."""

    def describe(self, config: Config, context: int | None = None) -> AnyArchitecture:
        """Read a Hugging Face config; raise `CheckpointError` naming a key it cannot honour.

        Args:
            config: the parsed `config.json`; for an encoder, `sentence_transformers` holds what
                the files of that library beside it say.
            context: positions to serve, None for what the model was trained for.
        """

    def sources(self, arch: AnyArchitecture, present: Collection[str]) -> Mapping[str, Source]:
        """Where each of `tidegate.model.roles.roles(arch)` lies.

        Args:
            arch: what `describe` gave.
            present: names of all tensors of the checkpoint, for models saved in several layouts.
        """


def known_model_types() -> tuple[str, ...]:
    """Every `model_type` that has a module, sorted."""
    package = importlib.import_module("tidegate.model.architectures")
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__)))


def architecture_module(model_type: str) -> ArchitectureModule:
    """The module of `model_type`; `CheckpointError` lists the known ones when there is none."""
    if model_type not in known_model_types():
        known = ", ".join(known_model_types())
        raise CheckpointError(f"config.json: model_type = {model_type!r}: must be one of {known}")
    module = importlib.import_module(f"tidegate.model.architectures.{model_type}")
    return cast(ArchitectureModule, module)


def describe(config: Config, context: int | None = None) -> AnyArchitecture:
    """Read a Hugging Face `config.json` that has been parsed to a mapping.

    Raises:
        CheckpointError: `model_type` is missing or unknown, or a key has a value that the
            architecture's module cannot honour; the message names the key.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"config.json: model_type = {model_type!r}: must be a string")
    return architecture_module(model_type).describe(config, context)
