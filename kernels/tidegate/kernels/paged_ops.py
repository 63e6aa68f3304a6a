"""`PagedOps`: the walk over the paged cache, by kernels or by the references that define them.

What may be fused is fused in here, and the walk does not know: a sum and the norm behind it; the
norms of query and key, the cut, the rotation and the write into the cache; weights that share
their input. Results lie in buffers that `Scratch` keeps, so a step allocates nothing and can be
captured as a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tidegate.kernels.device_weights import DeviceWeights, Product
from tidegate.kernels.kernel_set import Kernels
from tidegate.kernels.kv_write.rope_tables import RopeTables
from tidegate.kernels.linear.weights import GpuLinear, LowRankWeight
from tidegate.kernels.linear.workspace import LinearWorkspace
from tidegate.kernels.moe import MoeWorkspace
from tidegate.kernels.paged_kv import KvLayer, StepTensors
from tidegate.kernels.paged_values import Clip, Done, Norm, Sum, Value
from tidegate.kernels.pointwise.table import table_width
from tidegate.kernels.scratch import Scratch
from tidegate.model.architecture import Activation, AttentionSpec, Experts
from tidegate.model.ops import GatedMlp
from tidegate.model.packed import Array, Linear
from tidegate.model.rope import Rope

Tensor = torch.Tensor


class Group(Protocol):
    """Devices that each hold a part of every weight and run the same steps together."""

    def sum(self, partial: Tensor) -> Tensor:
        """The sum of what every device computed, in place."""

    def gather(self, logits: Tensor) -> Tensor:
        """Logits [rows, V] of which every device computed some columns, in order of rank."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Device:
    """What all steps of one model share."""

    kernels: Kernels
    weights: DeviceWeights
    layers: Sequence[KvLayer]
    """The cache of every layer."""
    scratch: Scratch
    ropes: Mapping[Rope, RopeTables]
    """Of every rotation that a layer has."""
    workspace_floats: int = 0
    """What attention needs between its segments; see `attention.workspace_floats`."""
    linear_workspace: LinearWorkspace | None = None
    moe_workspace: MoeWorkspace | None = None
    deterministic: bool = False
    """Sums in an order that does not depend on what else is in the step."""
    group: Group | None = None


