"""Low rank: a linear layer becomes two thinner ones, chosen for the inputs it really gets.

With the inputs' second moment `G = L L^T` (Cholesky), the error `E |(W - V) x|^2` is
`|(W - V) L|_F^2`; so the best V of rank r is the truncated SVD of `W L`, times `L^-1` (Eckart &
Young 1936; SVD-LLM, Wang et al. 2024, arXiv:2403.07378). `first` is [rank, in] and `second`
[out, rank]; the singular values are shared evenly between the two, so that both quantise well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tidegate.converters.passes.base import Block, BlockData, PassError
from tidegate.converters.pruning.pruning import dense_roles
from tidegate.converters.rounding.moments import cholesky
from tidegate.errors import ConfigError
from tidegate.model.packed import Array, DenseLinear, LowRankLinear
from tidegate.model.registry import AnyArchitecture

NEEDS_DATA = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """At most one of `rank`, `ratio` and `energy` is given; without any, ratio = 0.5."""

    rank: int = 0
    """Columns between the two layers."""
    ratio: float = 0.0
    """Most weights that are left, as a share of the layer's."""
    energy: float = 0.0
    """Least share of the squared singular values of `W L` that is left, so of the output."""
    multiple: int = 32
    """What a rank from ratio (down) or energy (up) is rounded to: groups that fill."""

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "ratio", "energy") if getattr(self, name) != 0]
        if len(given) > 1:
            raise ConfigError(" and ".join(given), "both", "only one of rank, ratio and energy")
        if self.rank < 0:
            raise ConfigError("rank", self.rank, "at least 1")
        for name in ("ratio", "energy"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "above 0 and below 1")
        if self.multiple < 1:
            raise ConfigError("multiple", self.multiple, "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """`BlockPass` of kind `low_rank`."""

    options: Options
    match: tuple[str, ...]

    def apply(self, block: Block, arch: AnyArchitecture, data: BlockData | None) -> None:
        """See `BlockPass.apply`."""
        assert data is not None
        roles = dense_roles(block, self.match)
        # One Gram matrix at a time, each from before the first change.
        found: dict[str, LowRankLinear] = {}
        for role in roles:
            try:
                gram = data.gram(role)
            except LookupError as error:
                block.notes[role] = f"left as it is: {error}"
                continue
            linear = block.linears[role]
            assert isinstance(linear, DenseLinear)
            try:
                factors = factorise(linear, gram, self.options)
            except ArithmeticError as error:
                raise PassError(f"{role}: {error}") from error
            rank = factors.first.outputs
            if rank * (linear.inputs + linear.outputs) >= linear.inputs * linear.outputs:
                block.notes[role] = f"left as it is: rank {rank} would not make it smaller"
                continue
            found[role] = factors
        block.linears.update(found)


def make(options: Options, match: tuple[str, ...]) -> LowRank:
    """See `tidegate.converters.passes.base.PassModule.make`."""
    return LowRank(options=options, match=match)


def factorise(linear: DenseLinear, gram: torch.Tensor, options: Options) -> LowRankLinear:
    """The best product of two layers for inputs with the second moment `gram` [in, in].

    Raises:
        ArithmeticError: `gram` is not positive, as with infinite inputs.
    """
    lower = cholesky(gram)
    weight = torch.from_numpy(linear.weight).double()
    left, values, right = torch.linalg.svd(weight @ lower, full_matrices=False)
    rank = chosen_rank(values, (linear.outputs, linear.inputs), options)
    root = values[:rank].sqrt()
    # right @ L^-1, without the inverse.
    first = torch.linalg.solve_triangular(lower, right[:rank], upper=False, left=False)
    return LowRankLinear(
        first=DenseLinear(weight=_float32(root[:, None] * first)),
        second=DenseLinear(weight=_float32(left[:, :rank] * root), bias=linear.bias),
    )


def chosen_rank(values: torch.Tensor, shape: tuple[int, int], options: Options) -> int:
    """The rank that the options ask for, from 1 to all of the singular values."""
    outputs, inputs = shape
    if options.rank:
        return min(options.rank, len(values))
    if options.energy:
        kept = values.square().cumsum(0) / values.square().sum()
        rank = int((kept < options.energy).sum()) + 1
        return min(-(-rank // options.multiple) * options.multiple, len(values))
    share = options.ratio or 0.5
    rank = int(share * outputs * inputs / (outputs + inputs))
    return max(rank // options.multiple * options.multiple, 1)


def _float32(values: torch.Tensor) -> Array:
    return np.ascontiguousarray(values.numpy(), np.float32)
