"""TorchOps against the model library's own definition, and against itself in other step shapes."""

from __future__ import annotations

import numpy as np
import torch
from tinymodel import RandomWeights, tiny_architecture

from tidegate.kernels.torch_ops import TorchKv, TorchOps, TorchRow, WeightTensors
from tidegate.model.architecture import Architecture
from tidegate.model.walk import Weights, decoder

TOLERANCE = 2e-5
"""On logits of scale 10: float32 sums in another order."""


def make_kv(arch: Architecture, slots: int = 4) -> TorchKv:
    return TorchKv.allocate(
        layers=arch.layers,
        slots=slots,
        tokens=arch.context,
        kv_heads=arch.kv_heads,
        head_size=arch.head_size,
    )


def run(arch: Architecture, weights: Weights, kv: TorchKv, *rows: TorchRow) -> torch.Tensor:
    with torch.inference_mode():
        return decoder(TorchOps(rows, kv, WeightTensors()), arch, weights)


def tokens_of(arch: Architecture, count: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, arch.vocab, count).tolist())


def test_chunks_and_decode_steps_give_the_logits_of_one_pass() -> None:
    arch = tiny_architecture()
    weights = RandomWeights(arch)
    tokens = tokens_of(arch, 41, 1)
    whole = run(arch, weights, make_kv(arch), TorchRow(tokens=tokens, past=0, slot=0))
    kv, past = make_kv(arch), 0
    for chunk in (17, 1, 20, 2, 1):
        row = TorchRow(tokens=tokens[past : past + chunk], past=past, slot=2)
        last = run(arch, weights, kv, row)
        past += chunk
    assert torch.allclose(whole, last, atol=TOLERANCE)


def test_requests_in_one_step_do_not_see_each_other() -> None:
    arch = tiny_architecture(tied_head=False)
    weights = RandomWeights(arch)
    rows = [TorchRow(tokens=tokens_of(arch, 5 + 7 * i, i), past=0, slot=3 - i) for i in range(3)]
    together = run(arch, weights, make_kv(arch), *rows)
    for row, logits in zip(rows, together, strict=True):
        alone = run(arch, weights, make_kv(arch), row)
        assert torch.allclose(alone[0], logits, atol=TOLERANCE)


def test_rows_that_want_no_logits_are_left_out_of_the_head() -> None:
    arch = tiny_architecture()
    rows = [
        TorchRow(tokens=(1, 2, 3), past=0, slot=0, wants_logits=False),
        TorchRow(tokens=(4, 5), past=0, slot=1),
    ]
    logits = run(arch, RandomWeights(arch), make_kv(arch), *rows)
    assert logits.shape == (1, arch.vocab)


def test_a_changed_early_token_changes_the_answer() -> None:
    arch = tiny_architecture()
    weights = RandomWeights(arch)
    first = run(arch, weights, make_kv(arch), TorchRow(tokens=(1, 2, 3, 4), past=0, slot=0))
    other = run(arch, weights, make_kv(arch), TorchRow(tokens=(9, 2, 3, 4), past=0, slot=0))
    assert not torch.allclose(first, other, atol=1e-2)
