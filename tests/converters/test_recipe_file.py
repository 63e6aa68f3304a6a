"""Recipe files: what they may say, what is filled in, and that every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from tinymodel import tiny_architecture

from tidegate.converters.passes import known_passes
from tidegate.converters.recipe_file import (
    TABLES,
    check_patterns,
    load_recipe,
    parse_recipe,
    preset_names,
    with_target,
)
from tidegate.errors import ConfigError
from tidegate.model.recipe import Format, format_of

FULL = """
name = "mine"
target_bpw = 5

[[formats]]
match = ["layers.*.down", "layers.0.*"]
bits = 8
group_size = "row"
symmetric = true

[[formats]]
match = ["layers.1.q"]
bits = 32

[[passes]]
kind = "rtn"
match = ["layers.*"]
clip = false

[[passes]]
kind = "gptq"
"""


def test_a_recipe_is_read_with_every_default_filled_in() -> None:
    recipe = parse_recipe(FULL, "mine.toml")
    assert (recipe.name, recipe.target_bpw) == ("mine", 5.0)
    assert format_of(recipe, "layers.3.down") == Format(bits=8, group_size=None, symmetric=True)
    assert format_of(recipe, "layers.1.q") == Format(bits=32)
    assert format_of(recipe, "layers.1.k") == Format(bits=4, group_size=64, symmetric=False)
    rtn, gptq = recipe.passes
    assert (rtn.kind, rtn.match, rtn.options) == ("rtn", ("layers.*",), {"clip": False})
    assert gptq.match == ("*",)
    assert gptq.options == {"damping": 0.01}


def test_tables_have_8_bits_unless_a_rule_names_them() -> None:
    plain = parse_recipe('name = "x"\n[[formats]]\nmatch = ["*"]\ngroup_size = 32', "x")
    for table in ("embed", "head", "positions", "classifier", "layers.2.router"):
        assert format_of(plain, table) == Format(bits=8, group_size=32)
    small = parse_recipe('name = "x"\n[[formats]]\nmatch = ["embed"]\ngroup_size = 32', "x")
    assert format_of(small, "embed") == Format(bits=4, group_size=32)
    assert format_of(small, "head") == Format(bits=8, group_size=64)
    dense = parse_recipe('name = "x"\n[[formats]]\nmatch = ["*"]\nbits = 32', "x")
    assert format_of(dense, "embed").bits == 32


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("name = ", "x.toml = "),
        ("nam = 'x'", "x.toml.nam = 'x': must be left out: known are name, target_bpw"),
        ("target_bpw = 5", "x.toml: name = None: must be a string"),
        ("name = 'x'\ntarget_bpw = 2", "x.toml: target_bpw = 2: must be bits per weight above 4"),
        ("name = 'x'\ntarget_bpw = true", "target_bpw = True: must be"),
        ("name = 'x'\nformats = 3", "x.toml: formats = 3: must be tables"),
        ("name = 'x'\n[[formats]]\nbits = 5", "formats[0].bits = 5: must be one of 4, 8, 32"),
        ("name = 'x'\n[[formats]]\nbits = 4.0", "formats[0].bits = 4.0: must be one of 4, 8, 32"),
        ("name = 'x'\n[[formats]]\ngroup_size = 16", "group_size = 16: must be one of 32, 64"),
        ("name = 'x'\n[[formats]]\ngroup_size = 'row'", "must be 32, 64 or 128 with bits = 4"),
        ("name = 'x'\n[[formats]]\nsymmetric = 1", "formats[0].symmetric = 1: must be true"),
        ("name = 'x'\n[[formats]]\nmatch = 'embed'", "formats[0].match = 'embed': must be a list"),
        ("name = 'x'\n[[formats]]\nmatch = []", "formats[0].match = []: must be a list"),
        ("name = 'x'\n[[formats]]\nsize = 1", "formats[0].size = 1: must be left out"),
        ("name = 'x'\n[[passes]]\nkind = 'magic'", "passes[0].kind = 'magic': must be one of"),
        ("name = 'x'\n[[passes]]\nkind = 'base'", "passes[0].kind = 'base': must be one of"),
        ("name = 'x'\n[[passes]]\nclip = true", "passes[0].kind = None: must be a string"),
        (
            "name = 'x'\n[[passes]]\nkind = 'rtn'\nclip = 1",
            "passes[0] (rtn).clip = 1: must be true or false",
        ),
        (
            "name = 'x'\n[[passes]]\nkind = 'rtn'\ndamping = 1",
            "passes[0] (rtn).damping = 1: must be left out: known are clip",
        ),
        (
            "name = 'x'\n[[passes]]\nkind = 'gptq'\ndamping = 7",
            "passes[0] (gptq).damping = 7.0: must be above 0 and at most 1",
        ),
        (
            "name = 'x'\n[[passes]]\nkind = 'scale_estimation'\nrounding = 'up'",
            "passes[0] (scale_estimation).rounding = 'up': must be one of feedback, nearest",
        ),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(text: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(text, "x.toml")
    assert named in str(caught.value)
    assert str(caught.value).startswith("x.toml")


def test_a_pattern_that_matches_nothing_is_named() -> None:
    arch = tiny_architecture()
    check_patterns(parse_recipe(FULL, "mine.toml"), arch)
    for section in ("formats", "passes"):
        kind = 'kind = "rtn"' if section == "passes" else ""
        text = f'name = "x"\n[[{section}]]\nmatch = ["layers.*.downn"]\n{kind}'
        with pytest.raises(ConfigError, match=r"match = 'layers\.\*\.downn': must be"):
            check_patterns(parse_recipe(text, "x.toml"), arch)
    text = 'name = "x"\n[[formats]]\nmatch = ["layers.7.*"]'
    with pytest.raises(ConfigError, match=r"'layers\.7\.\*'"):
        check_patterns(parse_recipe(text, "x.toml"), arch)


def test_a_table_that_only_other_models_have_is_no_mistake() -> None:
    listed = ", ".join(f'"{one}"' for one in TABLES)
    text = f'name = "x"\n[[formats]]\nmatch = [{listed}]'
    check_patterns(parse_recipe(text, "x.toml"), tiny_architecture())


@pytest.mark.parametrize("name", ["fast", "balanced", "quality", "tiny"])
def test_a_preset_is_valid_and_named_as_its_file(name: str) -> None:
    assert name in preset_names()
    recipe = load_recipe(name)
    assert recipe.name == name
    for tied in (True, False):
        check_patterns(recipe, tiny_architecture(tied_head=tied))


def test_a_recipe_is_found_by_its_name_or_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(FULL)
    assert load_recipe(str(path)).name == "mine"
    with pytest.raises(ConfigError, match=r"recipe = 'best': must be one of .*fast.*TOML file"):
        load_recipe("best")
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_recipe(str(path))


def test_a_target_can_be_given_to_any_recipe() -> None:
    assert with_target(load_recipe("fast"), 5.5).target_bpw == 5.5
    with pytest.raises(ConfigError, match="target-bpw = 3"):
        with_target(load_recipe("fast"), 3)


def test_every_pass_has_defaults_and_says_whether_it_needs_data() -> None:
    assert {"rtn", "gptq", "awq", "clip"} <= set(known_passes())
    for kind in known_passes():
        recipe = parse_recipe(f'name = "x"\n[[passes]]\nkind = "{kind}"', "x.toml")
        assert recipe.passes[0].kind == kind
