"""Training through the rounding: what is packed in the end is better, and is what was trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from smallermodels import MemoryWeights, every_logit, packed, random_text, silent
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.passes.base import Model, PassError
from tidegate.converters.passes.qat import Options, make
from tidegate.converters.training.torch_model import TorchModel
from tidegate.model.packed import DenseLinear
from tidegate.model.recipe import Format
from tidegate.model.roles import roles

ARCH = tiny_architecture(layers=2, width=64)
TEXT = random_text(ARCH, count=150)
WANTED = Format(bits=4, group_size=64, symmetric=True)
FORMATS = {name: WANTED for name, role in roles(ARCH).items() if role.is_linear}
OPTIONS = Options(steps=40, learning_rate=1e-3, batch_tokens=200)


def float_model() -> Model:
    return Model(arch=ARCH, weights=MemoryWeights(ARCH, RandomWeights(ARCH)), formats=FORMATS)


def distance(model: Model, found: Model) -> float:
    """Mean divergence of the packed `found` from the float `model` on unseen tokens."""
    ready, total = packed(ARCH, found.weights, WANTED), []
    for tokens in random_text(ARCH, count=6, seed=5).sequences:
        meant, said = (
            torch.from_numpy(every_logit(ARCH, weights, tokens)).double().log_softmax(-1)
            for weights in (model.weights, ready)
        )
        total.append((meant.exp() * (meant - said)).sum(-1))
    return float(torch.cat(total).mean())


def test_trained_through_the_rounding_the_packed_model_is_nearer_to_the_floats() -> None:
    model = float_model()
    trained = make(OPTIONS, ("*",)).apply(model, TEXT, silent)
    assert distance(model, trained) < 0.85 * distance(model, model)


def test_packing_gives_exactly_the_weights_that_were_trained() -> None:
    trained = make(replace(OPTIONS, steps=3), ("*",)).apply(float_model(), TEXT, silent)
    for role, wanted in FORMATS.items():
        assert isinstance(trained.weights.linear(role), DenseLinear), (role, wanted)
    seen = TorchModel(ARCH, trained.weights, trains=lambda _: True, rounded=FORMATS)
    ready = packed(ARCH, trained.weights, WANTED)
    tokens = TEXT.sequences[0]
    with torch.no_grad():
        said = seen([tokens]).logits.numpy()
    np.testing.assert_allclose(said, every_logit(ARCH, ready, tokens), atol=1e-5)


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(PassError, match="formats must be known"):
        make(OPTIONS, ("*",)).apply(replace(float_model(), formats={}), TEXT, silent)
