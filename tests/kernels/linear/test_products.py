"""Products with tiles are the reference's, and in one order when they have to be."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from gpus import DEVICE
from packedlinears import random_packed

from tidegate.kernels.launch import Gpu, gpu_of
from tidegate.kernels.linear import (
    DenseWeight,
    GpuLinear,
    LinearWorkspace,
    LowRankWeight,
    TiledLinear,
    apply_linear,
    dequantise,
    retile,
)
from tidegate.kernels.linear.few import launch_few, suits_few
from tidegate.kernels.linear.launching import launch_dense, launch_tiled
from tidegate.kernels.linear.plan import ProductPlan, plan_product
from tidegate.kernels.linear.reference import linear, weight_matrix
from tidegate.kernels.linear.tiles import number_pairs
from tidegate.model.packed import PackedLinear

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
"""Of results about 1 large: float32 sums in another order; float16's last digit."""
H200 = Gpu(name="NVIDIA H200", processors=132)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def tiles(packed: PackedLinear) -> TiledLinear:
    return retile([packed], device=DEVICE)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert torch.allclose(found, expected, atol=TOLERANCE[found.dtype], rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group", "symmetric", "bias", "tokens"),
    [
        (70, 200, 64, False, True, 3),
        (64, 96, 32, True, False, 17),
        (130, 50, 16, False, False, 1),
        (65, 256, 128, True, True, 9),
        (5, 100, 100, True, False, 40),
    ],
)
def test_tiles_multiply_as_the_reference_does(
    outputs: int,
    inputs: int,
    group: int,
    symmetric: bool,
    bias: bool,
    tokens: int,
    bits: int,
    dtype: torch.dtype,
) -> None:
    packed = random_packed(outputs, inputs, group, bits=bits, symmetric=symmetric, bias=bias)
    weight, x = tiles(packed), drawn(tokens, inputs, dtype=dtype)
    assert_same(apply_linear(x, weight), linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group", "symmetric", "bias", "tokens"),
    [
        (70, 600, 128, False, True, 1),
        (64, 512, 64, True, False, 2),
        (40, 100, 32, True, False, 3),
        (17, 96, 16, False, True, 4),
    ],
)
def test_few_tokens_multiply_as_the_reference_does(
    outputs: int,
    inputs: int,
    group: int,
    symmetric: bool,
    bias: bool,
    tokens: int,
    bits: int,
    dtype: torch.dtype,
) -> None:
    packed = random_packed(outputs, inputs, group, bits=bits, symmetric=symmetric, bias=bias)
    weight, x = tiles(packed), drawn(tokens, inputs, dtype=dtype)
    out = torch.empty(tokens, outputs, dtype=dtype, device=DEVICE)
    launch_few(x, weight, out, gpu_of(x.device))
    assert_same(out, linear(x, weight))


