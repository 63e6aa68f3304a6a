"""Rotations against transformers' own table of scalings, and the keys that are refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hfcheckpoints import hf_rotation

from tidegate.errors import CheckpointError
from tidegate.model.rope import Rope, longest_context, read_rope

HEAD_SIZE, TRAINED = 32, 4096
SHORT = [1.0 + 0.1 * i for i in range(16)]
LONG = [1.0 + 3.0 * i for i in range(16)]

Scaling = dict[str, Any]
FIXED: dict[str, Scaling] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn-betas": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 20,
        "beta_slow": 2,
    },
    "yarn-not-truncated": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 128,
        "truncate": False,
    },
    "yarn-one-ramp-end": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 6,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
    },
    "yarn-one-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "attention_factor": 0.9,
    },
    "yarn-no-factor": {
        "rope_type": "yarn",
        "factor": None,
        "original_max_position_embeddings": 512,
    },
    "yarn-theta": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "rope_theta": 1e6,
    },
}
LONGROPE: Scaling = {
    "rope_type": "longrope",
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": 512,
}


def rotation(scaling: Scaling, context: int = TRAINED, **outer: object) -> Rope:
    return read_rope(
        {"rope_theta": 5e5, "rope_scaling": scaling, **outer},
        head_size=HEAD_SIZE,
        trained_context=TRAINED,
        context=context,
    )


def assert_same(found: Rope, scaling: Scaling, length: int | None = None) -> None:
    frequencies, magnitude = hf_rotation(
        scaling, theta=5e5, head_size=HEAD_SIZE, trained=TRAINED, length=length
    )
    assert np.allclose(found.frequencies, frequencies, rtol=1e-6, atol=0)
    assert found.magnitude == pytest.approx(magnitude, rel=1e-6)


@pytest.mark.parametrize("scaling", FIXED.values(), ids=FIXED)
@pytest.mark.parametrize("context", [TRAINED, 100])
def test_a_scaling_gives_the_frequencies_of_transformers(scaling: Scaling, context: int) -> None:
    assert_same(rotation(scaling, context), scaling)


@pytest.mark.parametrize("length", [10, TRAINED, TRAINED + 1, 3 * TRAINED])
def test_dynamic_scaling_is_that_of_the_longest_text_served(length: int) -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    assert_same(rotation(scaling, length), scaling, length)


@pytest.mark.parametrize("length", [10, 512, 513, TRAINED])
@pytest.mark.parametrize(
    "more", [{}, {"factor": 4.0}, {"attention_factor": 1.3}, {"factor": 0.5}], ids=str
)
def test_longrope_takes_the_divisors_of_the_longest_text_served(length: int, more: Scaling) -> None:
    assert_same(rotation(LONGROPE | more, length), LONGROPE | more, length)


def test_the_name_of_a_scaling_has_two_keys() -> None:
    old = {"type": "linear", "factor": 3.0}
    assert rotation(old) == rotation({"rope_type": "linear", "factor": 3.0})


def test_the_new_spelling_reads_as_the_old_one() -> None:
    scaling = FIXED["llama3"]
    new = read_rope(
        {"rope_parameters": {**scaling, "rope_theta": 5e5}},
        head_size=HEAD_SIZE,
        trained_context=TRAINED,
        context=TRAINED,
    )
    assert new == rotation(scaling)


def test_of_two_original_contexts_the_one_beside_counts() -> None:
    """As in transformers, which copies it into the scaling before it computes."""
    scaling = FIXED["yarn"]
    both = rotation(scaling, original_max_position_embeddings=2048)
    assert both == rotation({**scaling, "original_max_position_embeddings": 2048})
    assert both != rotation(scaling)


def test_of_two_scalings_the_older_key_counts_and_within_it_theta() -> None:
    linear = {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}
    found = rotation(linear, rope_parameters={"rope_type": "linear", "factor": 5.0})
    assert found.frequencies == tuple(f / 3.0 for f in Rope.plain(100.0, HEAD_SIZE).frequencies)


def test_a_layer_type_has_the_rotation_of_its_own_entry() -> None:
    entries = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    rope = read_rope(
        {"rope_parameters": entries},
        head_size=8,
        trained_context=64,
        context=64,
        kind="sliding_attention",
    )
    assert rope == Rope.plain(1e4, 8)


def test_a_part_of_a_head_is_rotated_by_the_models_that_can() -> None:
    config = {"partial_rotary_factor": 0.5}
    rope = read_rope(config, head_size=32, trained_context=64, context=64, partial=True)
    assert rope == Rope.plain(10000.0, 16)
    with pytest.raises(CheckpointError, match=r"partial_rotary_factor = 0\.5: must be 1"):
        read_rope(config, head_size=32, trained_context=64, context=64)


def test_a_scaling_that_stretches_can_be_served_for_longer() -> None:
    def longest(**scaling: object) -> int:
        return longest_context({"rope_scaling": scaling}, 1000)

    assert longest(rope_type="dynamic", factor=4.0) == 4000
    assert longest(type="linear", factor=2) == 2000
    assert longest(type="yarn", factor=4, original_max_position_embeddings=500) == 2000
    assert longest(type="yarn", factor=4, original_max_position_embeddings=100) == 1000
    assert longest(rope_type="llama3", factor=8.0) == 1000
    assert longest_context({}, 1000) == 1000


@pytest.mark.parametrize(
    ("scaling", "problem"),
    [
        ({"rope_type": "spiral"}, "rope_type = 'spiral': must be one of default, dynamic"),
        ({"rope_type": 3}, "rope_type = 3: must be a string"),
        ({"rope_type": "linear"}, "factor = None: must be a number above 0"),
        ({"rope_type": "linear", "factor": -1}, "factor = -1: must be a number above 0"),
        ({**FIXED["llama3"], "high_freq_factor": 1.0}, "high_freq_factor = 1.0: must be above"),
        ({**LONGROPE, "long_factor": [1.0]}, "long_factor = [1.0]: must be 16 numbers"),
        ({**LONGROPE, "long_factor": ["x"] * 16}, "long_factor = 'x': must be a number above 0"),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "float division by zero"),
        (["linear"], "rope_scaling = ['linear']: must be an object"),
        ({"rope_theta": float("nan")}, "rope_theta = nan: must be a number above 0"),
    ],
)
def test_a_scaling_that_cannot_be_made_is_refused_by_key(scaling: Any, problem: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(problem)):
        rotation(scaling)
