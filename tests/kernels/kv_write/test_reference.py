"""The definition of the cache write: norm and rotation as the walk has them; what is stored."""

from __future__ import annotations

import pytest
import torch
from pagedsteps import ragged_step

from tidegate.kernels.kv_write.reference import write_kv
from tidegate.kernels.kv_write.rope_tables import RopeTables
from tidegate.kernels.paged_kv import KvLayer, KvPrecision
from tidegate.kernels.torch_ops import root_mean_square_norm, rope_table, rotate
from tidegate.model.rope import Rope

T, N, K, H = 9, 4, 2, 16


def fused(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v as views of one row per token."""
    row = torch.randn(T, (N + 2 * K) * H, generator=torch.Generator().manual_seed(seed))
    parts = torch.split_with_sizes(row, [N * H, K * H, K * H], dim=1)
    q, k, v = (part.view(T, -1, H) for part in parts)
    return q, k, v


def layer(precision: KvPrecision = "same") -> KvLayer:
    return KvLayer.allocate(
        blocks=8,
        block_tokens=16,
        kv_heads=K,
        head_size=H,
        dtype=torch.float32,
        precision=precision,
    )


@pytest.mark.parametrize("norm_size", [H, N * H])
@pytest.mark.parametrize("rotated", [H, 6])
def test_query_and_key_are_normed_clipped_and_rotated_as_the_walk_does(
    norm_size: int, rotated: int
) -> None:
    rope = Rope.plain(10000.0, rotated)
    step = ragged_step([6, 3], [0, 30])
    kv, (q, k, v) = layer(), fused()
    q_norm = torch.linspace(0.5, 2, norm_size)
    k_norm = torch.linspace(2, 0.5, norm_size // N * K if norm_size > H else H)

    def walked(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = root_mean_square_norm(x.flatten(1), weight, 1e-5).clamp(-1.5, 1.5)
        return rotate(x.view(T, -1, H), rope_table(step.positions, rope))

    expected = walked(q, q_norm), walked(k, k_norm), v.clamp(-1.5, 1.5)
    got = write_kv(
        q,
        k,
        v,
        kv,
        step,
        rope=RopeTables.from_rope(rope, 64),
        q_norm=q_norm,
        k_norm=k_norm,
        eps=1e-5,
        clip=1.5,
    )
    at, within = step.places // 16, step.places % 16
    assert got is q
    found = got, kv.keys[at, :, within], kv.values[at, :, within]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_eight_bits_keep_a_value_to_half_a_step(precision: KvPrecision) -> None:
    step = ragged_step([T], [3])
    kv, (q, k, v) = layer(precision), fused()
    k[2] = 0
    write_kv(q, k, v, kv, step, rope=None, out=torch.empty_like(q))
    at, within = step.places // 16, step.places % 16
    pairs = ((k, kv.keys, kv.key_scales), (v, kv.values, kv.value_scales))
    for written, stored, scales in pairs:
        assert scales is not None
        found = stored[at, :, within].float() * scales[at, :, within][..., None]
        largest = written.abs().amax(dim=-1, keepdim=True)
        if precision == "int8":
            step_size = largest / 127
        else:  # three bits of mantissa, down to 2 ** -9 of a scale
            step_size = torch.maximum(written.abs() / 8, largest / 448 * 2**-9)
        assert ((found - written).abs() <= step_size * 0.50001).all()


def test_what_no_token_is_written_to_stays_as_it_was() -> None:
    step = ragged_step([T], [0])
    kv, (q, k, v) = layer(), fused()
    write_kv(q, k, v, kv, step, rope=None)
    written = torch.zeros(8 * 16, dtype=torch.bool)
    written[step.places] = True
    rest = kv.keys.transpose(1, 2).flatten(0, 1)[~written]
    assert (rest == 0).all()
    assert (kv.keys.transpose(1, 2).flatten(0, 1)[written] != 0).any()
