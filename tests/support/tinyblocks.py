"""Blocks of small models and what calibration looks like inside them, all of it in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from tidegate.converters.passes.base import Block
from tidegate.kernels.torch_encoder_ops import TorchEncoderOps
from tidegate.kernels.torch_ops import TorchKv, TorchOps, TorchRow, WeightTensors
from tidegate.model.architecture import Activation, Architecture
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.packed import Array, Linear
from tidegate.model.recipe import Format
from tidegate.model.registry import AnyArchitecture
from tidegate.model.roles import layer_roles, roles
from tidegate.model.walk import Weights, encoder_layer, layer, logits

Inputs = dict[int, list[torch.Tensor]]


def tiny_encoder(activation: Activation = "gelu") -> EncoderArchitecture:
    """A BERT of one layer: 4 heads of 16."""
    return EncoderArchitecture(
        model_type="bert",
        layers=1,
        width=64,
        heads=4,
        inner=128,
        vocab=50,
        context=64,
        norm_eps=1e-12,
        activation=activation,
        token_types=2,
        pooling="mean",
    )


class BlockWeights:
    """`Weights` of a block as it is now."""

    def __init__(self, block: Block) -> None:
        self._block = block

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`."""
        return self._block.linears[role]

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        return self._block.vectors[role]


def layer_block(
    arch: AnyArchitecture,
    weights: Weights,
    layer_index: int,
    formats: Format | Mapping[str, Format],
) -> Block:
    """A layer's weights; one format for all its linear layers, or one for each role."""
    parts = layer_roles(arch, layer_index)
    linears = {name: weights.linear(name) for name, role in parts.items() if role.is_linear}
    if isinstance(formats, Format):
        formats = dict.fromkeys(linears, formats)
    return Block(
        name=f"layers.{layer_index}",
        layer=layer_index,
        linears=linears,
        vectors={name: weights.vector(name) for name, role in parts.items() if not role.is_linear},
        formats=formats,
    )


def final_block(arch: Architecture, weights: Weights, wanted: Format) -> Block:
    """The last norm and the head of a decoder that does not share its table."""
    assert "head" in roles(arch)
    return Block(
        name="final",
        layer=None,
        linears={"head": weights.linear("head")},
        vectors={"final_norm": weights.vector("final_norm")},
        formats={"head": wanted},
    )


class TinyData:
    """`BlockData` of a few sequences; the block runs again at every question."""

    def __init__(
        self, block: Block, arch: AnyArchitecture, sequences: Sequence[torch.Tensor]
    ) -> None:
        """Look into `block` with [tokens, width] rows of the residual stream."""
        self._block, self._arch, self._sequences = block, arch, sequences

    def rows(self, role: str) -> torch.Tensor:
        """See `BlockData.rows`."""
        found: Inputs = {}
        self._run(found)
        tensors = found.get(id(self._block.linears[role]))
        if not tensors:
            raise LookupError(role)
        return torch.cat(tensors)

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
        """See `BlockData.inputs`."""
        yield from self._sequences

    def outputs(self) -> Iterator[torch.Tensor]:
        """See `BlockData.outputs`."""
        yield self._run({})

    @torch.inference_mode()
    def _run(self, found: Inputs) -> torch.Tensor:
        torch.set_num_threads(1)
        x, weights, arch = torch.cat(list(self._sequences)), BlockWeights(self._block), self._arch
        lengths = [len(part) for part in self._sequences]
        if isinstance(arch, EncoderArchitecture):
            assert self._block.layer is not None
            texts = [[0] * length for length in lengths]
            encoder_ops = _RecordingEncoderOps(texts, WeightTensors())
            encoder_ops.found = found
            return encoder_layer(encoder_ops, arch, weights, x, self._block.layer)
        ops = _RecordingOps(_rows(lengths), _kv(arch, lengths), WeightTensors())
        ops.found = found
        if self._block.layer is None:
            return logits(ops, arch, weights, x)
        return layer(ops, arch, weights, x, self._block.layer)


def spiky_sequences(
    width: int, *, seed: int, count: int = 4, tokens: int = 24
) -> list[torch.Tensor]:
    """Rows whose inputs differ in size and go together, as those of trained models do."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((width // 4, width)) * rng.lognormal(0, 1, width)
    rows = rng.standard_normal((count, tokens, width // 4)) @ mix / np.sqrt(width)
    rows += 0.1 * rng.standard_normal(rows.shape)
    return list(torch.from_numpy(rows.astype(np.float32)))


class _RecordingOps(TorchOps):
    found: Inputs

    def linears(self, x: torch.Tensor, weights: Sequence[Linear]) -> list[torch.Tensor]:
        for weight in weights:
            self.found.setdefault(id(weight), []).append(x.clone())
        return super().linears(x, weights)

    def gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        return x


class _RecordingEncoderOps(TorchEncoderOps):
    found: Inputs

    def linears(self, x: torch.Tensor, weights: Sequence[Linear]) -> list[torch.Tensor]:
        for weight in weights:
            self.found.setdefault(id(weight), []).append(x.clone())
        return super().linears(x, weights)


def _rows(lengths: Sequence[int]) -> list[TorchRow]:
    return [
        TorchRow(tokens=(0,) * length, past=0, slot=slot) for slot, length in enumerate(lengths)
    ]


def _kv(arch: Architecture, lengths: Sequence[int]) -> TorchKv:
    return TorchKv.allocate(
        layers=arch.layers,
        slots=len(lengths),
        tokens=max(lengths),
        kv_heads=arch.kv_heads,
        head_size=arch.head_size,
    )
