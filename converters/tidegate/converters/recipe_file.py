"""Recipe files: TOML read strictly, with every default filled in, and the presets.

What a file may say is in docs/recipes.md. An unknown key, a wrong value or an unknown pass is an
error that names the file, the key, the value and what is allowed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from tidegate.converters.passes import find_pass, known_passes
from tidegate.errors import ConfigError
from tidegate.model.blocks import linear_roles
from tidegate.model.recipe import (
    Format,
    FormatRule,
    GroupSize,
    Option,
    PassSpec,
    Precision,
    Recipe,
    matches,
)
from tidegate.model.registry import AnyArchitecture
from tidegate.model.roles import roles

TABLES = ("embed", "positions", "token_types", "head", "classifier", "layers.*.router")
"""At 4 bits these cost far more quality than they save; not every model has each of them."""

TABLE_BITS: Literal[8] = 8
ROW = "row"
"""`group_size` of one scale for a whole row."""

_LEAST_BPW, _MOST_BPW = 4.0, 32.0
_PRESETS = "presets"


def preset_names() -> tuple[str, ...]:
    """The recipes that come with the package, sorted."""
    folder = resources.files("tidegate.converters").joinpath(_PRESETS)
    return tuple(sorted(Path(one.name).stem for one in folder.iterdir() if one.is_file()))


def load_recipe(name_or_path: str) -> Recipe:
    """The preset of that name, or the recipe in that TOML file.

    Raises:
        ConfigError: there is neither, or the file is wrong; names the key and what is allowed.
    """
    if name_or_path in preset_names():
        preset = resources.files("tidegate.converters") / _PRESETS / f"{name_or_path}.toml"
        return parse_recipe(preset.read_text(encoding="utf-8"), f"{name_or_path}.toml")
    path = Path(name_or_path)
    if not path.is_file():
        allowed = f"one of {', '.join(preset_names())}, or a TOML file"
        raise ConfigError("recipe", name_or_path, allowed)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("recipe", name_or_path, f"a readable UTF-8 file ({error})") from error
    return parse_recipe(text, path.name)


def parse_recipe(text: str, file: str) -> Recipe:
    """Read the text of a recipe file, called `file` in messages.

    Raises:
        ConfigError: as `load_recipe`.
    """
    try:
        body = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(file, str(error), "TOML") from error
    _check_keys(body, ("name", "target_bpw", "formats", "passes"), file)
    name = _text(body.get("name"), f"{file}: name")
    rules = [
        _rule(one, f"{file}: formats[{place}]")
        for place, one in enumerate(_tables(body.get("formats", []), f"{file}: formats"))
    ]
    passes = tuple(
        _pass(one, f"{file}: passes[{place}]")
        for place, one in enumerate(_tables(body.get("passes", []), f"{file}: passes"))
    )
    target = _target(body.get("target_bpw"), f"{file}: target_bpw")
    return Recipe(name=name, formats=with_tables(rules), passes=passes, target_bpw=target)


def with_tables(rules: Collection[FormatRule]) -> tuple[FormatRule, ...]:
    """The rules, with one for all that is left at the end and one for `TABLES` before it."""
    named = [rule for rule in rules if "*" not in rule.match]
    rest = next((rule for rule in rules if "*" in rule.match), None)
    rest = rest or FormatRule(match=("*",), format=Format())
    bits = rest.format.bits if rest.format.bits > TABLE_BITS else TABLE_BITS
    tables = FormatRule(match=TABLES, format=replace(rest.format, bits=bits))
    return (*named, tables, rest)


def check_patterns(recipe: Recipe, arch: AnyArchitecture) -> None:
    """Every pattern of a recipe matches something in the model.

    Raises:
        ConfigError: one does not, and is none of `TABLES`, which not every model has.
    """
    layers = linear_roles(arch)
    for rule in recipe.formats:
        _check_match(rule.match, layers, f"recipe {recipe.name!r}: formats: match")
    for one in recipe.passes:
        _check_match(one.match, roles(arch), f"recipe {recipe.name!r}: {one.kind}: match")


def _check_match(patterns: tuple[str, ...], names: Collection[str], where: str) -> None:
    for pattern in patterns:
        if pattern not in TABLES and not any(matches(name, (pattern,)) for name in names):
            parts = sorted({name.split(".", 2)[-1] for name in names})
            raise ConfigError(
                where, pattern, f"a pattern of some of layers.*.{{{','.join(parts)}}}"
            )


def _rule(body: Mapping[str, object], where: str) -> FormatRule:
    _check_keys(body, ("match", "bits", "group_size", "symmetric"), where)
    plain = Format()
    bits = _choice(Precision, body.get("bits", plain.bits), f"{where}.bits")
    size = body.get("group_size", plain.group_size)
    allowed = (*get_args(GroupSize), ROW)
    if not any(size == one and type(size) is type(one) for one in allowed):
        raise ConfigError(f"{where}.group_size", size, f"one of {_listed(allowed)}")
    if size == ROW and bits == 4:
        raise ConfigError(f"{where}.group_size", size, "32, 64 or 128 with bits = 4")
    symmetric = body.get("symmetric", plain.symmetric)
    if not isinstance(symmetric, bool):
        raise ConfigError(f"{where}.symmetric", symmetric, "true or false")
    return FormatRule(
        match=_patterns(body.get("match", ["*"]), f"{where}.match"),
        format=Format(
            bits=cast(Precision, bits),
            group_size=None if size == ROW else cast(GroupSize, size),
            symmetric=symmetric,
        ),
    )


def _pass(body: Mapping[str, object], where: str) -> PassSpec:
    kind = _text(body.get("kind"), f"{where}.kind")
    module = find_pass(kind)
    if module is None:
        raise ConfigError(f"{where}.kind", kind, f"one of {_listed(known_passes())}")
    given = {key: value for key, value in body.items() if key not in ("kind", "match")}
    options = _options(module.Options, given, f"{where} ({kind})")
    match = _patterns(body.get("match", ["*"]), f"{where}.match")
    return PassSpec(kind=kind, match=match, options=options)


def _options(kind: type, given: Mapping[str, object], where: str) -> dict[str, Option]:
    """Every option of a pass: those given, checked against the annotations, and the defaults."""
    assert is_dataclass(kind)
    known = [field.name for field in fields(kind)]
    assert all(field.default is not MISSING for field in fields(kind)), f"{kind}: defaults"
    _check_keys(given, known, where)
    hints = get_type_hints(kind)
    values = {key: _value(hints[key], value, f"{where}.{key}") for key, value in given.items()}
    try:
        return cast(dict[str, Option], asdict(kind(**values)))
    except ConfigError as error:
        allowed = str(error).partition(": must be ")[2]
        raise ConfigError(f"{where}.{error.setting}", values.get(error.setting), allowed) from error


def _value(kind: Any, value: object, where: str) -> object:
    if get_origin(kind) is Literal:
        return _choice(kind, value, where)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(where, value, _KIND_NAMES.get(kind, str(kind)))
    return value


_KIND_NAMES: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
}


def _choice(kind: Any, value: object, where: str) -> object:
    allowed = get_args(kind)
    if not any(value == one and type(value) is type(one) for one in allowed):
        raise ConfigError(where, value, f"one of {_listed(allowed)}")
    return value


def _target(value: object, where: str) -> float | None:
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not _LEAST_BPW < cast(float, value) <= _MOST_BPW:
        allowed = f"bits per weight above {_LEAST_BPW:g} and at most {_MOST_BPW:g}"
        raise ConfigError(where, value, allowed)
    return float(cast(float, value))


def with_target(recipe: Recipe, target_bpw: float) -> Recipe:
    """The recipe with another target; `ConfigError` when no mixture of formats could meet it."""
    return replace(recipe, target_bpw=_target(target_bpw, "target-bpw"))


def _patterns(value: object, where: str) -> tuple[str, ...]:
    fits = isinstance(value, list) and bool(value)
    if not fits or not all(isinstance(one, str) and one for one in cast(list[object], value)):
        raise ConfigError(where, value, 'a list of patterns such as ["layers.*.down"]')
    return tuple(cast(list[str], value))


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(where, value, "a string")
    return value


def _tables(value: object, where: str) -> list[dict[str, object]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ConfigError(where, value, "tables, written [[...]]")
    return value


def _check_keys(body: Mapping[str, object], known: Collection[str], where: str) -> None:
    for key in body:
        if key not in known:
            raise ConfigError(f"{where}.{key}", body[key], f"left out: known are {_listed(known)}")


def _listed(allowed: Collection[object]) -> str:
    return ", ".join(str(one) for one in allowed) or "none"
