"""The library of profiles: those that come with the package, a site's overlays, a calibration.

Each lays over the one before: what a profile extends, the profile, overlays in the order of their
names, the calibration. Measured values so override seeds.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from tidegate.edge.energy.profile import SCHEMA_VERSION, FittedCosts, Profile
from tidegate.edge.energy.profile_checks import check_costs, check_profile
from tidegate.edge.energy.profile_decode import Origins, ProfileError, decode
from tidegate.edge.energy.profile_merge import Layer, chain, inherit, merge, only
from tidegate.errors import ConfigError

OVERLAYS: Final = Path("/etc/tidegate/profile.d")
CALIBRATION: Final = Path("/var/lib/tidegate/calibration.toml")
CALIBRATED_KEYS: Final = (
    *("schema", "applies_to", "status"),
    *("energy", "thermal", "calibration", "cost", "sources"),
)
"""What a calibration may say: what was measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """All profiles by id, unread until one is asked for."""

    profiles: dict[str, Layer]
    overlays: tuple[Layer, ...] = ()
    """Including the calibration, last."""

    def ids(self) -> tuple[str, ...]:
        """Profiles of boards, sorted; abstract ones are left out."""
        real = (one for one, layer in self.profiles.items() if not _is_abstract(layer))
        return tuple(sorted(real))

    def profile(self, wanted: str) -> Profile:
        """The profile of that id.

        Raises:
            ConfigError: there is none.
            ProfileError: one of its files is wrong; names file and key.
        """
        if wanted not in self.ids():
            raise ConfigError("profile", wanted, f"one of {', '.join(self.ids())}")
        over = [one for one in self.overlays if one.table["applies_to"] == wanted]
        table, origins = merge([*inherit(chain(wanted, self.profiles)), *over])
        table = {key: value for key, value in table.items() if key != "applies_to"}
        profile = decode(Profile, table, origins)
        check_profile(profile, origins)
        return profile

    def every(self) -> tuple[Profile, ...]:
        """All profiles of boards, by id; raises as `profile` does."""
        return tuple(map(self.profile, self.ids()))

    def files_of(self, wanted: str) -> tuple[str, ...]:
        """The files that `profile(wanted)` is made of, first to last."""
        over = (one.file for one in self.overlays if one.table["applies_to"] == wanted)
        return (*(one.file for one in chain(wanted, self.profiles)), *over)


def read_library(overlays: Path = OVERLAYS, calibration: Path | None = CALIBRATION) -> Library:
    """Parse every file; neither folder nor calibration has to be there, and None leaves one out.

    A file of the folder is a profile of its own if it has an `id`, else it lays over the one that
    `applies_to` names.

    Raises:
        ProfileError: a file cannot be read, an id appears twice, or an overlay is of no profile.
    """
    library = _joined(list(_packaged()), [], list(_site_files(overlays)))
    if calibration is None or not calibration.exists():
        return library
    measured = _parse(str(calibration), calibration.read_bytes)
    only(measured, CALIBRATED_KEYS)
    return _joined(list(library.profiles.values()), library.overlays, [measured])


def read_fitted(calibration: Path, profile_id: str) -> tuple[FittedCosts, ...]:
    """The fitted costs of one calibration file, which need not exist.

    Raises:
        ProfileError: it is wrong, or of another board than `profile_id`.
    """
    if not calibration.exists():
        return ()
    layer = _parse(str(calibration), calibration.read_bytes)
    only(layer, CALIBRATED_KEYS)
    if layer.table.get("applies_to") != profile_id:
        allowed = f"{profile_id!r}, the board that it is used on"
        raise ProfileError(f"{layer.file}: applies_to", layer.table.get("applies_to"), allowed)
    origins = Origins(files={(): layer.file})
    tables = layer.table.get("cost", [])
    if not isinstance(tables, list):
        raise origins.error(("cost",), tables, "an array")
    fitted = tuple(
        decode(FittedCosts, one, origins, ("cost", f"[{n}]")) for n, one in enumerate(tables)
    )
    check_costs(fitted, origins)
    return fitted


def check_calibration(file: Path, profile_id: str) -> None:
    """Raise `ProfileError` unless the file can be read as a calibration of that board."""
    read_fitted(file, profile_id)
    table, origins = _parse(str(file), file.read_bytes).table, Origins(files={(): str(file)})
    for key in ("sources", "calibration", "energy", "thermal"):
        if not isinstance(table.get(key, {}), dict):
            raise origins.error((key,), table[key], "a table")


def with_files(library: Library, files: Iterable[Path]) -> Library:
    """The library and further files, as if they were the last of the folder; raises as reading."""
    more = [_parse(str(file), file.read_bytes) for file in files]
    return _joined(list(library.profiles.values()), library.overlays, more)


def _joined(profiles: list[Layer], overlays: Iterable[Layer], more: list[Layer]) -> Library:
    own = [layer for layer in more if "applies_to" not in layer.table]
    over = [layer for layer in more if "applies_to" in layer.table]
    library = Library(profiles=_by_id([*profiles, *own]), overlays=(*overlays, *over))
    for layer in over:
        _check_overlay(layer, library)
    return library


def _packaged() -> Iterator[Layer]:
    folder = resources.files("tidegate.profiles")
    for one in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if one.name.endswith(".toml"):
            yield _parse(one.name, one.read_bytes)


def _site_files(folder: Path) -> Iterator[Layer]:
    if folder.is_dir():
        for file in sorted(folder.glob("*.toml")):
            yield _parse(str(file), file.read_bytes)


def _parse(name: str, read: Callable[[], bytes]) -> Layer:
    try:
        table = tomllib.loads(read().decode("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(
            name, "unreadable", f"a readable TOML file in UTF-8 ({error})"
        ) from error
    version = table.get("schema")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise ProfileError(f"{name}: schema", version, f"{SCHEMA_VERSION}")
    return Layer(file=name, table=table)


def _by_id(layers: Iterable[Layer]) -> dict[str, Layer]:
    found: dict[str, Layer] = {}
    for layer in layers:
        own = layer.table.get("id")
        if not isinstance(own, str):
            raise ProfileError(f"{layer.file}: id", own, "a text, unless applies_to is given")
        if own in found:
            raise ProfileError(f"{layer.file}: id", own, f"new: {found[own].file} has it")
        found[own] = layer
    return found


def _check_overlay(layer: Layer, library: Library) -> None:
    wanted = layer.table.get("applies_to")
    if wanted not in library.ids():
        allowed = f"one of {', '.join(library.ids())}"
        raise ProfileError(f"{layer.file}: applies_to", wanted, allowed)
    for key in ("id", "extends", "abstract"):
        if key in layer.table:
            value = layer.table[key]
            raise ProfileError(f"{layer.file}: {key}", value, "absent beside applies_to")


def _is_abstract(layer: Layer) -> bool:
    return layer.table.get("abstract") is True
