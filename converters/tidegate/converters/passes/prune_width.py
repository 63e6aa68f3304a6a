"""Width pruning: channels inside the MLPs that say least are taken out, and the rest makes up.

A channel `h = act(gate(x)) * up(x)` counts by its mean magnitude on text times the norm of its
column of `down` (activation-aware, as in Minitron, Muralidharan et al. 2024, arXiv:2407.14679).
Every layer keeps the same number of channels, a whole number of quantisation groups. What the lost
channels gave is then put onto the kept ones by least squares: with the second moment G of h, `down`
becomes `W G[:, kept] G[kept, kept]^-1`. Layers are treated in order, each on what those before
it give after pruning.

The new `down` projections are held in memory (a third of the MLPs); gate and up are read on demand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from tidegate.converters.passes.base import CalibrationText, Model, PassError, Progress
from tidegate.converters.rounding.moments import cholesky
from tidegate.converters.training.sequences import HeldLayer, batched, embedded, through
from tidegate.errors import ConfigError
from tidegate.model.architecture import Architecture
from tidegate.model.packed import Array, DenseLinear, Linear
from tidegate.model.walk import Weights

NEEDS_DATA = True

_BATCH_TOKENS = 1024

_RIDGE = 1e-4
"""Of the mean diagonal, added to it, so that few tokens are not learned by heart."""

Channels = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How many channels stay."""

    keep: float = 0.75
    """Share of the inner width, rounded to a `multiple`."""
    multiple: int = 64
    """The new width is a whole number of these."""
    compensate: bool = True
    """Put what was lost onto the kept channels."""

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ConfigError("keep", self.keep, "above 0 and below 1")
        if self.multiple < 1:
            raise ConfigError("multiple", self.multiple, "at least 1")

    def inner(self, before: int) -> int:
        """The new inner width."""
        return max(round(before * self.keep / self.multiple), 1) * self.multiple


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneWidth:
    """`ModelPass` of kind `prune_width`."""

    options: Options

    def apply(self, model: Model, text: CalibrationText | None, progress: Progress) -> Model:
        """See `ModelPass.apply`."""
        assert text is not None
        arch = model.arch
        inner = _checked(arch, self.options)
        assert isinstance(arch, Architecture)
        narrow = replace(arch, inner=inner)
        weights = _Narrow(model.weights)
        batches = batched(text.sequences, _BATCH_TOKENS)
        streams = embedded(arch, model.weights, batches)
        for index in range(arch.layers):
            progress("prune_width", index, arch.layers)
            held = HeldLayer(arch, model.weights, index)
            role = f"layers.{index}.down"
            seen = _Channels(_dense(role, held.linear(role)), gram=self.options.compensate)
            through(arch, held, index, batches, streams, seen.observe)
            try:
                weights.keep(index, *seen.chosen(inner))
            except ArithmeticError as error:
                raise PassError(f"{role}: {error}") from error
            streams = through(narrow, HeldLayer(narrow, weights, index), index, batches, streams)
        progress("prune_width", arch.layers, arch.layers)
        return replace(model, arch=narrow, weights=weights)


def make(options: Options, match: tuple[str, ...]) -> PruneWidth:
    """See `tidegate.converters.passes.base.PassModule.make`.

    Raises:
        ConfigError: `match` leaves roles out: all layers have one inner width.
    """
    if match != ("*",):
        raise ConfigError("match", list(match), "absent: all layers share one inner width")
    return PruneWidth(options=options)


class _Channels:
    """What the channels of one layer's MLP do on text."""

    def __init__(self, down: DenseLinear, *, gram: bool) -> None:
        self._down, self._tokens = down, 0
        self._magnitude = torch.zeros(down.inputs, dtype=torch.float64)
        self._gram = torch.zeros(down.inputs, down.inputs) if gram else None

    def observe(self, linear: Linear, x: torch.Tensor) -> None:
        """Look at the inputs of `down`, and at no other layer's."""
        if linear is not self._down:
            return
        self._tokens += len(x)
        self._magnitude += x.abs().sum(dim=0, dtype=torch.float64)
        if self._gram is not None:
            self._gram.addmm_(x.T, x)

    def chosen(self, count: int) -> tuple[Channels, DenseLinear]:
        """The channels that stay, in order, and the projection from them."""
        weight = torch.from_numpy(self._down.weight)
        importance = self._magnitude / self._tokens * weight.norm(dim=0)
        kept = importance.argsort(descending=True, stable=True)[:count].sort().values
        if self._gram is None:
            narrow = weight[:, kept]
        else:
            moment = (self._gram / self._tokens).double()
            lower = cholesky(moment[kept][:, kept], _RIDGE)
            # Of the difference, so that a layer whose lost channels are silent stays as it is.
            lost = torch.ones(len(moment), dtype=torch.bool)
            lost[kept] = False
            given = moment[kept][:, lost] @ weight[:, lost].double().T
            narrow = weight[:, kept] + torch.cholesky_solve(given, lower).T.float()
        return kept.numpy(), DenseLinear(
            weight=np.ascontiguousarray(narrow.numpy()), bias=self._down.bias
        )


class _Narrow:
    """`Weights` with some channels of the MLPs taken out."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._kept: dict[str, Channels] = {}
        self._down: dict[str, DenseLinear] = {}

    def keep(self, index: int, kept: Channels, down: DenseLinear) -> None:
        """What stays of layer `index`."""
        self._down[f"layers.{index}.down"] = down
        for part in ("gate", "up"):
            self._kept[f"layers.{index}.{part}"] = kept

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`."""
        if role in self._down:
            return self._down[role]
        linear = self._weights.linear(role)
        if role not in self._kept:
            return linear
        dense, kept = _dense(role, linear), self._kept[role]
        bias = None if dense.bias is None else dense.bias[kept]
        return DenseLinear(weight=dense.weight[kept], bias=bias)

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        return self._weights.vector(role)


def _checked(arch: object, options: Options) -> int:
    """The new inner width of a model that can have one."""
    if not isinstance(arch, Architecture):
        raise PassError("only a decoder's MLPs are pruned, and this is an encoder")
    if any(arch.kind(index).experts is not None for index in range(arch.layers)):
        raise PassError("a layer has experts, whose widths are not pruned")
    inner = options.inner(arch.inner)
    if inner >= arch.inner:
        raise PassError(
            f"keep = {options.keep}, multiple = {options.multiple}: leaves {inner} of the "
            f"{arch.inner} channels: must take some out"
        )
    return inner


def _dense(role: str, linear: Linear) -> DenseLinear:
    if not isinstance(linear, DenseLinear):
        raise PassError(f"{role}: is a {type(linear).__name__}: channels come out of dense weights")
    return linear
