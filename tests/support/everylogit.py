"""The walk on torch in float32: what a backend's logits are held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from tidegate.engine.executor import Tokens
from tidegate.kernels.torch_ops import TorchKv, TorchOps, TorchRow, WeightTensors
from tidegate.model.architecture import Architecture
from tidegate.model.packed import Array, Linear
from tidegate.model.walk import Weights, decoder


class _EveryRow(TorchOps):
    """Keeps the logits of every token, and may round the inputs of linear layers to int8."""

    activation_group: int | None = None

    def gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """See `Ops.gather_rows`."""
        return x

    def linears(self, x: torch.Tensor, weights: Sequence[Linear]) -> list[torch.Tensor]:
        """See `Ops.linears`."""
        if self.activation_group is not None:
            x = _int8(x, self.activation_group)
        return super().linears(x, weights)


def reference_logits(
    arch: Architecture,
    weights: Weights,
    tokens: Tokens,
    *,
    activation_group: int | None = None,
) -> Array:
    """Logits [T, V] after every one of the tokens, from one pass over all of them.

    With `activation_group`, the input of every linear layer is first rounded to symmetric int8
    in groups of that many, as backends do that multiply integers.
    """
    kv = TorchKv.allocate(
        layers=arch.layers,
        slots=1,
        tokens=len(tokens),
        kv_heads=arch.kv_heads,
        head_size=arch.head_size,
    )
    row = TorchRow(tokens=tuple(tokens.tolist()), past=0, slot=0)
    # Threads cost more than they give on matrices of this size.
    torch.set_num_threads(1)
    ops = _EveryRow([row], kv, WeightTensors())
    ops.activation_group = activation_group
    with torch.inference_mode():
        return decoder(ops, arch, weights).numpy().astype(np.float32)


def _int8(x: torch.Tensor, group: int) -> torch.Tensor:
    padded = functional.pad(x, (0, -x.shape[1] % group)).view(x.shape[0], -1, group)
    scales = padded.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (torch.round(padded / scales) * scales).reshape(x.shape[0], -1)[:, : x.shape[1]]
