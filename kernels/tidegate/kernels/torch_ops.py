"""`TorchOps`: the walk on torch tensors, in plain operations. The definition of correct.

Rows of a step are packed, [T, width], whichever requests they belong to. Packed weights are
dequantised once to float32 and multiplied in float32, so what differs from another backend on the
same integers is that backend's arithmetic. Rotation and attention are spelled out per request.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import torch
from torch.nn import functional

from tidegate.model.architecture import Activation, AttentionSpec, Experts
from tidegate.model.ops import GatedMlp
from tidegate.model.packed import Array, Linear, dense_weight
from tidegate.model.rope import Rope

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
    logits: int = 1
    """How many of its last tokens' logits are wanted."""


@dataclass(kw_only=True, eq=False)
class WeightTensors:
    """Weights as float32 tensors, dequantised on first use and kept, keyed by the object itself."""

    _tensors: dict[int, tuple[Linear, Tensor, Tensor | None]] = field(default_factory=dict)

    def get(self, linear: Linear) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in] and bias [out] of a layer."""
        entry = self._tensors.get(id(linear))
        if entry is None:
            weight = torch.from_numpy(dense_weight(linear))
            bias = None if linear.bias is None else torch.from_numpy(linear.bias)
            entry = self._tensors[id(linear)] = (linear, weight, bias)
        return entry[1], entry[2]


def rope_table(positions: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, size / 2] at `positions` [T], computed in float64."""
    cos, sin = rope.tables(positions.numpy())
    return torch.from_numpy(cos).float()[:, None], torch.from_numpy(sin).float()[:, None]


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate [T, heads, H], halves paired (Su et al. 2021); what the table lacks passes through."""
    cos, sin = table
    half = cos.shape[-1]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)


def root_mean_square_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm over each run of `len(weight)` values of the last axis."""
    size = weight.shape[0]
    runs = x.view(*x.shape[:-1], x.shape[-1] // size, size)
    normal = runs * torch.rsqrt(runs.pow(2).mean(dim=-1, keepdim=True) + eps) * weight
    return normal.flatten(-2)


class TorchOps:
    """One step of `tidegate.model.ops.Ops[Tensor]` over `rows`, writing their KV into `kv`."""

    def __init__(self, rows: Sequence[TorchRow], kv: TorchKv, tensors: WeightTensors) -> None:
        """Bind a step; `tensors` may be shared by all steps of one model."""
        self._rows, self._kv, self._tensors = rows, kv, tensors
        self._tokens = torch.tensor([token for row in rows for token in row.tokens])
        self._positions = torch.cat(
            [torch.arange(row.past, row.past + len(row.tokens)) for row in rows]
        )
        self._rope_tables: dict[Rope, tuple[Tensor, Tensor]] = {}

    def embed(self, table: Linear) -> Tensor:
        """See `Ops.embed`."""
        return self._tensors.get(table)[0][self._tokens]

    def linears(self, x: Tensor, weights: Sequence[Linear]) -> list[Tensor]:
        """See `Ops.linears`."""
        return [functional.linear(x, *self._tensors.get(weight)) for weight in weights]

    def rms_norm(self, x: Tensor, weight: Array, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        return root_mean_square_norm(x, torch.from_numpy(weight), eps)

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """See `Ops.scale`."""
        return x * factor

    def clip(self, x: Tensor, limit: float) -> Tensor:
        """See `Ops.clip`."""
        return x.clamp(-limit, limit)

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """See `Ops.softcap`."""
        return cap * torch.tanh(x / cap)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """See `Ops.attention`."""
        q = q.view(-1, spec.heads, spec.head_size)
        k, v = (x.view(-1, spec.kv_heads, spec.head_size) for x in (k, v))
        if spec.rope is not None:
            table = self._rope_table(spec.rope)
            q, k = rotate(q, table), rotate(k, table)
        attended, start = [], 0
        for row in self._rows:
            part = slice(start, start + len(row.tokens))
            attended.append(self._attend(row, q[part], k[part], v[part], spec))
            start = part.stop
        return torch.cat(attended).flatten(1)

    def _rope_table(self, rope: Rope) -> tuple[Tensor, Tensor]:
        """The step's angles, computed by the first layer that needs them."""
        if rope not in self._rope_tables:
            self._rope_tables[rope] = rope_table(self._positions, rope)
        return self._rope_tables[rope]

    def _attend(
        self, row: TorchRow, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Attend one request: q [T, N, H] over the slot's `past + T` keys; [T, N, H]."""
        keys, values = self._remember(row, k, v, spec.layer)
        end = len(keys)
        # Query heads of one key/value head side by side: [T, K, N / K, H].
        share = spec.heads // spec.kv_heads
        grouped = q.view(-1, spec.kv_heads, share, spec.head_size)
        scores = torch.einsum("tkgh,skh->kgts", grouped, keys) * spec.scale
        if spec.softcap is not None:
            scores = self.softcap(scores, spec.softcap)
        if len(row.tokens) > 1 or spec.window is not None:
            scores = scores.masked_fill(_hidden(row.past, end, spec.window), -torch.inf)
        mixed = torch.einsum("kgts,skh->tkgh", scores.softmax(dim=-1), values)
        return mixed.flatten(1, 2)

    def _remember(self, row: TorchRow, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append to the cache; all of the request's keys and values, [past + T, K, H]."""
        end = row.past + len(row.tokens)
        keys, values = self._kv.keys[layer][row.slot], self._kv.values[layer][row.slot]
        keys[row.past : end], values[row.past : end] = k, v
        return keys[:end], values[:end]

    def gated_mlp(
        self, x: Tensor, gate: Linear, up: Linear, down: Linear, act: Activation
    ) -> Tensor:
        """See `Ops.gated_mlp`."""
        gated, widened = self.linears(x, [gate, up])
        (narrowed,) = self.linears(activate(gated, act) * widened, [down])
        return narrowed

    def moe(
        self,
        x: Tensor,
        router: Linear,
        expert: Callable[[int], GatedMlp],
        experts: Experts,
        act: Activation,
    ) -> Tensor:
        """See `Ops.moe`; an expert computes the tokens that chose it and no others."""
        (routed,) = self.linears(x, [router])
        shares, chosen = routed.softmax(dim=-1).topk(experts.chosen, dim=-1)
        if experts.normalised:
            shares = shares / shares.sum(dim=-1, keepdim=True)
        total = torch.zeros_like(x)
        for number in range(experts.count):
            weights = expert(number)
            tokens, place = (chosen == number).nonzero(as_tuple=True)
            if len(tokens):
                mixed = self.gated_mlp(x[tokens], weights.gate, weights.up, weights.down, act)
                total.index_add_(0, tokens, mixed * shares[tokens, place, None])
        return total

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Ops.add`."""
        return x + y

    def gather_rows(self, x: Tensor) -> Tensor:
        """Keep the last tokens of every row, as many as it wants logits of."""
        ends = itertools.accumulate(len(row.tokens) for row in self._rows)
        kept = [range(end - row.logits, end) for end, row in zip(ends, self._rows, strict=True)]
        return x[list(itertools.chain.from_iterable(kept))]

    def head(self, x: Tensor, table: Linear) -> Tensor:
        """See `Ops.head`."""
        (logits,) = self.linears(x, [table])
        return logits


def _hidden(past: int, end: int, window: int | None) -> Tensor:
    """Keys that the queries at positions `past` to `end` must not see, [end - past, end]."""
    queries, keys = torch.arange(past, end)[:, None], torch.arange(end)[None]
    hidden = keys > queries
    return hidden if window is None else hidden | (keys <= queries - window)


def activate(x: Tensor, act: Activation) -> Tensor:
    """The non-linearity `act`."""
    match act:
        case "silu":
            return functional.silu(x)
        case "relu":
            return functional.relu(x)
        case "gelu" | "gelu_tanh":
            return functional.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")
        case _:
            assert_never(act)
