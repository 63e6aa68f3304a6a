"""`BatchedEncoderOps`: the encoder's walk on one device, all texts of a batch in each operation.

Tokens of all texts lie one after another, [T, width], so products, norms and the MLP see no
padding; only attention and the mean are computed on [B, S]. `TorchEncoderOps`, text by text, is the
definition that this is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, assert_never

import numpy as np
import torch
from torch.nn import functional

from tidegate.kernels.torch_ops import activate
from tidegate.model.architecture import Activation
from tidegate.model.encoder import EncoderArchitecture, Pooling
from tidegate.model.packed import Array, DenseLinear, Linear, dense_weight
from tidegate.model.roles import roles
from tidegate.model.walk import Weights

Tensor = torch.Tensor


class EncoderTensors:
    """`tidegate.model.walk.Weights` whose numbers lie on a device.

    What the walk gets for a role is a name without numbers: an array of the right shape and no
    memory, NaN wherever somebody looks. Its numbers are found by it.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with none."""
        self.device = device
        self.nbytes = 0
        """Of all numbers."""
        self._linears: dict[str, Linear] = {}
        self._vectors: dict[str, Array] = {}
        self._products: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._norms: dict[int, Tensor] = {}

    @classmethod
    def load(cls, arch: EncoderArchitecture, source: Weights, device: torch.device) -> Self:
        """Read every role of `arch` once, one at a time, as float32; `source` may then be closed.

        Raises:
            CheckpointError: a weight cannot be read, or is not finite.
        """
        found = cls(device)
        for role, expected in roles(arch).items():
            if expected.is_linear:
                linear = source.linear(role)
                bias = None if linear.bias is None else found._moved(linear.bias)
                name = DenseLinear(weight=np.broadcast_to(np.float32(np.nan), expected.shape))
                found._linears[role] = name
                found._products[id(name)] = found._moved(dense_weight(linear)), bias
            else:
                vector = source.vector(role)
                hollow = np.broadcast_to(np.float32(np.nan), vector.shape)
                found._vectors[role] = hollow
                found._norms[id(hollow)] = found._moved(vector)
        return found

    def linear(self, role: str) -> Linear:
        """See `Weights`; a name without numbers."""
        return self._linears[role]

    def vector(self, role: str) -> Array:
        """See `Weights`; a name without numbers."""
        return self._vectors[role]

    def product(self, linear: Linear) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in] and bias [out] of a layer, or a table and None."""
        return self._products[id(linear)]

    def norm(self, vector: Array) -> Tensor:
        """A norm's scale or shift [width]."""
        return self._norms[id(vector)]

    def _moved(self, values: Array) -> Tensor:
        # On a CPU the very memory that was read: nothing is copied.
        tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self.device)
        self.nbytes += tensor.nbytes
        return tensor


class BatchedEncoderOps:
    """One batch of `tidegate.model.ops.EncoderOps[Tensor]`."""

    def __init__(self, texts: Sequence[Sequence[int]], tensors: EncoderTensors) -> None:
        """Bind the token ids of each text, at least one token each."""
        lengths = np.array([len(text) for text in texts], np.int64)
        self._tensors, self._rows, self._longest = tensors, len(texts), int(lengths.max())
        at = tensors.device
        self._tokens = torch.from_numpy(np.concatenate([np.asarray(t) for t in texts])).to(at)
        places = np.concatenate([np.arange(length) for length in lengths])
        self._places = torch.from_numpy(places).to(at)
        self._lengths = torch.from_numpy(lengths).to(at)
        self._spots: Tensor | None = None
        self._seen: Tensor | None = None
        if int(lengths.min()) < self._longest:
            owners = np.repeat(np.arange(len(texts)), lengths)
            self._spots = torch.from_numpy(owners * self._longest + places).to(at)
            columns = torch.arange(self._longest, device=at)
            self._seen = (columns[None] < self._lengths[:, None])[:, None, None]

    def embed(self, table: Linear) -> Tensor:
        """See `CommonOps.embed`."""
        return self._tensors.product(table)[0][self._tokens]

    def positions(self, table: Linear) -> Tensor:
        """See `EncoderOps.positions`."""
        return self._tensors.product(table)[0][self._places]

    def token_types(self, table: Linear) -> Tensor:
        """See `EncoderOps.token_types`."""
        return self._tensors.product(table)[0][:1]

    def linears(self, x: Tensor, weights: Sequence[Linear]) -> list[Tensor]:
        """See `CommonOps.linears`."""
        return [functional.linear(x, *self._tensors.product(weight)) for weight in weights]

    def layer_norm(self, x: Tensor, weight: Array, bias: Array, eps: float) -> Tensor:
        """See `EncoderOps.layer_norm`."""
        scale, shift = self._tensors.norm(weight), self._tensors.norm(bias)
        return functional.layer_norm(x, scale.shape, scale, shift, eps)

    def full_attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
        """See `EncoderOps.full_attention`."""
        queries, keys, values = (
            self._padded(x).view(self._rows, self._longest, heads, -1).transpose(1, 2)
            for x in (q, k, v)
        )
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=self._seen, scale=scale
        )
        flat = mixed.transpose(1, 2).reshape(self._rows * self._longest, -1)
        return flat if self._spots is None else flat[self._spots]

    def mlp(self, x: Tensor, up: Linear, down: Linear, act: Activation) -> Tensor:
        """See `EncoderOps.mlp`."""
        (widened,) = self.linears(x, [up])
        (narrowed,) = self.linears(activate(widened, act), [down])
        return narrowed

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """See `CommonOps.add`."""
        return x + y

    def pool(self, x: Tensor, pooling: Pooling) -> Tensor:
        """See `EncoderOps.pool`."""
        match pooling:
            case "mean":
                texts = self._padded(x).view(self._rows, self._longest, -1)
                return texts.sum(dim=1) / self._lengths[:, None]
            case "cls":
                return x[self._places == 0]
            case _:
                assert_never(pooling)

    def _padded(self, x: Tensor) -> Tensor:
        """The rows of all texts at the same distance, zeros between, [B * S, width]."""
        if self._spots is None:
            return x
        padded = x.new_zeros(self._rows * self._longest, x.shape[1])
        padded[self._spots] = x
        return padded

    def activate(self, x: Tensor, act: Activation) -> Tensor:
        """See `EncoderOps.activate`."""
        return activate(x, act)

    def tanh(self, x: Tensor) -> Tensor:
        """See `EncoderOps.tanh`."""
        return torch.tanh(x)

    def unit(self, x: Tensor) -> Tensor:
        """See `EncoderOps.unit`."""
        return functional.normalize(x, dim=-1)
