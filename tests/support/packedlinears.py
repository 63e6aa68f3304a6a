"""Packed layers of random integers, for tests of whoever reads them."""

from __future__ import annotations

from typing import cast

import numpy as np

from tidegate.model.packed import Bits, PackedLinear, pack_nibbles


def random_packed(
    outputs: int,
    inputs: int,
    group: int,
    *,
    bits: int = 4,
    symmetric: bool = True,
    bias: bool = False,
    seed: int = 0,
) -> PackedLinear:
    """A layer whose weights are about 1 / sqrt(inputs) large, padding included."""
    rng = np.random.default_rng(seed)
    groups, most = -(-inputs // group), (1 << bits) - 1
    integers = rng.integers(0, most + 1, (outputs, groups, group), dtype=np.uint8)
    scales = rng.uniform(0.5, 1.5, (outputs, groups)) / (most * np.sqrt(inputs))
    zeros = rng.integers(0, most + 1, (outputs, groups), dtype=np.uint8)
    if symmetric:
        zeros[:] = 1 << (bits - 1)
    beyond = groups * group - inputs
    if beyond:
        integers[:, -1, -beyond:] = zeros[:, -1:]
    return PackedLinear(
        values=pack_nibbles(integers) if bits == 4 else integers,
        scales=scales.astype(np.float16).astype(np.float32),
        zeros=None if symmetric else zeros,
        bias=rng.normal(size=outputs).astype(np.float32) if bias else None,
        inputs=inputs,
        bits=cast(Bits, bits),
        group_size=group,
    )
