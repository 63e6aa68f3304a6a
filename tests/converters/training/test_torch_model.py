"""Weights as parameters: the walk's logits, gradients to every weight, rounding as it is packed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from smallermodels import MemoryWeights, every_logit, packed, random_text
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.training.torch_model import TorchModel
from tidegate.converters.training.training import next_token_loss
from tidegate.model.architecture import Architecture, Experts, LayerKind
from tidegate.model.packed import DenseLinear, PackedLinear, dense_weight
from tidegate.model.recipe import Format
from tidegate.model.roles import roles
from tidegate.model.rope import Rope

STEP = 5e-3
"""Of the finite differences."""

ROPE = Rope.plain(10000.0, 32)
PLAIN = tiny_architecture()
RICH = replace(
    PLAIN,
    kinds=(
        LayerKind(rope=ROPE, window=4),
        LayerKind(rope=None, experts=Experts(count=2, chosen=2, inner=64, normalised=True)),
    ),
    pattern=(0, 1),
    qk_norm="head",
    qkv_bias=True,
    norm_after=True,
    attention_softcap=20.0,
    head_softcap=30.0,
)
BOTH = pytest.mark.parametrize("arch", [PLAIN, RICH], ids=["plain", "rich"])


def everything(role: str) -> bool:
    return True


def model_of(arch: Architecture, **settings: object) -> tuple[TorchModel, MemoryWeights]:
    weights = MemoryWeights(arch, RandomWeights(arch))
    return TorchModel(arch, weights, trains=everything, **settings), weights  # type: ignore[arg-type]


@BOTH
def test_it_says_what_the_walk_says(arch: Architecture) -> None:
    sequences = random_text(arch).sequences
    model, weights = model_of(arch)
    expected = np.concatenate([every_logit(arch, weights, tokens) for tokens in sequences])
    said = model(sequences)
    np.testing.assert_allclose(said.logits.detach().numpy(), expected, atol=1e-4)
    assert [len(stream) for stream in said.hidden] == [len(expected)] * arch.layers


@BOTH
def test_gradients_reach_every_weight_and_are_right(arch: Architecture) -> None:
    sequences = random_text(arch, count=3).sequences
    model, _ = model_of(arch)

    def loss() -> torch.Tensor:
        logits = model(sequences).logits
        return logits[torch.arange(len(logits)), torch.arange(len(logits)) % 7].square().mean()

    torch.autograd.backward(loss())
    assert len(model.parameters()) == sum(1 + role.bias for role in roles(arch).values())
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        assert parameter.grad is not None
        slope = float(parameter.grad.norm())
        assert slope > 0
        along = torch.randn(parameter.shape, generator=rng)
        along = 0.1 * along / along.norm() + parameter.grad / slope
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(along, alpha=sign * STEP)
                values.append(float(loss()))
                parameter.sub_(along, alpha=sign * STEP)
        expected = (values[0] - values[1]) / (2 * STEP)
        assert float((parameter.grad * along).sum()) == pytest.approx(expected, rel=0.05, abs=2e-3)


@pytest.mark.parametrize(
    "wanted",
    [
        Format(),
        Format(bits=8, group_size=None, symmetric=True),
        Format(bits=4, group_size=32, symmetric=True),
    ],
    ids=str,
)
def test_rounded_weights_are_those_that_are_packed(wanted: Format) -> None:
    sequences = random_text(PLAIN).sequences[:1]
    formats = {name: wanted for name, role in roles(PLAIN).items() if role.is_linear}
    model, weights = model_of(PLAIN, rounded=formats)
    ready = packed(PLAIN, weights, wanted)
    said = model(sequences)
    expected = every_logit(PLAIN, ready, sequences[0])
    np.testing.assert_allclose(said.logits.detach().numpy(), expected, atol=1e-4)
    plain = every_logit(PLAIN, weights, sequences[0])
    assert np.abs(expected - plain).max() > 1e-3
    torch.autograd.backward(said.logits.square().mean())
    assert all(float(one.grad.norm()) > 0 for one in model.parameters() if one.grad is not None)
    assert all(one.grad is not None for one in model.parameters())


def test_rounding_follows_the_weights_as_they_change() -> None:
    sequences = random_text(PLAIN).sequences[:1]
    model, _ = model_of(PLAIN, rounded={"layers.0.down": Format()})
    before = model(sequences).logits.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = model(sequences).logits.detach()
    trained = model.trained()
    ready = MemoryWeights(PLAIN, trained)
    only = packed(PLAIN, trained, Format())
    ready.linears["layers.0.down"] = only.linears["layers.0.down"]
    np.testing.assert_allclose(after.numpy(), every_logit(PLAIN, ready, sequences[0]), atol=1e-4)
    assert float((after - before).abs().max()) > 0.1


def test_what_it_was_made_from_never_changes_and_what_is_not_trained_comes_back() -> None:
    weights = packed(PLAIN, RandomWeights(PLAIN), Format())
    dense = RandomWeights(PLAIN).linear("layers.0.up")
    weights.linears["layers.0.up"] = dense
    model = TorchModel(PLAIN, weights, trains=lambda role: role.startswith("layers.0."))
    before = dense_weight(dense).copy()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    trained = model.trained()
    assert np.array_equal(dense_weight(dense), before)
    np.testing.assert_allclose(dense_weight(trained.linear("layers.0.up")), before + 1, rtol=1e-6)
    assert isinstance(trained.linear("layers.0.up"), DenseLinear)
    assert isinstance(trained.linear("layers.0.q"), PackedLinear)
    assert trained.linear("embed") is weights.linear("embed")
    assert trained.vector("final_norm") is weights.vector("final_norm")
    norm = trained.vector("layers.0.mlp_norm")
    np.testing.assert_allclose(norm, weights.vector("layers.0.mlp_norm") + 1, rtol=1e-6)


def test_everything_is_computed_on_the_device_it_is_given() -> None:
    # The meta device computes nothing, and refuses to meet a tensor that lies elsewhere.
    arch = replace(RICH, kinds=(RICH.kinds[0], LayerKind(rope=None)))
    sequences = random_text(arch).sequences
    device = torch.device("meta")
    model = TorchModel(arch, RandomWeights(arch), trains=everything, device=device)
    said = model(sequences)
    assert {tensor.device for tensor in (said.logits, *said.hidden)} == {device}
    torch.autograd.backward(next_token_loss(said.logits, sequences))
    assert all(one.grad is not None and one.grad.device == device for one in model.parameters())
