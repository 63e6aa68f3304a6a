"""Paged attention: decode as a share of copy bandwidth, prefill in TFLOP/s beside torch's flash.

Shapes are those of Qwen3-8B (32 query heads on 8 of keys and values, 128 values each) in blocks of
16 tokens, scattered. What decode moves is the keys and values of all requests, read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from kernels.case import Bar, Case, Work, half_type, worst
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tidegate.kernels.attention import paged_attention, workspace_floats
from tidegate.kernels.attention.reference import attend, gather
from tidegate.kernels.kv_write.reference import quantised
from tidegate.kernels.paged_kv import KvLayer, KvPrecision, StepTensors

Tensor = torch.Tensor

N, K, H = 32, 8, 128
_BLOCK_TOKENS = 16
_ALLOWED = 2**-7
"""Two roundings of bf16: of the softmax's weights and of the result."""
_CHECKED = 32
"""Tokens at a request's end that are compared with float64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Requests of `new` tokens each, behind so many that they are `length` long by then."""

    requests: int
    new: int
    length: int
    precision: KvPrecision = "same"
    deterministic: bool = False

    @property
    def name(self) -> str:
        """Such as `32 x 4096 int8`."""
        words = [f"{self.requests} x {self.length}"]
        words += [self.precision] if self.precision != "same" else ["bf16"]
        return " ".join(words + (["deterministic"] if self.deterministic else []))

    @property
    def kv_bytes(self) -> int:
        """Of all keys and values, scales included."""
        per_head = 2 * H if self.precision == "same" else H + 4
        return self.requests * self.length * K * 2 * per_head

    @property
    def flops(self) -> int:
        """Of both products, for the pairs that a causal mask leaves."""
        past = self.length - self.new
        pairs = self.new * past + self.new * (self.new + 1) // 2
        return 4 * self.requests * N * H * pairs


