"""`AdaptedTorchOps`: `TorchOps` whose rows may each have a LoRA adapter, several in one step.

A layer's output gains `(x @ a.T) @ b.T` for the tokens of the rows that have the adapter, and for
no others. The twin is the model with the adapter merged into its weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tidegate.kernels.torch_ops import Tensor, TorchKv, TorchOps, TorchRow, WeightTensors
from tidegate.model.lora import LowRank
from tidegate.model.packed import Linear


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class AdapterTensors:
    """One adapter in memory: (a [r, in], b [out, r]) by the identity of the layer's weight."""

    layers: Mapping[int, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, layers: Mapping[str, LowRank], linears: Mapping[str, Linear]) -> AdapterTensors:
        """Bind `layers` to the weights of their roles."""
        return cls(
            layers={
                id(linears[role]): (torch.from_numpy(one.a), torch.from_numpy(one.b))
                for role, one in layers.items()
            }
        )


class AdaptedTorchOps(TorchOps):
    """See the module."""

    def __init__(
        self,
        rows: Sequence[TorchRow],
        kv: TorchKv,
        tensors: WeightTensors,
        adapters: Sequence[AdapterTensors | None],
    ) -> None:
        """Bind a step.

        Args:
            rows: as for `TorchOps`.
            kv: as for `TorchOps`.
            tensors: as for `TorchOps`.
            adapters: of each row; None for the model alone.
        """
        super().__init__(rows, kv, tensors)
        self._adapters = adapters
        self._tokens_of = _places([len(row.tokens) for row in rows], adapters)

    def linears(self, x: Tensor, weights: Sequence[Linear]) -> list[Tensor]:
        """See `Ops.linears`."""
        found = super().linears(x, weights)
        for weight, out in zip(weights, found, strict=True):
            for adapter, places in self._tokens_of:
                pair = adapter.layers.get(id(weight))
                if pair is not None:
                    a, b = pair
                    out.index_add_(0, places, (x[places] @ a.T) @ b.T)
        return found

    def gather_rows(self, x: Tensor) -> Tensor:
        """See `Ops.gather_rows`; what follows has a row for each token that was kept."""
        kept = super().gather_rows(x)
        self._tokens_of = _places([row.logits for row in self._rows], self._adapters)
        return kept


def _places(
    lengths: Sequence[int], adapters: Sequence[AdapterTensors | None]
) -> list[tuple[AdapterTensors, Tensor]]:
    """Each adapter with the places of its tokens."""
    ends = itertools.accumulate(lengths)
    found: dict[int, tuple[AdapterTensors, list[int]]] = {}
    for end, length, adapter in zip(ends, lengths, adapters, strict=True):
        if adapter is not None:
            found.setdefault(id(adapter), (adapter, []))[1].extend(range(end - length, end))
    return [(adapter, torch.tensor(places)) for adapter, places in found.values() if places]
