"""Row gathers against the torch operations that define them."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from gpus import DEVICE

from tidegate.kernels import pointwise
from tidegate.kernels.pointwise import PackedTable, reference
from tidegate.model.packed import PackedLinear, pack_nibbles

VOCAB = 37
TOKENS = torch.tensor([0, 36, 5, 5, 17], dtype=torch.int32, device=DEVICE)


def packed(bits: Literal[4, 8], width: int, *, zeros: bool) -> PackedLinear:
    draws, group_size = np.random.default_rng(0), 32
    groups = -(-width // group_size)
    values = draws.integers(0, 2**bits, (VOCAB, groups, group_size), np.uint8)
    points = draws.integers(0, 2**bits, (VOCAB, groups), np.uint8)
    return PackedLinear(
        values=pack_nibbles(values) if bits == 4 else values,
        scales=draws.random((VOCAB, groups)).astype(np.float16).astype(np.float32),
        zeros=points if zeros else None,
        inputs=width,
        bits=bits,
        group_size=group_size,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [7, 1300])
def test_rows_of_a_table_are_copied_bit_by_bit(width: int, dtype: torch.dtype) -> None:
    table = torch.randn(VOCAB, width).to(device=DEVICE, dtype=dtype)
    assert torch.equal(pointwise.embed_rows(table, TOKENS), table[TOKENS.long()])
    assert torch.equal(pointwise.gather_rows(table, TOKENS.long()), table[TOKENS.long()])


def test_embeddings_are_multiplied_as_they_are_read() -> None:
    table = torch.randn(VOCAB, 70, device=DEVICE)
    found = pointwise.embed_rows(table, TOKENS, factor=8.5)
    assert torch.equal(found, reference.embed_rows(table, TOKENS, factor=8.5))


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 1270])
def test_a_packed_table_gives_the_rows_that_its_integers_stand_for(
    bits: Literal[4, 8], width: int, zeros: bool
) -> None:
    linear = packed(bits, width, zeros=zeros)
    table = PackedTable.of(linear, DEVICE)
    exact = torch.from_numpy(linear.dequantise())[TOKENS.cpu().long()].to(DEVICE)
    assert torch.equal(reference.embed_rows(table, TOKENS), exact)
    assert torch.equal(pointwise.embed_rows(table, TOKENS), exact)
    halves = pointwise.embed_rows(table, TOKENS, factor=2, dtype=torch.float16)
    assert torch.equal(halves, (exact * 2).half())


def test_a_wider_tensor_takes_the_rows() -> None:
    table, out = torch.randn(VOCAB, 20, device=DEVICE), torch.zeros(5, 50, device=DEVICE)
    pointwise.embed_rows(table, TOKENS, out=out[:, 10:30])
    assert torch.equal(out[:, 10:30], table[TOKENS.long()])
    assert not out[:, 30:].any()
