"""The calibration file: fitted costs are put in beside what it holds, and it is replaced whole.

A file belongs to one device. Costs of the same model at the same settings are replaced, those of
others stay, and so does everything else that the file says; its comments do not.
"""

from __future__ import annotations

import os
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tidegate.edge.energy.fitted_costs import TRUSTED, worst_error
from tidegate.edge.energy.profile import ALL_KEYS, SCHEMA_VERSION, Calibration, FittedCosts
from tidegate.edge.energy.profile_files import check_calibration
from tidegate.edge.energy.toml_text import toml_text
from tidegate.errors import ConfigError, ExecutionError

SOURCE: Final = "calibrated-here"
_HEADER: Final = "# Written by `tidegate profile calibrate`, which replaces it as a whole.\n"
_SAME: Final = (
    *("weights", "executor", "device", "rows", "threads"),
    *("kv_precision", "native", "providers"),
)
"""What two costs have in common if the newer one replaces the other."""


def read_table(file: Path, *, profile_id: str, device: str) -> dict[str, Any]:
    """What the file holds; empty where there is none.

    Raises:
        ConfigError: it cannot be read, is of another board or another device, or is no calibration
            that a daemon could read.
    """
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        allowed = f"absent, or a calibration file ({error}): remove it, or give another --output"
        raise ConfigError("output", str(file), allowed) from error
    record = table.get("calibration")
    owner = record.get("device") if isinstance(record, dict) else None
    for what, its, ours in (
        ("board", table.get("applies_to"), profile_id),
        ("device", owner, device),
    ):
        if its not in (None, ours):
            allowed = (
                f"of this {what} ({ours}), not of {its!r}: remove it, or give another --output"
            )
            raise ConfigError("output", str(file), allowed)
    try:
        check_calibration(file, profile_id)
    except ConfigError as error:
        allowed = f"a calibration file ({error}): remove it, or give another --output"
        raise ConfigError("output", str(file), allowed) from error
    return table


def with_costs(
    table: Mapping[str, Any],
    costs: FittedCosts,
    record: Calibration,
    *,
    profile_id: str,
    note: str,
) -> dict[str, Any]:
    """`table` with the costs of one model, as a whole file.

    Args:
        table: what the file held.
        costs: to be put in.
        record: of this calibration.
        profile_id: of the board.
        note: of the source that all these numbers name.
    """
    new = _given(asdict(costs))
    key = tuple(new.get(name) for name in _SAME)
    held = table.get("cost", [])
    kept = [one for one in held if tuple(one.get(name) for name in _SAME) != key]
    sources = {**table.get("sources", {}), SOURCE: {"kind": "calibrated", "note": note}}
    return {
        **table,
        "schema": SCHEMA_VERSION,
        "applies_to": profile_id,
        "status": "calibrated",
        "calibration": _given(asdict(record)),
        "cost": [*kept, new],
        "sources": sources,
    }


def check_no_worse(held: Sequence[FittedCosts], new: FittedCosts) -> None:
    """Raise `ExecutionError` if costs that would be replaced are good and the new ones are not."""
    key = tuple(getattr(new, name) for name in _SAME)
    old = [one for one in held if tuple(getattr(one, name) for name in _SAME) == key]
    if worst_error(new) > TRUSTED and any(worst_error(one) <= TRUSTED for one in old):
        raise ExecutionError(
            f"predictions are {worst_error(new):.0%} off what was measured, those of {old[0].date}"
            f" were {worst_error(old[0]):.0%} off: they stay, unless --replace is given; other"
            " programs may have been busy"
        )


def check_writable(file: Path) -> None:
    """Raise `ConfigError` before anything is measured that could then not be kept."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        allowed = f"a file that may be written ({error.strerror}): give another --output"
        raise ConfigError("output", str(file), allowed) from error
    if file.is_dir():
        raise ConfigError("output", str(file), "a file, not a folder")


def write_table(file: Path, table: Mapping[str, Any]) -> None:
    """Replace the file as a whole, or not at all.

    Raises:
        OSError: the disk refused it; the old file is as it was.
    """
    data = (_HEADER + "\n" + toml_text(table)).encode()
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as written:
            written.write(data)
            written.flush()
            os.fsync(written.fileno())
        partial.chmod(0o644)  # the daemon, which may be another user, reads it
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _given(value: Any) -> Any:
    """As a TOML file has it: without what is None or empty, numbers to six digits."""
    if isinstance(value, dict):
        if value.keys() == {ALL_KEYS}:
            return value[ALL_KEYS]
        return {key: _given(one) for key, one in value.items() if one not in (None, {}, ())}
    if isinstance(value, tuple | list):
        return [_given(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
