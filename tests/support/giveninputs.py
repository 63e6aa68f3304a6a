"""A block of given layers and `BlockData` over given inputs, for passes that run nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from tidegate.converters.passes.base import Block
from tidegate.model.packed import DenseLinear, Linear
from tidegate.model.recipe import Format


def given_block(linears: Mapping[str, Linear], *, name: str = "layers.0") -> Block:
    """A block of nothing but linear layers."""
    return Block(
        name=name,
        layer=None if name == "embed" else 0,
        linears=dict(linears),
        vectors={},
        formats=dict.fromkeys(linears, Format()),
    )


def random_linear(outputs: int, inputs: int, *, seed: int = 0, bias: bool = False) -> DenseLinear:
    """Gaussian weights."""
    rng = np.random.default_rng(seed)
    return DenseLinear(
        weight=rng.standard_normal((outputs, inputs)).astype(np.float32),
        bias=rng.standard_normal(outputs).astype(np.float32) if bias else None,
    )


def uneven_inputs(inputs: int, *, seed: int = 0, tokens: int = 400) -> torch.Tensor:
    """Rows [tokens, inputs] whose columns differ in size and go together."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((inputs, inputs)) * rng.lognormal(0, 1, inputs)
    rows = rng.standard_normal((tokens, inputs)) @ mix
    return torch.from_numpy(rows.astype(np.float32))


class GivenInputs:
    """`BlockData` of rows [tokens, in] by role; a role without is one that no token reached."""

    def __init__(self, rows: Mapping[str, torch.Tensor]) -> None:
        self._rows = dict(rows)

    def rows(self, role: str) -> torch.Tensor:
        """See `BlockData.rows`."""
        if role not in self._rows:
            raise LookupError(f"no token reached {role}")
        return self._rows[role]

    def gram(self, role: str) -> torch.Tensor:
        """See `BlockData.gram`."""
        rows = self.rows(role)
        return rows.T @ rows / len(rows)

    def mean_square(self, role: str) -> torch.Tensor:
        """See `BlockData.mean_square`."""
        return self.rows(role).square().mean(dim=0)

    def mean_abs(self, role: str) -> torch.Tensor:
        """See `BlockData.mean_abs`."""
        return self.rows(role).abs().mean(dim=0)

    def peak(self, role: str) -> torch.Tensor:
        """See `BlockData.peak`."""
        return self.rows(role).abs().amax(dim=0)

    def inputs(self) -> Iterator[torch.Tensor]:
        """There is no block to run."""
        raise AssertionError

    def outputs(self) -> Iterator[torch.Tensor]:
        """There is no block to run."""
        raise AssertionError
