"""`TorchModel`: a decoder whose weights are torch parameters, run by the same walk as any other.

The walk asks for weights as numpy arrays, by role, and `TorchOps` looks their tensors up by
identity; here that look-up gives parameters, so gradients reach them and there is no second
forward pass. A linear layer with a format is rounded on the way with the quantiser that packs it,
and the gradient passes straight through (Bengio et al. 2013, arXiv:1308.3432).

The whole model is in memory, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tidegate.converters.rounding.rtn import quantise
from tidegate.converters.training.sequences import SequenceOps, Tokens
from tidegate.kernels.torch_ops import Tensor, WeightTensors, root_mean_square_norm
from tidegate.model.architecture import Architecture
from tidegate.model.packed import Array, DenseLinear, Linear, dense_weight
from tidegate.model.recipe import Format
from tidegate.model.roles import roles
from tidegate.model.rope import Rope
from tidegate.model.walk import Weights, embed, layer, logits


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Said:
    """What a model makes of a batch."""

    hidden: tuple[Tensor, ...]
    """The residual stream behind every layer, [tokens, width]."""
    logits: Tensor
    """Of every token, [tokens, V]."""


class TorchModel:
    """Weights as parameters: `tidegate.model.walk.Weights`, and a forward pass to train."""

    def __init__(
        self,
        arch: Architecture,
        weights: Weights,
        *,
        trains: Callable[[str], bool],
        rounded: Mapping[str, Format] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Copy the weights into parameters.

        Args:
            arch: the model.
            weights: what to begin with; read once.
            trains: whether the weights of a role change; what is not dense never does.
            rounded: formats of the linear layers to round on the way, by role.
            device: where to compute; the CPU when None.
        """
        self.arch = arch
        self.device = device or torch.device("cpu")
        self._linears: dict[str, Linear] = {}
        self._vectors: dict[str, Array] = {}
        self._store = _Parameters(self.device)
        for name, role in roles(arch).items():
            if role.is_linear:
                linear = self._linears[name] = weights.linear(name)
                learns = trains(name) and isinstance(linear, DenseLinear)
                self._store.add_linear(linear, learns, (rounded or {}).get(name))
            else:
                vector = self._vectors[name] = weights.vector(name)
                self._store.add_vector(vector, trains(name))

    def linear(self, role: str) -> Linear:
        """The weight it began with: a name for its parameters."""
        return self._linears[role]

    def vector(self, role: str) -> Array:
        """The norm it began with: a name for its parameter."""
        return self._vectors[role]

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained."""
        return self._store.trained()

    def __call__(self, sequences: Sequence[Tokens]) -> Said:
        """Run whole sequences; rounded weights are rounded anew, once."""
        self._store.forget_rounded()
        ops = _Ops(sequences, self._store)
        hidden = []
        # Masks are made on the way.
        with self.device:
            x = embed(ops, self.arch, self)
            for index in range(self.arch.layers):
                x = layer(ops, self.arch, self, x, index)
                hidden.append(x)
            return Said(hidden=tuple(hidden), logits=logits(ops, self.arch, self, x))

    def trained(self) -> TrainedWeights:
        """The weights as they are now, not rounded."""
        return TrainedWeights(
            {role: self._store.now(linear) for role, linear in self._linears.items()},
            {role: self._store.vector_now(vector) for role, vector in self._vectors.items()},
        )


class TrainedWeights:
    """`tidegate.model.walk.Weights` in memory."""

    def __init__(self, linears: Mapping[str, Linear], vectors: Mapping[str, Array]) -> None:
        """Take both over."""
        self._linears, self._vectors = linears, vectors

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`."""
        return self._linears[role]

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        return self._vectors[role]


@dataclass(kw_only=True, eq=False)
class _Entry:
    weight: nn.Parameter
    bias: nn.Parameter | None
    rounded: Format | None
    cached: Tensor | None = None
    """The rounded weight of this step."""


class _Parameters(WeightTensors):
    """Parameters by the identity of the arrays they began as."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._entries: dict[int, _Entry] = {}
        self._norms: dict[int, nn.Parameter] = {}

    @property
    def device(self) -> torch.device:
        return self._device

    def add_linear(self, linear: Linear, learns: bool, rounded: Format | None) -> None:
        self._entries[id(linear)] = _Entry(
            weight=self._parameter(dense_weight(linear), learns),
            bias=None if linear.bias is None else self._parameter(linear.bias, learns),
            rounded=rounded if isinstance(linear, DenseLinear) else None,
        )

    def add_vector(self, vector: Array, learns: bool) -> None:
        self._norms[id(vector)] = self._parameter(vector, learns)

    def get(self, linear: Linear) -> tuple[Tensor, Tensor | None]:
        entry = self._entries[id(linear)]
        if entry.rounded is None or entry.rounded.bits == 32:
            return entry.weight, entry.bias
        if entry.cached is None:
            nearest = _rounded(entry.weight, entry.rounded)
            entry.cached = entry.weight + (nearest - entry.weight).detach()
        return entry.cached, entry.bias

    def norm(self, vector: Array) -> Tensor:
        return self._norms[id(vector)]

    def forget_rounded(self) -> None:
        for entry in self._entries.values():
            entry.cached = None

    def trained(self) -> list[nn.Parameter]:
        found = list(self._norms.values())
        for entry in self._entries.values():
            found += [entry.weight] if entry.bias is None else [entry.weight, entry.bias]
        return [parameter for parameter in found if parameter.requires_grad]

    def now(self, linear: Linear) -> Linear:
        entry = self._entries[id(linear)]
        if not entry.weight.requires_grad:
            return linear
        bias = None if entry.bias is None else _numpy(entry.bias)
        return DenseLinear(weight=_numpy(entry.weight), bias=bias)

    def vector_now(self, vector: Array) -> Array:
        parameter = self._norms[id(vector)]
        return _numpy(parameter) if parameter.requires_grad else vector

    def _parameter(self, values: Array, learns: bool) -> nn.Parameter:
        copied = torch.tensor(values, device=self._device)
        return nn.Parameter(copied, requires_grad=learns)


class _Ops(SequenceOps):
    """`SequenceOps` on parameters, wherever they lie."""

    def __init__(self, sequences: Sequence[Tokens], store: _Parameters) -> None:
        super().__init__(sequences, store)
        self._store = store
        self._tokens = self._tokens.to(store.device)

    def rms_norm(self, x: Tensor, weight: Array, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        return root_mean_square_norm(x, self._store.norm(weight), eps)

    def _rope_table(self, rope: Rope) -> tuple[Tensor, Tensor]:
        cos, sin = super()._rope_table(rope)
        return cos.to(self._store.device), sin.to(self._store.device)


def _rounded(weight: Tensor, wanted: Format) -> Tensor:
    """The weight as it will be packed."""
    assert wanted.bits != 32
    packed = quantise(
        DenseLinear(weight=_numpy(weight)),
        bits=wanted.bits,
        group_size=wanted.group_size,
        symmetric=wanted.symmetric,
    )
    return torch.from_numpy(packed.dequantise()).to(weight.device)


def _numpy(parameter: Tensor) -> Array:
    values: Array = parameter.detach().cpu().numpy().copy()
    return values
