"""`TorchOps`: the walk on torch tensors, in plain operations. The definition of correct.

Rows of a step are packed, [T, width], whichever requests they belong to. Packed weights are
dequantised once to float32 and multiplied in float32, so what differs from another backend on the
same integers is that backend's arithmetic. Rotation and attention are spelled out per request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from tidegate.model.architecture import Activation, AttentionSpec, Rope
from tidegate.model.packed import Array, Linear, PackedLinear

Tensor = torch.Tensor


@dataclass(kw_only=True, eq=False)
class TorchKv:
    """Keys and values of a fixed number of slots: per layer [slots, tokens, K, H]."""

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def allocate(
        cls, *, layers: int, slots: int, tokens: int, kv_heads: int, head_size: int
    ) -> TorchKv:
        """Room for `slots` requests of `tokens` tokens each, all of it at once."""
        shape = (slots, tokens, kv_heads, head_size)
        return cls(
            keys=[torch.zeros(shape) for _ in range(layers)],
            values=[torch.zeros(shape) for _ in range(layers)],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchRow:
    """One request's part of a step: its `tokens` start at position `past` of slot `slot`."""

    tokens: tuple[int, ...]
    past: int
    slot: int
    wants_logits: bool = True


@dataclass(kw_only=True, eq=False)
class WeightTensors:
    """Weights as float32 tensors, dequantised on first use and kept, keyed by the object itself."""

    _tensors: dict[int, tuple[Linear, Tensor, Tensor | None]] = field(default_factory=dict)

    def get(self, linear: Linear) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in] and bias [out] of a layer."""
        entry = self._tensors.get(id(linear))
        if entry is None:
            dense = linear.dequantise() if isinstance(linear, PackedLinear) else linear.weight
            weight = torch.from_numpy(dense)
            bias = None if linear.bias is None else torch.from_numpy(linear.bias)
            entry = self._tensors[id(linear)] = (linear, weight, bias)
        return entry[1], entry[2]


def rope_table(positions: Tensor, head_size: int, rope: Rope) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, H / 2] of the angles at `positions` [T], computed in float64."""
    half = head_size // 2
    frequencies = rope.theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = (positions.to(torch.float64)[:, None] * frequencies)[:, None]
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate [T, heads, H], halves paired (Su et al. 2021, rotate-half form)."""
    cos, sin = table
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


class TorchOps:
    """One step of `tidegate.model.ops.Ops[Tensor]` over `rows`, writing their KV into `kv`."""

    def __init__(self, rows: Sequence[TorchRow], kv: TorchKv, tensors: WeightTensors) -> None:
        """Bind a step; `tensors` may be shared by all steps of one model."""
        self._rows, self._kv, self._tensors = rows, kv, tensors
        self._tokens = torch.tensor([token for row in rows for token in row.tokens])
        self._positions = torch.cat(
            [torch.arange(row.past, row.past + len(row.tokens)) for row in rows]
        )
        self._rope_tables: dict[tuple[int, Rope], tuple[Tensor, Tensor]] = {}

    def embed(self, table: Linear) -> Tensor:
        """See `Ops.embed`."""
        return self._tensors.get(table)[0][self._tokens]

    def linears(self, x: Tensor, weights: Sequence[Linear]) -> list[Tensor]:
        """See `Ops.linears`."""
        return [functional.linear(x, *self._tensors.get(weight)) for weight in weights]

    def rms_norm(self, x: Tensor, weight: Array, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        mean_square = x.pow(2).mean(dim=-1, keepdim=True)
        return x * torch.rsqrt(mean_square + eps) * torch.from_numpy(weight)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """See `Ops.attention`."""
        q = q.view(-1, spec.heads, spec.head_size)
        k, v = (x.view(-1, spec.kv_heads, spec.head_size) for x in (k, v))
        if spec.rope is not None:
            table = self._rope_table(spec.head_size, spec.rope)
            q, k = rotate(q, table), rotate(k, table)
        attended, start = [], 0
        for row in self._rows:
            part = slice(start, start + len(row.tokens))
            attended.append(self._attend(row, q[part], k[part], v[part], spec))
            start = part.stop
        return torch.cat(attended).flatten(1)

    def _rope_table(self, head_size: int, rope: Rope) -> tuple[Tensor, Tensor]:
        """The step's angles, computed by the first layer that needs them."""
        key = (head_size, rope)
        if key not in self._rope_tables:
            self._rope_tables[key] = rope_table(self._positions, head_size, rope)
        return self._rope_tables[key]

    def _attend(
        self, row: TorchRow, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Attend one request: q [T, N, H] over the slot's `past + T` keys; [T, N, H]."""
        end = row.past + len(row.tokens)
        keys, values = self._kv.keys[spec.layer][row.slot], self._kv.values[spec.layer][row.slot]
        keys[row.past : end], values[row.past : end] = k, v
        # Query heads of one key/value head side by side: [T, K, N / K, H].
        share = spec.heads // spec.kv_heads
        grouped = q.view(-1, spec.kv_heads, share, spec.head_size)
        scores = torch.einsum("tkgh,skh->kgts", grouped, keys[:end]) * spec.scale
        if len(row.tokens) > 1:
            future = torch.arange(end)[None] > torch.arange(row.past, end)[:, None]
            scores = scores.masked_fill(future, -torch.inf)
        mixed = torch.einsum("kgts,skh->tkgh", scores.softmax(dim=-1), values[:end])
        return mixed.flatten(1, 2)

    def gated_mlp(
        self, x: Tensor, gate: Linear, up: Linear, down: Linear, act: Activation
    ) -> Tensor:
        """See `Ops.gated_mlp`."""
        gated, widened = self.linears(x, [gate, up])
        (narrowed,) = self.linears(_activate(gated, act) * widened, [down])
        return narrowed

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Ops.add`."""
        return x + y

    def gather_rows(self, x: Tensor) -> Tensor:
        """Keep the last token of every row that wants logits."""
        ends = torch.tensor([len(row.tokens) for row in self._rows]).cumsum(0) - 1
        wanted = torch.tensor([row.wants_logits for row in self._rows], dtype=torch.bool)
        return x[ends[wanted]]

    def head(self, x: Tensor, table: Linear) -> Tensor:
        """See `Ops.head`."""
        (logits,) = self.linears(x, [table])
        return logits


def _activate(x: Tensor, act: Activation) -> Tensor:
    if act == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")
