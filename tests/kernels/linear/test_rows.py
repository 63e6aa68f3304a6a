"""Rows read from tiles are the rows that were tiled."""

from __future__ import annotations

import pytest
import torch
from gpus import DEVICE
from packedlinears import random_packed

from tidegate.kernels.linear import retile, tiled_rows
from tidegate.kernels.linear.reference import weight_matrix


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group", "symmetric"),
    [(70, 200, 64, False), (130, 256, 128, True), (64, 48, 16, False), (9, 96, 32, True)],
)
def test_rows_of_a_table_are_those_it_was_made_of(
    outputs: int, inputs: int, group: int, symmetric: bool, bits: int
) -> None:
    packed = random_packed(outputs, inputs, group, bits=bits, symmetric=symmetric)
    table = retile([packed], device=DEVICE)
    tokens = torch.tensor([0, 8, outputs - 1, 1, 8], dtype=torch.int32, device=DEVICE)
    found = tiled_rows(table, tokens, torch.float32)
    assert torch.equal(found, weight_matrix(table)[tokens.long()])


def test_rows_are_written_where_they_are_wanted() -> None:
    table = retile([random_packed(64, 64, 64)], device=DEVICE)
    out = torch.zeros(2, 100, dtype=torch.float16, device=DEVICE)[:, :64]
    tokens = torch.tensor([3, 60], device=DEVICE)
    assert tiled_rows(table, tokens, out.dtype, out=out) is out
    assert torch.equal(out, weight_matrix(table)[tokens].half())
    assert tiled_rows(table, tokens[:0], out.dtype).shape == (0, 64)
