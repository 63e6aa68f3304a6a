"""What a checkpoint's config says of its outputs: kinds of classes, and smaller embeddings."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest
from encodermodels import CLASSIFIER, TINY

from tidegate.errors import CheckpointError
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.encoder_use import USE_FILE, kept_use, read_use, write_use

ONE = replace(CLASSIFIER, labels=("relevance",))


@pytest.mark.parametrize(
    ("arch", "problem", "scoring"),
    [
        (CLASSIFIER, None, "softmax"),
        (CLASSIFIER, "single_label_classification", "softmax"),
        (CLASSIFIER, "multi_label_classification", "sigmoid"),
        (CLASSIFIER, "regression", "none"),
        (ONE, None, "sigmoid"),
        (ONE, "single_label_classification", "sigmoid"),
        (ONE, "regression", "none"),
    ],
)
def test_a_problem_says_what_the_numbers_of_labels_mean(
    arch: EncoderArchitecture, problem: str | None, scoring: str
) -> None:
    assert read_use({"problem_type": problem}, arch).scoring == scoring


@pytest.mark.parametrize("problem", ["ranking", 3, ["regression"]])
def test_an_unknown_problem_is_refused(problem: object) -> None:
    with pytest.raises(CheckpointError, match=r"problem_type = .*: must be one of single_label"):
        read_use({"problem_type": problem}, CLASSIFIER)


@pytest.mark.parametrize(
    ("config", "smaller"),
    [
        ({}, ()),
        ({"is_matryoshka": False}, ()),
        ({"is_matryoshka": True}, range(1, TINY.width)),
        ({"matryoshka_dimensions": [64, 16, 32, 16]}, (16, 32)),
        ({"is_matryoshka": True, "matryoshka_dimensions": [8]}, (8,)),
    ],
)
def test_vectors_may_be_cut_where_the_config_says_so(
    config: dict[str, object], smaller: Collection[int]
) -> None:
    assert read_use(config, TINY).smaller_dimensions == smaller


@pytest.mark.parametrize("listed", [[0], [65], [], "16", [True], 65])
def test_a_dimension_that_the_model_lacks_is_refused(listed: object) -> None:
    with pytest.raises(CheckpointError, match=r"matryoshka_dimensions = .*: must be from 1 to 64"):
        read_use({"matryoshka_dimensions": listed}, TINY)


def test_a_bundle_keeps_what_a_config_says_and_nothing_where_it_says_nothing(
    tmp_path: Path,
) -> None:
    write_use({"hidden_size": 64, "problem_type": None}, CLASSIFIER, tmp_path)
    assert not (tmp_path / USE_FILE).exists()
    for arch, config in (
        (CLASSIFIER, {"problem_type": "multi_label_classification", "hidden_size": 64}),
        (TINY, {"matryoshka_dimensions": [16, 8]}),
        (TINY, {"is_matryoshka": True}),
    ):
        write_use(config, arch, tmp_path)
        assert kept_use(tmp_path, arch) == read_use(config, arch)
        assert "hidden_size" not in (tmp_path / USE_FILE).read_text()


@pytest.mark.parametrize("kept", ["[]", "{", '{"hidden_size": 3}', '{"problem_type": "x"}'])
def test_what_was_not_kept_by_us_is_refused(kept: str, tmp_path: Path) -> None:
    (tmp_path / USE_FILE).write_text(kept)
    with pytest.raises(CheckpointError):
        kept_use(tmp_path, CLASSIFIER)


def test_a_problem_that_nobody_knows_is_refused_when_it_is_kept(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="problem_type = 'ranking'"):
        write_use({"problem_type": "ranking"}, CLASSIFIER, tmp_path)