class PagedOps:
    """One step of `tidegate.model.ops.Ops[Value]`; `TritonOps` when its kernels are Triton's."""

    def __init__(
        self,
        device: Device,
        step: StepTensors,
        wanted: Tensor,
        *,
        logits: Tensor | None = None,
    ) -> None:
        """Bind a step.

        Args:
            device: weights, cache and kernels.
            step: its tokens and where they go.
            wanted: int64 [rows], the tokens whose logits are asked for.
            logits: float32 [at least rows, V], where these go; None for a buffer of its own.
        """
        self._logits = logits
        self._device, self._step, self._wanted = device, step, wanted
        self._kernels, self._scratch = device.kernels, device.scratch

    def embed(self, table: Linear) -> Value:
        """See `Ops.embed`."""
        rows = self._device.weights.table(table)
        shape = (len(self._step.tokens), table_width(rows))
        out = self._scratch.take("stream", shape, self._device.weights.dtype)
        return Done(self._kernels.embed_rows(rows, self._step.tokens, out=out))

    def linears(self, x: Value, weights: Sequence[Linear]) -> list[Value]:
        """See `Ops.linears`; one product where the weights are merged."""
        numbers = self.numbers(x)
        product = self._device.weights.product(weights)
        if product is None:
            return [one for weight in weights for one in self.linears(Done(numbers), [weight])]
        whole = self._product(numbers, product)
        return [Done(part) for part in torch.split_with_sizes(whole, product.outputs, dim=-1)]

    def rms_norm(self, x: Value, weight: Array, eps: float) -> Value:
        """See `Ops.rms_norm`."""
        return Norm(x=x, weight=weight, eps=eps)

    def scale(self, x: Value, factor: float) -> Value:
        """See `Ops.scale`; in place, and nobody reads the value without it any more."""
        numbers = self.numbers(x)
        x.tensor = None
        return Done(self._kernels.adjust(numbers, factor=factor, out=numbers))

    def clip(self, x: Value, limit: float) -> Value:
        """See `Ops.clip`."""
        return Clip(x=x, limit=limit)

    def softcap(self, x: Value, cap: float) -> Value:
        """See `Ops.softcap`; in place, since nobody else has the logits."""
        numbers = self.numbers(x)
        return Done(self._kernels.adjust(numbers, cap=cap, out=numbers))

    def attention(self, q: Value, k: Value, v: Value, spec: AttentionSpec) -> Value:
        """See `Ops.attention`."""
        query, key, value = (_unfused(one, self.numbers) for one in (q, k, v))
        alike = query.clip == key.clip == value.clip and query.eps == key.eps
        if not alike or value.weight is not None:  # not what one kernel can do in its order
            query, key, value = (_Plain(numbers=self.numbers(one)) for one in (q, k, v))
        cache = self._device.layers[spec.layer]
        rotated = self._kernels.write_kv(
            _heads(query.numbers, spec.heads),
            _heads(key.numbers, spec.kv_heads),
            _heads(value.numbers, spec.kv_heads),
            cache,
            self._step,
            rope=None if spec.rope is None else self._device.ropes[spec.rope],
            q_norm=self._norm(query.weight),
            k_norm=self._norm(key.weight),
            eps=query.eps,
            clip=query.clip,
        )
        out = self._take("attended", len(rotated), spec.heads * spec.head_size, rotated)
        self._kernels.paged_attention(
            rotated,
            cache,
            self._step,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            workspace=self._scratch.take(
                "workspace", (self._device.workspace_floats,), torch.float32
            ),
            deterministic=self._device.deterministic,
            out=_heads(out, spec.heads),
        )
        return Done(out)

    def gated_mlp(self, x: Value, gate: Linear, up: Linear, down: Linear, act: Activation) -> Value:
        """See `Ops.gated_mlp`."""
        numbers = self.numbers(x)
        product = self._device.weights.product([gate, up])
        if product is None:
            gate_up = self._side_by_side(numbers, [gate, up])
        else:
            gate_up = self._product(numbers, product)
        out = self._take("act", len(gate_up), gate_up.shape[1] // 2, gate_up)
        (narrowed,) = self.linears(
            Done(self._kernels.gated_activation(gate_up, act, out=out)), [down]
        )
        return narrowed

    def moe(
        self,
        x: Value,
        router: Linear,
        expert: Callable[[int], GatedMlp],
        experts: Experts,
        act: Activation,
    ) -> Value:
        """See `Ops.moe`; the experts' weights lie together already."""
        numbers = self.numbers(x)
        (routed,) = self.linears(Done(numbers), [router])
        pairs = (len(numbers), experts.chosen)
        chosen, shares = self._kernels.route(
            self.numbers(routed),
            chosen=experts.chosen,
            normalised=experts.normalised,
            out=(
                self._scratch.take("chosen", pairs, torch.int32),
                self._scratch.take("shares", pairs, torch.float32),
            ),
        )
        weights = self._device.weights.experts(router)
        out = self._like("moe", numbers)
        mixed = self._kernels.moe(
            numbers,
            chosen,
            shares,
            weights,
            act,
            out=out,
            workspace=self._device.moe_workspace,
            deterministic=self._device.deterministic,
        )
        return Done(mixed if self._device.group is None else self._device.group.sum(mixed))

    def add(self, x: Value, y: Value) -> Value:
        """See `Ops.add`."""
        return Sum(x=x, y=y)

    def gather_rows(self, x: Value) -> Value:
        """See `Ops.gather_rows`; a sum is gathered before it is computed."""
        if isinstance(x, Sum) and x.tensor is None:
            return Sum(x=self.gather_rows(x.x), y=self.gather_rows(x.y))
        numbers = self.numbers(x)
        out = self._take("gathered", len(self._wanted), numbers.shape[1], numbers)
        return Done(self._kernels.gather_rows(numbers, self._wanted, out=out))

    def head(self, x: Value, table: Linear) -> Value:
        """See `Ops.head`; float32."""
        product = self._device.weights.product([table])
        assert product is not None, "one weight is always a product"
        part = self._apply(self.numbers(x), product.weight, "head")
        group = self._device.group
        whole = part if group is None else group.gather(part)
        if self._logits is None:
            shape = (whole.shape[0], whole.shape[1])
            return Done(self._scratch.take("logits", shape, torch.float32).copy_(whole))
        return Done(self._logits[: len(whole)].copy_(whole))

    def numbers(self, value: Value) -> Tensor:
        """Compute a value, unless it was."""
        if value.tensor is None:
            assert not isinstance(value, Done), "a term of a sum is read after the sum"
            value.tensor = self._compute(value)
        return value.tensor

    def _compute(self, value: Sum | Norm | Clip) -> Tensor:
        if isinstance(value, Sum):
            total = self.numbers(value.x).add_(self.numbers(value.y))
            value.x.tensor = None
            return total
        if isinstance(value, Clip):
            x = self.numbers(value.x)
            out = self._like(f"clipped {x.shape[1]}", x).copy_(x)
            return self._kernels.adjust(out, limit=value.limit, out=out)
        return self._normed(value)

    def _normed(self, value: Norm) -> Tensor:
        weight, inner = self._device.weights.norm(value.weight), value.x
        if not isinstance(inner, Sum) or inner.tensor is not None:
            x = self.numbers(inner)
            out = self._like("normed", x)
            return self._kernels.rms_norm(x, weight, value.eps, out=out)[0]
        x, y = self.numbers(inner.x), self.numbers(inner.y)
        out = self._like("normed", y)
        normed, inner.tensor = self._kernels.rms_norm(y, weight, value.eps, residual=x, out=out)
        inner.x.tensor = None
        return normed

    def _product(self, x: Tensor, product: Product) -> Tensor:
        result = self._apply(x, product.weight, product.purpose)
        if product.partial and self._device.group is not None:
            return self._device.group.sum(result)
        return result

    def _side_by_side(self, x: Tensor, weights: Sequence[Linear]) -> Tensor:
        """Products that are not merged, their outputs in one row: nothing is a part of a sum."""
        found = [self._device.weights.product([weight]) for weight in weights]
        products = [one for one in found if one is not None]
        assert len(products) == len(weights), "one weight is always a product"
        outputs = [one.weight.outputs for one in products]
        whole = self._take("+".join(one.purpose for one in products), len(x), sum(outputs), x)
        for one, out in zip(products, torch.split_with_sizes(whole, outputs, dim=-1), strict=True):
            self._apply(x, one.weight, one.purpose, out)
        return whole

    def _apply(
        self, x: Tensor, weight: GpuLinear, purpose: str, out: Tensor | None = None
    ) -> Tensor:
        if isinstance(weight, LowRankWeight):
            x, weight = self._apply(x, weight.first, purpose + ".first"), weight.second
        if out is None:
            out = self._take(purpose, len(x), weight.outputs, x)
        return self._kernels.linear(
            x,
            weight,
            out=out,
            deterministic=self._device.deterministic,
            workspace=self._device.linear_workspace,
        )

    def _norm(self, weight: Array | None) -> Tensor | None:
        return None if weight is None else self._device.weights.norm(weight)

    def _take(self, purpose: str, rows: int, width: int, like: Tensor) -> Tensor:
        return self._scratch.take(purpose, (rows, width), like.dtype)

    def _like(self, purpose: str, like: Tensor) -> Tensor:
        return self._take(purpose, like.shape[0], like.shape[1], like)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Plain:
    """Numbers, and the norm and the cut that they still lack, in this order."""

    numbers: Tensor
    weight: Array | None = None
    eps: float = 0.0
    clip: float | None = None


def _heads(x: Tensor, heads: int) -> Tensor:
    """[T, heads * H], whose rows may be parts of longer ones, as [T, heads, H]."""
    return x.view(x.shape[0], heads, -1)


def _unfused(value: Value, numbers: Callable[[Value], Tensor]) -> _Plain:
    clip = None
    if isinstance(value, Clip) and value.tensor is None:
        clip, value = value.limit, value.x
    if isinstance(value, Norm) and value.tensor is None:
        return _Plain(numbers=numbers(value.x), weight=value.weight, eps=value.eps, clip=clip)
    return _Plain(numbers=numbers(value), clip=clip)
