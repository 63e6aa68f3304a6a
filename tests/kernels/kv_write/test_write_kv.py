"""The cache write against its definition on odd shapes: interpreted, or compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from gpus import DEVICE
from pagedsteps import ragged_step

from tidegate.errors import ConfigError
from tidegate.kernels.kv_write import write_kv
from tidegate.kernels.kv_write.reference import write_kv as defined
from tidegate.kernels.kv_write.rope_tables import RopeTables
from tidegate.kernels.paged_kv import KvLayer, KvPrecision
from tidegate.model.rope import Rope

Tensor = torch.Tensor
LOOSE = {torch.float32: 2e-6, torch.float16: 2e-3}
STEP = ragged_step([5, 1, 3], [0, 30, 14], padding=2, device=DEVICE)


def fused(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v as views of one row per token."""
    rows = len(STEP.tokens)
    generator = torch.Generator().manual_seed(heads)
    row = torch.randn(rows, (heads + 2 * kv_heads) * size, generator=generator)
    parts = torch.split_with_sizes(
        row.to(DEVICE, dtype), [heads * size, kv_heads * size, kv_heads * size], dim=1
    )
    return [part.view(rows, -1, size) for part in parts]


def empty(kv_heads: int, size: int, dtype: torch.dtype, precision: KvPrecision = "same") -> KvLayer:
    return KvLayer.allocate(
        blocks=int(STEP.blocks.max()) + 1,
        block_tokens=16,
        kv_heads=kv_heads,
        head_size=size,
        dtype=dtype,
        precision=precision,
        device=DEVICE,
    )


def agree(
    shape: tuple[int, int, int],
    *,
    dtype: torch.dtype = torch.float32,
    precision: KvPrecision = "same",
    rotated: int = 0,
    norms: tuple[int, int] | None = None,
    clip: float | None = None,
    in_place: bool = True,
) -> None:
    """The kernel comes to what the definition says, in the queries and in the whole cache."""
    heads, kv_heads, size = shape
    rope = RopeTables.from_rope(Rope.plain(500.0, rotated), 64, DEVICE) if rotated else None
    weights = [torch.linspace(0.5, 2, number, device=DEVICE) for number in norms or ()]
    q_norm, k_norm = weights or (None, None)
    results = []
    for function in (defined, write_kv):
        q, k, v = fused(heads, kv_heads, size, dtype)
        kv = empty(kv_heads, size, dtype, precision)
        out = None if in_place else torch.full_like(q, torch.nan)
        options = {"rope": rope, "q_norm": q_norm, "k_norm": k_norm, "eps": 1e-5, "clip": clip}
        got = function(q, k, v, kv, STEP, out=out, **options)  # type: ignore[arg-type]
        assert got is (q if out is None else out)
        results.append((got, kv))
    (expected, expected_kv), (got, kv) = results
    assert torch.allclose(got, expected, atol=LOOSE[dtype], rtol=1e-3)
    compare(kv, expected_kv, LOOSE[dtype])


def compare(kv: KvLayer, expected: KvLayer, atol: float) -> None:
    """Every block but the padding's, to which tokens race."""
    pairs = [(kv.keys, expected.keys), (kv.values, expected.values)]
    if kv.key_scales is not None and kv.value_scales is not None:
        scales = [(kv.key_scales, expected.key_scales), (kv.value_scales, expected.value_scales)]
        for one, other in scales:
            assert other is not None
            assert torch.allclose(one[1:], other[1:], rtol=1e-6)
        for one, other in pairs:  # one step up or down where a value lies between two
            steps = (one[1:].float() - other[1:].float()).abs()
            if DEVICE == "cpu" and one.dtype == torch.float8_e4m3fn:
                # Triton's interpreter loses the carry of what is rounded up to a power of two.
                steps[(other[1:].view(torch.uint8) & 7) == 0] = 0
            assert (steps <= other[1:].float().abs() / 8 + 1).all()
            assert (steps > 0).float().mean() < 0.01
        return
    for one, other in pairs:
        assert torch.allclose(one[1:], other[1:], atol=atol, rtol=1e-3)


@pytest.mark.parametrize("shape", [(4, 2, 16), (3, 1, 20), (10, 10, 8), (1, 1, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_of_any_number_and_size_are_rotated_and_kept(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    agree(shape, rotated=shape[2], dtype=dtype)


@pytest.mark.parametrize("rotated", [0, 2, 6])
def test_a_part_of_a_head_or_nothing_is_rotated(rotated: int) -> None:
    agree((4, 2, 12), rotated=rotated)


@pytest.mark.parametrize("norms", [(12, 12), (60, 24), (12, 24)])
def test_norms_are_over_heads_or_the_row(norms: tuple[int, int]) -> None:
    agree((5, 2, 12), rotated=8, norms=norms, clip=1.2)


def test_values_are_cut_without_a_norm_too() -> None:
    agree((4, 2, 16), rotated=16, clip=0.5)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_eight_bits_are_those_of_the_definition(precision: KvPrecision, dtype: torch.dtype) -> None:
    agree((4, 2, 20), rotated=20, norms=(20, 20), precision=precision, dtype=dtype)


def test_the_queries_may_go_elsewhere() -> None:
    agree((4, 2, 16), rotated=16, in_place=False)


def test_a_token_of_zeros_is_kept_as_zeros() -> None:
    q, k, v = fused(4, 2, 16, torch.float32)
    k.zero_()
    kv = empty(2, 16, torch.float32, "int8")
    kv.keys.fill_(7)
    write_kv(q, k, v, kv, STEP, rope=None)
    at, within = STEP.places // 16, STEP.places % 16
    assert (kv.keys[at, :, within] == 0).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q": (11, 4, 20)}, "q.shape"),
        ({"k": (11, 3, 16)}, "k.shape"),
        ({"out": (11, 5, 16)}, "out.shape"),
        ({"q_norm": (17,)}, "q_norm.shape"),
        ({"k_norm": (64,)}, "k_norm.shape"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    change: dict[str, tuple[int, ...]], named: str
) -> None:
    q, k, v = fused(4, 2, 16, torch.float32)
    given = {"q": q, "k": k, "v": v}
    given.update({name: torch.zeros(shape, device=DEVICE) for name, shape in change.items()})
    kv = empty(2, 16, torch.float32)
    with pytest.raises(ConfigError, match=named):
        write_kv(kv=kv, step=STEP, rope=None, **given)  # type: ignore[arg-type]


def test_a_view_whose_heads_lie_apart_is_refused() -> None:
    _, k, v = fused(4, 2, 16, torch.float32)
    apart = torch.empty_strided((11, 4, 16), (128, 32, 1), device=DEVICE)
    with pytest.raises(ConfigError, match=r"q\.stride"):
        write_kv(apart, k, v, empty(2, 16, torch.float32), STEP, rope=None)


def test_a_rotation_wider_than_a_head_is_refused() -> None:
    q, k, v = fused(4, 2, 16, torch.float32)
    rope = RopeTables.from_rope(Rope.plain(500.0, 18), 64, DEVICE)
    with pytest.raises(ConfigError, match=r"rope\.size = 18: must be at most 16"):
        write_kv(q, k, v, empty(2, 16, torch.float32), STEP, rope=rope)
