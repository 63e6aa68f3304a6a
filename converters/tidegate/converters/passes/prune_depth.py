"""Depth pruning: whole layers that change the residual stream least are taken out.

A layer's importance is measured on text, either by how far it turns the stream (`cosine`: one less
the mean cosine between its input and output; ShortGPT, Men et al. 2024, arXiv:2403.03853), or by
what skipping it does to the next token (`kl`: mean divergence from the model as it was; layers are
then dropped one at a time and measured anew). What kind each remaining layer is stays with it; they
are numbered anew, and formats and later passes go by the new numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional

from tidegate.converters.passes.base import CalibrationText, Model, PassError, Progress
from tidegate.converters.training.sequences import (
    HeldLayer,
    Tokens,
    batched,
    embedded,
    log_probabilities,
    through,
)
from tidegate.errors import ConfigError
from tidegate.model.architecture import Architecture
from tidegate.model.packed import Array, Linear
from tidegate.model.roles import roles
from tidegate.model.walk import Weights

NEEDS_DATA = True

_BATCH_TOKENS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How many layers to drop, and by which measure."""

    drop: int = 1
    measure: Literal["cosine", "kl"] = "cosine"

    def __post_init__(self) -> None:
        if self.drop < 1:
            raise ConfigError("drop", self.drop, "at least 1")
        if self.measure not in ("cosine", "kl"):
            raise ConfigError("measure", self.measure, "cosine or kl")


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneDepth:
    """`ModelPass` of kind `prune_depth`."""

    options: Options

    def apply(self, model: Model, text: CalibrationText | None, progress: Progress) -> Model:
        """See `ModelPass.apply`."""
        assert text is not None
        arch = model.arch
        if not isinstance(arch, Architecture):
            raise PassError(f"{arch.model_type} is an encoder: only a decoder's layers are dropped")
        if self.options.drop >= arch.layers:
            raise PassError(f"drop = {self.options.drop}: the model has {arch.layers} layers")
        batches = batched(text.sequences, _BATCH_TOKENS)
        choose = _by_cosine if self.options.measure == "cosine" else _by_divergence
        kept = choose(arch, model.weights, batches, self.options.drop, progress)
        return without_layers(model, kept)


def make(options: Options, match: tuple[str, ...]) -> PruneDepth:
    """See `tidegate.converters.passes.base.PassModule.make`.

    Raises:
        ConfigError: `match` leaves roles out: a layer goes as a whole.
    """
    if match != ("*",):
        raise ConfigError("match", list(match), "absent: a layer is dropped as a whole")
    return PruneDepth(options=options)


def without_layers(model: Model, kept: Sequence[int]) -> Model:
    """A decoder of the layers `kept` of another, in that order; its weights are read from it."""
    arch = model.arch
    assert isinstance(arch, Architecture)
    kinds = sorted({arch.pattern[layer] for layer in kept}) if arch.pattern else [0]
    pattern = tuple(kinds.index(arch.pattern[layer]) for layer in kept) if arch.pattern else ()
    shorter = replace(
        arch,
        layers=len(kept),
        kinds=tuple(arch.kinds[kind] for kind in kinds),
        pattern=pattern,
    )
    renamed = _Renamed(model.weights, dict(enumerate(kept)))
    formats = {
        role: model.formats[renamed.original(role)]
        for role in roles(shorter)
        if renamed.original(role) in model.formats
    }
    return replace(model, arch=shorter, weights=renamed, formats=formats)


class _Renamed:
    """`Weights` of a model whose layers had other numbers."""

    def __init__(self, weights: Weights, originals: Mapping[int, int]) -> None:
        self._weights, self._originals = weights, originals

    def original(self, role: str) -> str:
        """The role in the model that it was."""
        if not role.startswith("layers."):
            return role
        _, number, part = role.split(".", 2)
        return f"layers.{self._originals[int(number)]}.{part}"

    def linear(self, role: str) -> Linear:
        return self._weights.linear(self.original(role))

    def vector(self, role: str) -> Array:
        return self._weights.vector(self.original(role))


def _by_cosine(
    arch: Architecture,
    weights: Weights,
    batches: Sequence[Sequence[Tokens]],
    drop: int,
    progress: Progress,
) -> list[int]:
    """The layers that stay; those that turn the residual stream least go."""
    streams = embedded(arch, weights, batches)
    turns = []
    for index in range(arch.layers):
        progress("prune_depth", index, arch.layers)
        after = through(arch, HeldLayer(arch, weights, index), index, batches, streams)
        pairs = zip(streams, after, strict=True)
        cosines = torch.cat([functional.cosine_similarity(x, y, dim=-1) for x, y in pairs])
        turns.append(1 - float(cosines.double().mean()))
        streams = after
    progress("prune_depth", arch.layers, arch.layers)
    gone = sorted(range(arch.layers), key=lambda index: turns[index])[:drop]
    return [index for index in range(arch.layers) if index not in gone]


def _by_divergence(
    arch: Architecture,
    weights: Weights,
    batches: Sequence[Sequence[Tokens]],
    drop: int,
    progress: Progress,
) -> list[int]:
    """The layers that stay; each round the one goes whose absence changes the logits least.

    Layers are read again for every candidate, so that one at a time is in memory.
    """
    kept, start = list(range(arch.layers)), embedded(arch, weights, batches)
    for done in range(drop):
        progress("prune_depth", done, drop)
        shorter = [[index for index in kept if index != candidate] for candidate in kept]
        losses = _divergences(arch, weights, batches, start, shorter)
        kept = shorter[losses.index(min(losses))]
    progress("prune_depth", drop, drop)
    return kept


def _divergences(
    arch: Architecture,
    weights: Weights,
    batches: Sequence[Sequence[Tokens]],
    start: Sequence[torch.Tensor],
    choices: Sequence[Sequence[int]],
) -> list[float]:
    """For each choice of layers, the mean KL divergence of the next token in nats from all."""
    totals = [0.0] * len(choices)
    for batch, x in zip(batches, start, strict=True):

        def said(
            kept: Sequence[int], batch: Sequence[Tokens] = batch, x: torch.Tensor = x
        ) -> torch.Tensor:
            for index in kept:
                (x,) = through(arch, HeldLayer(arch, weights, index), index, [batch], [x])
            return log_probabilities(arch, weights, batch, x)

        full = said(range(arch.layers))
        for number, kept in enumerate(choices):
            totals[number] += float((full.exp() * (full - said(kept))).sum(dtype=torch.float64))
    tokens = sum(len(x) for x in start)
    return [total / tokens for total in totals]
