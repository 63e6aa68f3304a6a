"""Folding scales: the model says the same, and what cannot be folded is named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tinyblocks import TinyData, final_block, layer_block, spiky_sequences, tiny_encoder
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.rounding.folding import apply, foldable, folds
from tidegate.model.architecture import Architecture, Experts
from tidegate.model.packed import DenseLinear, LowRankLinear, dense_weight
from tidegate.model.recipe import Format
from tidegate.model.registry import AnyArchitecture

FORMAT = Format(bits=4, group_size=32)
LLAMA = tiny_architecture(layers=1)


def with_experts(arch: Architecture) -> Architecture:
    experts = Experts(count=4, chosen=2, inner=64, normalised=True)
    return replace(arch, kinds=(replace(arch.kinds[0], experts=experts),))


ARCHITECTURES: dict[str, AnyArchitecture] = {
    "grouped heads": LLAMA,
    "biases": replace(LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True),
    "norms behind": replace(LLAMA, norm_before=False, norm_after=True, qk_norm="row"),
    "norms around": replace(LLAMA, norm_after=True, qk_norm="head", residual_scale=0.5),
    "experts": with_experts(LLAMA),
    "clipped values": replace(LLAMA, qkv_clip=0.5, kv_heads=4),
    "gelu encoder": tiny_encoder(),
    "relu encoder": tiny_encoder("relu"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_folded_model_says_the_same(name: str) -> None:
    arch = ARCHITECTURES[name]
    block = layer_block(arch, RandomWeights(arch, seed=1), 0, FORMAT)
    data = TinyData(block, arch, spiky_sequences(arch.width, seed=2))
    before = torch.cat(list(data.outputs()))
    weights = dict(block.linears)
    rng = np.random.default_rng(3)
    changed: set[str] = set()
    for fold in foldable(arch, block, ("*",)):
        count = len(fold.shared(torch.ones(block.linears[fold.readers[0]].inputs)))
        apply(block, fold, torch.from_numpy(rng.lognormal(0, 1, count).astype(np.float32)))
        changed |= set(fold.readers)
    after = torch.cat(list(data.outputs()))
    assert changed, "nothing was folded"
    for role in changed:
        was, now = (dense_weight(part[role]) for part in (weights, block.linears))
        assert not np.allclose(was, now)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))


def test_scales_of_an_untied_head_fold_into_the_last_norm() -> None:
    arch = tiny_architecture(layers=1, tied_head=False)
    block = final_block(arch, RandomWeights(arch, seed=1), FORMAT)
    data = TinyData(block, arch, spiky_sequences(arch.width, seed=2))
    before = torch.cat(list(data.outputs()))
    (fold,) = foldable(arch, block, ("*",))
    apply(block, fold, torch.rand(arch.width) + 0.5)
    after = torch.cat(list(data.outputs()))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))


def refused(arch: AnyArchitecture) -> dict[str, str]:
    block = layer_block(arch, RandomWeights(arch), 0, FORMAT)
    list(foldable(arch, block, ("*",)))
    return block.notes


def test_without_a_norm_before_only_what_reads_rows_is_folded() -> None:
    notes = refused(ARCHITECTURES["norms behind"])
    assert set(notes) == {f"layers.0.{part}" for part in ("q", "k", "v", "gate", "up")}
    assert all("no norm stands before it" in note for note in notes.values())


def test_nothing_is_folded_through_a_value_that_is_cut() -> None:
    notes = refused(ARCHITECTURES["clipped values"])
    assert notes == {
        "layers.0.o": "its inputs are not scaled: the value it reads is cut to a limit"
    }


def test_an_encoder_says_what_cannot_be_folded() -> None:
    notes = refused(tiny_encoder())
    assert set(notes) == {f"layers.0.{part}" for part in ("q", "k", "v", "up", "down")}
    assert "feeds the residual stream" in notes["layers.0.up"]
    assert "gelu lies before it" in notes["layers.0.down"]
    assert set(refused(tiny_encoder("relu"))) == set(notes) - {"layers.0.down"}


def test_only_layers_that_match_and_will_be_packed_are_served() -> None:
    formats = {
        role: Format(bits=32) if role.endswith(("gate", "up")) else FORMAT
        for role in layer_block(LLAMA, RandomWeights(LLAMA), 0, FORMAT).linears
    }
    block = layer_block(LLAMA, RandomWeights(LLAMA), 0, formats)
    served = [fold.readers[0] for fold in foldable(LLAMA, block, ("*.[qkv]", "*.gate", "*.up"))]
    assert served == ["layers.0.q"]


def test_all_experts_and_the_router_share_the_scales_of_their_norm() -> None:
    arch = with_experts(LLAMA)
    block = layer_block(arch, RandomWeights(arch), 0, FORMAT)
    (norm,) = [fold for fold in folds(arch, block) if fold.vectors == ("layers.0.mlp_norm",)]
    assert norm.readers[0] == "layers.0.router"
    assert len(norm.readers) == 1 + 2 * 4
    writers = [fold.writer for fold in folds(arch, block) if fold.readers[0].endswith("down")]
    assert writers == [f"layers.0.experts.{number}.up" for number in range(4)]


def test_the_factors_of_a_low_rank_layer_take_the_scales() -> None:
    block = layer_block(LLAMA, RandomWeights(LLAMA), 0, FORMAT)
    rng = np.random.default_rng(0)
    for role in ("layers.0.q", "layers.0.v"):
        shape = block.linears[role].outputs, block.linears[role].inputs
        first = rng.standard_normal((16, shape[1])).astype(np.float32) * 0.2
        second = rng.standard_normal((shape[0], 16)).astype(np.float32) * 0.2
        block.linears[role] = LowRankLinear(
            first=DenseLinear(weight=first), second=DenseLinear(weight=second)
        )
    data = TinyData(block, LLAMA, spiky_sequences(LLAMA.width, seed=2))
    before = torch.cat(list(data.outputs()))
    for fold in foldable(LLAMA, block, ("*",)):
        count = len(fold.shared(torch.ones(block.linears[fold.readers[0]].inputs)))
        apply(block, fold, torch.linspace(0.5, 2, count))
    after = torch.cat(list(data.outputs()))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))
