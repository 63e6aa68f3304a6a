"""A `config.json` is read or refused with a `CheckpointError`, whatever JSON it holds."""

from __future__ import annotations

import functools
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hfcheckpoints import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import tidegate.model.registry
from tidegate.errors import CheckpointError
from tidegate.model.architecture import Architecture
from tidegate.model.registry import architecture_module, describe, known_model_types

MODEL = Path(tidegate.model.registry.__file__).parent
SHARED = ("llama_like.py", "moe_like.py", "bert_like.py", "rope.py")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su")

# 10 ** 400 is beyond any float, 2 ** 63 beyond an int64.
NUMBERS = st.one_of(
    st.integers(-2, 70),
    st.integers(-(10**400), 10**400),
    st.sampled_from([2**31, 2**63, 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(0.01, 100),
)
WORDS = st.one_of(
    st.text(max_size=5),
    st.sampled_from(["silu", "gelu", "full_attention", "sliding_attention", *ROPE_TYPES]),
)
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS


@functools.cache
def keys_of(*files: str) -> list[str]:
    """Every quoted word of some of the library's own sources: the keys that they read, and more."""
    words = {word for file in files for word in re.findall(r'"(\w+)"', (MODEL / file).read_text())}
    return sorted(words)


ROPE_KEYS = [key for key in keys_of("rope.py") if key != "rope_type"]
ROPES = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(ROPE_TYPES)},
    optional={key: SCALARS | st.lists(NUMBERS, min_size=6, max_size=8) for key in ROPE_KEYS},
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=4),
    ROPES,
    st.fixed_dictionaries({}, optional={"full_attention": ROPES, "sliding_attention": ROPES}),
    st.dictionaries(WORDS, SCALARS | st.lists(SCALARS, max_size=2), max_size=3),
)


@pytest.mark.parametrize("model_type", known_model_types())
@settings(deadline=None, max_examples=40)  # of each of 15, which read most keys by the same code
@given(data=st.data())
def test_any_value_of_any_key_is_read_or_refused(model_type: str, data: st.DataObject) -> None:
    config: dict[str, Any] = tiny_config(model_type)
    keys = {*config, *keys_of(*SHARED, f"architectures/{model_type}.py")}
    changes = st.dictionaries(st.sampled_from(sorted(keys)), VALUES, min_size=1, max_size=3)
    config |= data.draw(changes) | {"model_type": model_type}
    with suppress(CheckpointError):
        arch = describe(config, data.draw(st.none() | st.integers(-5, 100)))
        hash(arch)
        if isinstance(arch, Architecture) and arch.layers < 100:
            architecture_module(model_type).sources(arch, ())
            [arch.attention(layer) for layer in range(arch.layers)]


@pytest.mark.parametrize("model_type", known_model_types())
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_a_config_without_any_of_its_keys_is_read_or_refused(
    model_type: str, data: st.DataObject
) -> None:
    config = tiny_config(model_type)
    kept = data.draw(st.lists(st.sampled_from(sorted(config)), unique=True))
    with suppress(CheckpointError):
        describe({key: config[key] for key in kept} | {"model_type": model_type})


@given(VALUES)
def test_any_model_type_is_known_or_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"model_type|hidden_size"):
        describe({"model_type": value})