def cases(quick: bool) -> Iterator[Case]:
    """Decode, 8-bit caches, the deterministic mode, prefill and a mixed step."""
    long, short = (300, 40) if quick else (131072, 4096)
    many = 3 if quick else 32
    of_copy = (Bar(kind="copy", at_least=0.88),)
    yield _decode(Shape(requests=many, new=1, length=short), bars=of_copy)
    yield _decode(Shape(requests=1, new=1, length=long), bars=of_copy)
    yield _decode(Shape(requests=4, new=1, length=short // 4))
    yield _decode(Shape(requests=1, new=1, length=short))
    yield _decode(Shape(requests=many, new=4, length=short))
    for precision, bars in (("int8", (Bar(kind="baseline", at_least=1.7),)), ("fp8", ())):
        shape = Shape(requests=many, new=1, length=short, precision=precision)  # type: ignore[arg-type]
        yield _beside(shape, Shape(requests=many, new=1, length=short), bars=bars)
    usual = Shape(requests=many, new=1, length=short)
    fixed = Shape(requests=many, new=1, length=short, deterministic=True)
    yield _beside(fixed, usual, bars=(Bar(kind="baseline", at_least=1 / 1.15),))
    fast = (Bar(kind="tflops", at_least=430.0), Bar(kind="baseline", at_least=1.0))
    for tokens in (24,) if quick else (8192, 16384):
        yield _prefill(Shape(requests=1, new=tokens, length=tokens), bars=fast)
    yield _prefill(Shape(requests=4, new=short // 2, length=short // 2), bars=())
    yield _prefill(Shape(requests=1, new=short // 2, length=4 * short), bars=())


def _decode(shape: Shape, bars: tuple[Bar, ...] = ()) -> Case:
    return Case(
        name=f"decode {shape.name}{f', {shape.new} tokens' if shape.new > 1 else ''}",
        make=partial(_work, shape, None),
        bytes_moved=shape.kv_bytes,
        baseline="torch attention over keys side by side",
        bars=bars,
    )


def _beside(shape: Shape, other: Shape, bars: tuple[Bar, ...]) -> Case:
    return Case(
        name=f"decode {shape.name}",
        make=partial(_work, shape, other),
        bytes_moved=shape.kv_bytes,
        baseline=f"this kernel, {other.name}",
        bars=bars,
    )


def _prefill(shape: Shape, bars: tuple[Bar, ...]) -> Case:
    kind = "prefill" if shape.new == shape.length else f"chunk of {shape.new} in"
    return Case(
        name=f"{kind} {shape.name}",
        make=partial(_work, shape, None),
        flops=shape.flops,
        baseline="torch flash attention over keys side by side" if bars else "torch attention",
        bars=bars,
    )


def _work(shape: Shape, other: Shape | None, device: torch.device) -> Work:
    run, error = _ours(shape, device)
    baseline = _torch(shape, device) if other is None else _ours(other, device)[0]
    return Work(run=run, baseline=baseline, error=error)


def _ours(shape: Shape, device: torch.device) -> tuple[Callable[[], object], Callable[[], float]]:
    dtype = half_type(device)
    step = step_of([shape.new] * shape.requests, [shape.length] * shape.requests, device)
    kv = filled(step, shape.precision, dtype)
    q = torch.randn(len(step.tokens), N, H, device=device).to(dtype)
    out = torch.empty_like(q)
    floats = workspace_floats(
        N,
        kv,
        dtype=dtype,
        most_requests=shape.requests,
        most_length=shape.length,
        deterministic=shape.deterministic,
    )
    workspace = torch.empty(floats, device=device)

    def run() -> Tensor:
        return paged_attention(
            q,
            kv,
            step,
            scale=H**-0.5,
            out=out,
            workspace=workspace,
            deterministic=shape.deterministic,
        )

    def error() -> float:
        """The last request's last tokens, as far as they are new."""
        out.fill_(torch.nan)
        tail = min(shape.new, _CHECKED)
        last = step.blocks[-1]
        pairs = ((kv.keys, kv.key_scales), (kv.values, kv.value_scales))
        keys, values = (gather(*pair, last, shape.length).double() for pair in pairs)
        exact = attend(
            q[-tail:].double(),
            keys,
            values,
            scale=H**-0.5,
            window=None,
            softcap=None,
            sinks=None,
        )
        run()
        assert not out.isnan().any()
        return worst(out[-tail:], exact, _ALLOWED)

    return run, error


def _torch(shape: Shape, device: torch.device) -> Callable[[], object]:
    """The same sizes in torch's layout: keys and values of a request side by side, not paged.

    Flash attention where the causal mask is the whole mask; a chunk takes the backend that torch
    chooses, with the mask from the lower right.
    """
    dtype = half_type(device)
    q = torch.randn(shape.requests, N, shape.new, H, device=device).to(dtype)
    k, v = (torch.randn(shape.requests, K, shape.length, H, device=device).to(dtype) for _ in "kv")
    square = shape.new == shape.length
    mask = None
    if shape.new > 1 and not square:
        rows = torch.arange(shape.length - shape.new, shape.length, device=device)[:, None]
        mask = torch.arange(shape.length, device=device)[None] <= rows
    flash = [SDPBackend.FLASH_ATTENTION] if device.type == "cuda" else [SDPBackend.MATH]

    def run() -> Tensor:
        if mask is not None:
            return functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        with sdpa_kernel(flash):
            return functional.scaled_dot_product_attention(
                q, k, v, is_causal=square, enable_gqa=True
            )

    return run


def step_of(new: Sequence[int], lengths: Sequence[int], device: torch.device) -> StepTensors:
    """A step whose requests' blocks lie scattered over the cache."""
    counts = [-(-length // _BLOCK_TOKENS) for length in lengths]
    drawn = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)) + 1
    blocks = torch.zeros(len(new), max(counts), dtype=torch.int32)
    positions, places = [], []
    for index, own in enumerate(torch.split_with_sizes(drawn, counts)):
        blocks[index, : len(own)] = own
        at = torch.arange(lengths[index] - new[index], lengths[index])
        positions.append(at)
        places.append(own[at // _BLOCK_TOKENS] * _BLOCK_TOKENS + at % _BLOCK_TOKENS)
    return StepTensors(
        tokens=torch.zeros(sum(new), dtype=torch.int32, device=device),
        positions=torch.cat(positions).int().to(device),
        starts=torch.tensor([0, *new]).cumsum(0).int().to(device),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        blocks=blocks.to(device),
        places=torch.cat(places).to(device),
        most_tokens=max(new),
        most_length=max(lengths),
    )


def filled(step: StepTensors, precision: KvPrecision, dtype: torch.dtype) -> KvLayer:
    """A layer of random keys and values, every place of it."""
    kv = KvLayer.allocate(
        blocks=int(step.blocks.max()) + 1,
        block_tokens=_BLOCK_TOKENS,
        kv_heads=K,
        head_size=H,
        dtype=dtype,
        precision=precision,
        device=step.blocks.device,
    )
    for stored, scales in ((kv.keys, kv.key_scales), (kv.values, kv.value_scales)):
        if scales is None:
            stored.normal_()
            continue
        for block, scale in zip(stored.split(1024), scales.split(1024), strict=True):
            values, found = quantised(torch.randn(block.shape, device=block.device), block.dtype)
            block.copy_(values)
            scale.copy_(found)
    return kv
