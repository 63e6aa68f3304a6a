"""Distillation: the student comes nearer to its teacher on text that neither was trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from smallermodels import MemoryWeights, every_logit, random_text, silent, tiny_encoder
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.passes.base import Model, PassError
from tidegate.converters.passes.distill import Options, make
from tidegate.converters.passes.prune_depth import without_layers
from tidegate.converters.rounding.rtn import quantise
from tidegate.errors import ConfigError
from tidegate.model.architecture import Architecture
from tidegate.model.packed import PackedLinear, dense_weight

ARCH = tiny_architecture(layers=3, width=64)
TEXT = random_text(ARCH, count=150)
OPTIONS = Options(steps=40, learning_rate=2e-3, batch_tokens=200)


def teacher() -> Model:
    return Model(arch=ARCH, weights=MemoryWeights(ARCH, RandomWeights(ARCH)))


def student(of: Model) -> Model:
    return replace(without_layers(of, (0, 2)), reference=of)


def distance(model: Model, other: Model) -> float:
    """Mean divergence of the next token on unseen tokens."""
    total = []
    for tokens in random_text(ARCH, count=6, seed=5).sequences:
        found = []
        for one in (other, model):
            assert isinstance(one.arch, Architecture)
            logits = torch.from_numpy(every_logit(one.arch, one.weights, tokens))
            found.append(logits.double().log_softmax(-1))
        total.append((found[0].exp() * (found[0] - found[1])).sum(-1))
    return float(torch.cat(total).mean())


def test_the_student_comes_nearer_to_its_teacher_on_unseen_text() -> None:
    large = teacher()
    small = student(large)
    before = distance(small, large)
    trained = make(OPTIONS, ("*",)).apply(small, TEXT, silent)
    assert trained.arch == small.arch
    assert distance(trained, large) < 0.8 * before


def test_each_part_of_the_loss_falls_on_its_own() -> None:
    small, text = student(teacher()), random_text(ARCH, count=5)
    for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        options = replace(
            OPTIONS,
            steps=12,
            kl_weight=weights[0],
            hidden_weight=weights[1],
            label_weight=weights[2],
            temperature=2.0,
        )
        _, losses = make(options, ("*",)).run(small, text, silent)
        assert losses[-1] < 0.9 * losses[0], weights


def test_it_trains_on_all_the_text_and_not_on_the_calibration_part_alone() -> None:
    options = replace(OPTIONS, steps=4)
    part = replace(TEXT, sequences=TEXT.sequences[:3])
    whole = replace(part, all_sequences=TEXT.sequences)
    losses = [
        make(options, ("*",)).run(student(teacher()), text, silent)[1]
        for text in (part, whole, TEXT)
    ]
    assert losses[0] != losses[1] == losses[2]


def test_a_teacher_from_a_folder_is_the_same_teacher(tmp_path: Path) -> None:
    weights = MemoryWeights(ARCH, RandomWeights(ARCH))
    for role, linear in weights.linears.items():
        # What bfloat16 holds exactly.
        kept = torch.from_numpy(dense_weight(linear)).bfloat16().float().numpy()
        weights.change(role, kept)
    for role, vector in weights.vectors.items():
        weights.vectors[role] = torch.from_numpy(vector).bfloat16().float().numpy()
    folder = write_checkpoint(tmp_path / "teacher", ARCH, weights)
    large = Model(arch=ARCH, weights=weights)
    options = replace(OPTIONS, steps=3)
    from_memory = make(options, ("*",)).run(student(large), TEXT, silent)[1]
    small = replace(student(large), reference=None)
    from_folder = make(replace(options, teacher=str(folder)), ("*",)).run(small, TEXT, silent)[1]
    assert from_folder == from_memory


def test_only_roles_that_match_are_trained_and_packed_ones_never() -> None:
    small = student(teacher())
    weights = MemoryWeights(small.arch, small.weights)
    weights.linears["layers.0.down"] = quantise(
        weights.linears["layers.0.down"],  # type: ignore[arg-type]
        bits=4,
        group_size=64,
        symmetric=False,
    )
    options = replace(OPTIONS, steps=2)
    trained = make(options, ("layers.0.*",)).apply(replace(small, weights=weights), TEXT, silent)
    assert isinstance(trained.weights.linear("layers.0.down"), PackedLinear)
    assert trained.weights.linear("layers.1.down") is weights.linear("layers.1.down")
    before, after = weights.linear("layers.0.up"), trained.weights.linear("layers.0.up")
    assert not np.array_equal(dense_weight(before), dense_weight(after))


def test_without_a_teacher_it_learns_the_text_alone() -> None:
    small = replace(student(teacher()), reference=None)
    options = replace(OPTIONS, steps=2, kl_weight=0.0, hidden_weight=0.0, label_weight=1.0)
    assert len(make(options, ("*",)).run(small, TEXT, silent)[1]) == 2
    with pytest.raises(PassError, match="must be a checkpoint folder"):
        make(OPTIONS, ("*",)).apply(small, TEXT, silent)


def test_teachers_that_do_not_fit_are_refused() -> None:
    small = student(teacher())
    other = replace(ARCH, vocab=100)
    weights = RandomWeights(other)
    with pytest.raises(PassError, match="the teacher has 100 tokens, the model 203"):
        make(OPTIONS, ("*",)).apply(
            replace(small, reference=Model(arch=other, weights=weights)), TEXT, silent
        )
    wide = tiny_architecture(layers=1, width=128)
    reference = Model(arch=wide, weights=RandomWeights(wide))
    with pytest.raises(PassError, match=r"hidden_weight = 0\.1: must be 0"):
        make(OPTIONS, ("*",)).apply(replace(small, reference=reference), TEXT, silent)
    options = replace(OPTIONS, hidden_weight=0.0, steps=1)
    make(options, ("*",)).apply(replace(small, reference=reference), TEXT, silent)
    encoder = tiny_encoder()
    model = Model(arch=encoder, weights=RandomWeights(encoder))
    with pytest.raises(PassError, match="encoder"):
        make(OPTIONS, ("*",)).apply(model, TEXT, silent)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"batch_tokens": 0},
        {"warmup": 2.0},
        {"weight_decay": -1.0},
        {"seed": -1},
        {"temperature": 0.0},
        {"hidden_weight": -1.0},
        {"kl_weight": 0.0, "hidden_weight": 0.0},
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Options(**options)  # type: ignore[arg-type]
