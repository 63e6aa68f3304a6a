"""What a pass is: a small change to a model's weights, made block by block where it can be.

A pass of kind `name` is the module `passes/<name>.py`, which holds

    Options      a frozen dataclass of plain values, all with defaults, that checks itself and
                 raises `ConfigError`; a recipe's TOML sets them
    NEEDS_DATA   whether it looks at calibration data; options that have an attribute
                 `needs_data` decide it themselves (see `needs_data`)
    PACKS        whether it makes packed weights; may be left out when it does not
    make(options, match) -> BlockPass or ModelPass

A `BlockPass` sees one block at a time (the tables, one layer, the head), in the order of the walk,
and may replace its weights. A `ModelPass` gets the whole model, for what cannot be done in blocks:
another architecture, or training. Between passes weights lie on disk, not in memory. The two are
told apart by the name of what `apply` takes first, `block` or `model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tidegate.errors import ConversionError
from tidegate.model.packed import Array, Linear
from tidegate.model.recipe import Format
from tidegate.model.registry import AnyArchitecture
from tidegate.model.walk import Weights

if TYPE_CHECKING:  # a pass that looks at no data needs no torch
    import torch

Progress = Callable[[str, int, int], None]
"""Told (what, done, total) as the work goes on."""


class PassError(ConversionError):
    """A pass cannot be applied; names the pass, the tensor, why, and the passes before it."""


@dataclass(kw_only=True, eq=False)
class Block:
    """Weights that are in memory together. A pass replaces entries of `linears` and `vectors`.

    Blocks are `embed` (tables that are looked up), `layers.i`, and `final` (the last norm, the
    head or pooler). Keys are full roles, such as `layers.3.down`.
    """

    name: str
    layer: int | None
    """Number of the layer; None for `embed` and `final`."""
    linears: dict[str, Linear]
    vectors: dict[str, Array]
    formats: Mapping[str, Format]
    """How each linear layer will be stored, by role."""
    notes: dict[str, str] = field(default_factory=dict)
    """What a pass could not do and why, by role; printed at the end, never silent."""


class BlockData(Protocol):
    """What calibration text looks like inside a block; always of the block's present weights.

    Every method runs the block again if its weights changed since. Roles that share an input
    (q, k, v; gate and up) have the same statistics. A role that no calibration token reached (an
    expert) raises `LookupError`.
    """

    def rows(self, role: str) -> torch.Tensor:
        """A sample of the inputs of a linear layer, float32 [n, in], n a few hundred to thousand.

        The same tokens at every call, so that outputs before and after a change compare.
        """

    def gram(self, role: str) -> torch.Tensor:
        """`x.T @ x / tokens` of the layer's inputs, over all the text, float32 [in, in]."""

    def mean_square(self, role: str) -> torch.Tensor:
        """The diagonal of `gram`, without the cost of the rest, float32 [in]."""

    def mean_abs(self, role: str) -> torch.Tensor:
        """The mean magnitude of every input, float32 [in]."""

    def peak(self, role: str) -> torch.Tensor:
        """The largest magnitude of every input, float32 [in]."""

    def inputs(self) -> Iterator[torch.Tensor]:
        """The block's input, batch by batch, float32 [tokens, width]."""

    def outputs(self) -> Iterator[torch.Tensor]:
        """The block's output with its present weights, batch by batch, float32 [tokens, width]."""


class BlockPass(Protocol):
    """Changes one block."""

    def apply(self, block: Block, arch: AnyArchitecture, data: BlockData | None) -> None:
        """Replace what the pass changes; `data` is there when `NEEDS_DATA`.

        Raises:
            PassError: the block cannot be treated so.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A whole model: weights are read from disk when asked for."""

    arch: AnyArchitecture
    weights: Weights
    formats: Mapping[str, Format] = field(default_factory=dict)
    """How each linear layer will be stored, by role; a pass that trains for it needs them."""
    reference: Model | None = None
    """The checkpoint before any pass, for passes that train towards what it says."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationText:
    """Calibration text as tokens: a few dozen to hundreds of sequences."""

    name: str
    sha256: str
    sequences: tuple[tuple[int, ...], ...]
    all_sequences: tuple[tuple[int, ...], ...] = ()
    """Of a text that is longer, for passes that train; empty when `sequences` is all there is."""

    @property
    def training(self) -> tuple[tuple[int, ...], ...]:
        """All the text there is."""
        return self.all_sequences or self.sequences


class ModelPass(Protocol):
    """Changes a model as a whole."""

    def apply(self, model: Model, text: CalibrationText | None, progress: Progress) -> Model:
        """The changed model; its weights may be held in memory (small models) or read on demand.

        Raises:
            PassError: the model cannot be treated so.
        """


class PassModule(Protocol):
    """What a module in `tidegate.converters.passes` provides."""

    NEEDS_DATA: bool
    Options: type

    def make(self, options: object, match: tuple[str, ...]) -> BlockPass | ModelPass:
        """The pass with these options, for the roles that match one of the patterns."""


def needs_data(module: PassModule, options: object) -> bool:
    """Whether a pass with these options looks at calibration data."""
    return bool(getattr(options, "needs_data", module.NEEDS_DATA))
