"""The compiled cache write in bf16 on real shapes, against its definition in float32."""

from __future__ import annotations

import pytest
import torch
from gpus import DEVICE
from pagedsteps import ragged_step

from tidegate.kernels.kv_write import write_kv
from tidegate.kernels.kv_write.reference import write_kv as defined
from tidegate.kernels.kv_write.rope_tables import RopeTables
from tidegate.kernels.paged_kv import KvLayer, KvPrecision
from tidegate.model.rope import Rope

pytestmark = pytest.mark.gpu

SHAPES = [(32, 8, 128, "head"), (40, 40, 128, "row"), (14, 2, 64, "none"), (8, 4, 256, "head")]


@pytest.mark.parametrize(("heads", "kv_heads", "size", "norm"), SHAPES)
@pytest.mark.parametrize("precision", ["same", "int8", "fp8"])
def test_queries_and_cache_are_within_a_rounding_of_the_definition(
    heads: int, kv_heads: int, size: int, norm: str, precision: KvPrecision
) -> None:
    step = ragged_step([2000, 1, 7], [0, 9000, 100], padding=3, device=DEVICE)
    rope = RopeTables.from_rope(Rope.plain(1e6, size), 10_000, DEVICE)
    rows = len(step.tokens)
    fused = torch.randn(rows, (heads + 2 * kv_heads) * size, device=DEVICE).bfloat16()
    sizes = {"none": None, "head": (size, size), "row": (heads * size, kv_heads * size)}[norm]
    weights = [torch.rand(number, device=DEVICE) + 0.5 for number in sizes or ()]
    q_norm, k_norm = weights or (None, None)
    results = []
    for function in (defined, write_kv):
        parts = torch.split_with_sizes(
            fused.clone(), [heads * size, kv_heads * size, kv_heads * size], dim=1
        )
        q, k, v = (part.view(rows, -1, size) for part in parts)
        kv = KvLayer.allocate(
            blocks=int(step.blocks.max()) + 1,
            block_tokens=16,
            kv_heads=kv_heads,
            head_size=size,
            dtype=torch.bfloat16,
            precision=precision,
            device=DEVICE,
        )
        out = function(q, k, v, kv, step, rope=rope, q_norm=q_norm, k_norm=k_norm, eps=1e-6)
        results.append((out, kv))
    (expected, expected_kv), (got, kv) = results
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-3)
    for one, other in ((kv.keys, expected_kv.keys), (kv.values, expected_kv.values)):
        found, wanted = one[1:].float(), other[1:].float()
        step_size = wanted.abs() / 8 + 1 if precision != "same" else wanted.abs() / 128 + 1e-3
        assert ((found - wanted).abs() <= step_size).all()
        assert (found != wanted).float().mean() < 0.01
