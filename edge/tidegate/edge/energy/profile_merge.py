"""Files of profiles, laid over one another: tables merge key by key, everything else is replaced.

Pure. A number that a file overrides loses the source it had, so that the file has to name its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tidegate.edge.energy.profile import ALL_KEYS
from tidegate.edge.energy.profile_decode import Origins, Path, ProfileError, dotted

Table = Mapping[str, Any]

OWN_KEYS: Final = ("title", "abstract", "status", "detect")
"""What a profile never takes from the one it extends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One parsed file."""

    file: str
    table: Table


def inherit(layers: Sequence[Layer]) -> list[Layer]:
    """The layers of a chain without what only the last may say; the root of the chain is first."""
    *parents, own = layers
    without = (
        Layer(file=one.file, table={k: v for k, v in one.table.items() if k not in OWN_KEYS})
        for one in parents
    )
    return [*without, own]


def merge(layers: Sequence[Layer]) -> tuple[dict[str, Any], Origins]:
    """One table of all layers, later ones winning, and the file of every key."""
    merged: dict[str, Any] = {}
    files: dict[Path, str] = {(): layers[-1].file}
    for layer in layers:
        _lay(merged, layer.table, layer.file, (), files)
    return merged, Origins(files=files)


def chain(of: str, library: Mapping[str, Layer]) -> list[Layer]:
    """The profile's layer after those it extends, the root first.

    Raises:
        ProfileError: `extends` names no profile, or leads back to one it came from.
    """
    ids, found = [of], [library[of]]
    while (parent := found[0].table.get("extends")) is not None:
        where = f"{found[0].file}: extends"
        if not isinstance(parent, str) or parent not in library:
            raise ProfileError(where, parent, f"a profile: one of {', '.join(sorted(library))}")
        if parent in ids:
            raise ProfileError(where, parent, f"no circle ({' -> '.join([*ids, parent])})")
        ids.append(parent)
        found.insert(0, library[parent])
    return found


def only(layer: Layer, allowed: Sequence[str]) -> None:
    """Raise `ProfileError` if the file has a key that it may not set."""
    for key, value in layer.table.items():
        if key not in allowed:
            known = ", ".join(allowed)
            raise ProfileError(
                f"{layer.file}: {dotted((key,))}", value, f"absent; known are {known}"
            )


def _lay(into: dict[str, Any], table: Table, file: str, path: Path, files: dict[Path, str]) -> None:
    """Merge `table` into `into`, and remember that `file` brought its keys."""
    sources = _sources_by_key(table)
    if sources is not None:
        before = into.get("src", {})
        kept = {key: name for key, name in before.items() if key not in table}
        into["src"] = kept | sources
        files[(*path, "src")] = file
    elif isinstance(into.get("src"), dict):
        into["src"] = {key: name for key, name in into["src"].items() if key not in table}
    for key, value in table.items():
        if key == "src" and sources is not None:
            continue
        files[(*path, key)] = file
        if isinstance(value, dict):
            inner = into.get(key)
            into[key] = dict(inner) if isinstance(inner, dict) else {}
            _lay(into[key], value, file, (*path, key), files)
        else:
            _forget(files, (*path, key))
            into[key] = value


def _forget(files: dict[Path, str], path: Path) -> None:
    """Drop what was known below a key that is replaced as a whole."""
    for known in [one for one in files if len(one) > len(path) and one[: len(path)] == path]:
        del files[known]


def _sources_by_key(table: Table) -> dict[str, str] | None:
    """`src` of one file with `*` written out over the file's own keys; None where there is none."""
    src = table.get("src")
    if isinstance(src, str):
        src = {ALL_KEYS: src}
    if not isinstance(src, dict):
        return None  # absent, or mistyped, which decoding reports
    everything = src.get(ALL_KEYS)
    wide = {} if everything is None else {key: everything for key in table if key != "src"}
    return wide | {key: name for key, name in src.items() if key != ALL_KEYS}