def test_few_tokens_of_narrow_layers_are_split_instead() -> None:
    wide, narrow = tiles(random_packed(2112, 16, 16)), tiles(random_packed(2048, 16, 16))
    assert suits_few(wide, 4, H200)
    assert not suits_few(narrow, 1, H200)
    assert not suits_few(wide, 5, H200)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_written_out_is_the_weight(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight = tiles(random_packed(70, 200, 64, bits=bits, symmetric=symmetric))
    assert torch.equal(dequantise(weight, dtype), weight_matrix(weight).to(dtype))


def plan(splits: int, *, tokens: int, apart: bool = True, wide: bool = False) -> ProductPlan:
    block_tokens = 32 if wide else 16
    return ProductPlan(
        block_tiles=2 if wide else 1,
        block_tokens=block_tokens,
        output_blocks=1 if wide else 2,
        token_blocks=-(-tokens // block_tokens),
        splits=splits,
        apart=apart,
        num_warps=4,
        num_stages=3,
    )


def workspace_for(one: ProductPlan) -> LinearWorkspace:
    return LinearWorkspace(
        partial=torch.full((max(1, one.partial_sums),), torch.nan, device=DEVICE),
        arrived=torch.zeros(one.blocks, dtype=torch.int32, device=DEVICE),
        wide=torch.empty(0),
        rows=torch.empty(0, dtype=torch.int8),
        row_scales=torch.empty(0),
    )


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_split_sums_are_the_whole_and_counters_end_at_zero(splits: int) -> None:
    weight, x = tiles(random_packed(100, 300, 64, bias=True)), drawn(20, 300)
    one, out = plan(splits, tokens=20), torch.empty(20, 100, device=DEVICE)
    workspace = workspace_for(one)
    for _ in range(2):
        launch_tiled(x, weight, out, one, workspace)
        assert_same(out, linear(x, weight))
        assert not workspace.arrived.any()


@pytest.mark.parametrize("dense", [True, False])
def test_the_order_of_sums_depends_on_the_splits_alone(dense: bool) -> None:
    tiled, x = tiles(random_packed(100, 300, 64)), drawn(20, 300)
    weight = DenseWeight(weight=weight_matrix(tiled))

    def product(rows: torch.Tensor, one: ProductPlan) -> torch.Tensor:
        out = torch.empty(len(rows), 100, device=DEVICE)
        if dense:
            launch_dense(rows, weight, out, one, workspace_for(one))
        else:
            launch_tiled(rows, tiled, out, one, workspace_for(one))
        return out

    few = [0, 7, 19]
    alone = torch.cat([product(x[row][None], plan(3, tokens=1)) for row in few])
    together = product(x, plan(3, tokens=20))
    wide = product(x, plan(3, tokens=20, wide=True))
    in_turn = product(x, plan(3, tokens=20, apart=False, wide=True))
    assert torch.equal(alone, together[few])
    assert torch.equal(together, wide)
    assert torch.equal(together, in_turn)
    assert_same(together, linear(x, weight))


@pytest.mark.parametrize("tokens", [1, 2, 16, 33, 64, 200, 513, 8192])
@pytest.mark.parametrize(("outputs", "inputs"), [(4096, 4096), (14336, 4096), (1000, 1100)])
def test_deterministic_splits_do_not_depend_on_how_many_tokens_there_are(
    outputs: int, inputs: int, tokens: int
) -> None:
    for weight in (
        DenseWeight(weight=torch.empty(outputs, inputs, device="meta")),
        tiles(random_packed(outputs // 64, inputs, 128 if inputs % 128 == 0 else inputs)),
    ):
        one = plan_product(weight, 1, H200, deterministic=True)
        many = plan_product(weight, tokens, H200, deterministic=True)
        assert many.splits == one.splits
        assert many.partial_sums * 4 < 128 * 2**20


@pytest.mark.parametrize("kind", ["4 bits", "8 bits", "dense", "two factors"])
def test_in_one_order_a_row_has_the_same_bits_alone_and_in_any_step(kind: str) -> None:
    first = tiles(random_packed(72, 600, 32, symmetric=False))
    weights: dict[str, GpuLinear] = {
        "4 bits": tiles(random_packed(100, 600, 128, bias=True)),
        "8 bits": tiles(random_packed(100, 600, 64, bits=8)),
        "dense": DenseWeight(weight=drawn(100, 600), bias=drawn(100, seed=1)),
        "two factors": LowRankWeight(first=first, second=DenseWeight(weight=drawn(40, 72))),
    }
    weight, x = weights[kind], drawn(140, 600, seed=2)
    if not isinstance(weight, LowRankWeight):
        one, many = (
            plan_product(weight, tokens, gpu_of(x.device), deterministic=True)
            for tokens in (1, len(x))
        )
        assert one.splits == many.splits > 1
        assert one.apart
        assert not many.apart
    whole = apply_linear(x, weight, deterministic=True)
    for tokens in (1, 4, 17, 32):
        found = apply_linear(x[-tokens:], weight, deterministic=True)
        assert torch.equal(found, whole[-tokens:])


def test_every_kind_of_layer_is_multiplied_into_a_given_output_with_one_workspace() -> None:
    tiled = tiles(random_packed(72, 300, 64, bias=True))
    dense = DenseWeight(weight=drawn(40, 72), bias=drawn(40, seed=1))
    first = tiles(random_packed(72, 300, 64))
    kinds: list[GpuLinear] = [tiled, dense, LowRankWeight(first=first, second=dense)]
    workspace = LinearWorkspace.of(
        kinds, most_tokens=70, dtype=torch.float32, device=DEVICE, deterministic=True
    )
    for weight in kinds:
        for tokens in (0, 3, 70):
            rows = drawn(tokens, 2 * weight.inputs)[:, : weight.inputs]
            out = torch.empty(tokens, 2 * weight.outputs, device=DEVICE)[:, : weight.outputs]
            found = apply_linear(rows, weight, out=out, deterministic=True, workspace=workspace)
            assert found is out
            assert torch.allclose(out, linear(rows, weight), atol=1e-4)


def test_many_tokens_are_multiplied_with_the_weight_written_out() -> None:
    weight, x = tiles(random_packed(66, 48, 16, bits=8, bias=True)), drawn(600, 48)
    workspace = LinearWorkspace.of([weight], most_tokens=600, dtype=x.dtype, device=DEVICE)
    assert_same(apply_linear(x, weight, workspace=workspace), linear(x, weight))
    assert workspace.wide.any()


@triton.jit  # type: ignore[untyped-decorator]
def _pairs(words: tl.tensor, out: tl.tensor, PLACE: tl.constexpr, BITS: tl.constexpr) -> None:
    at = tl.arange(0, 16)
    tl.store(out + at, number_pairs(tl.load(words + at), PLACE, BITS, tl.bfloat16))


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_nibble_becomes_the_bits_of_16_and_itself_in_bfloat16(place: int) -> None:
    nibbles = torch.arange(16, dtype=torch.int32, device=DEVICE)
    out = torch.empty(16, dtype=torch.int32, device=DEVICE)
    others = 0x0A5A0A5A & ~(0x000F000F << 4 * place)
    words = others | nibbles << 4 * place | (15 - nibbles) << (16 + 4 * place)
    _pairs[(1,)](words, out, PLACE=place, BITS=4)
    halves = out.view(torch.bfloat16).view(16, 2).float()
    assert torch.equal(halves[:, 0], 16.0 + nibbles)
    assert torch.equal(halves[:, 1], 31.0 - nibbles)


def test_what_does_not_fit_is_refused() -> None:
    weight = tiles(random_packed(64, 64, 64))
    with pytest.raises(ValueError, match=r"x: \(2, 63\)"):
        apply_linear(drawn(2, 63), weight)
    with pytest.raises(ValueError, match="out: "):
        apply_linear(drawn(2, 64), weight, out=torch.empty(2, 65, device=DEVICE))
    empty = LinearWorkspace.of([], most_tokens=1, dtype=torch.float32, device=DEVICE)
    with pytest.raises(ValueError, match="workspace: sums"):
        launch_tiled(
            drawn(2, 64), weight, torch.empty(2, 64, device=DEVICE), plan(2, tokens=2), empty
        )
