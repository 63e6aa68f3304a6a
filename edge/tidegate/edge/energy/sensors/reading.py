"""Small files of the kernel, read with a bound; what cannot be read says which file and why.

Paths are globbed under a `sysroot`, so that tests read trees of their own.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Final

from tidegate.errors import SensorError

_MOST_BYTES: Final = 4096
"""Of an attribute of sysfs: one page."""
_NUMBER: Final = re.compile(r"[+-]?[0-9]{1,19}")


def matches(sysroot: Path, pattern: str) -> tuple[Path, ...]:
    """What lies below `sysroot` at `pattern`, a pattern from the root; in order of name."""
    found = glob.glob(pattern.lstrip("/"), root_dir=sysroot)
    return tuple(sysroot / one for one in sorted(found))


def read_text(file: Path, mend: str = "") -> str:
    """The file's text without white space around it; bytes that are no text are replaced.

    Args:
        file: to be read.
        mend: what its reader can do where permission is denied.

    Raises:
        SensorError: it is not there, or cannot be read.
    """
    try:
        # A pipe or a device in the place of a file must not block.
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            data = os.read(handle, _MOST_BYTES)
        finally:
            os.close(handle)
    except PermissionError as error:
        raise SensorError(f"{file}: permission denied{mend and '; '}{mend}") from error
    except OSError as error:
        raise SensorError(f"{file}: {error.strerror or 'cannot be read'}") from error
    return data.decode("utf-8", "replace").strip(" \t\r\n\0")


def read_number(file: Path, mend: str = "") -> int:
    """The whole number that the file holds.

    Raises:
        SensorError: it cannot be read, or holds something else.
    """
    text = read_text(file, mend)
    if _NUMBER.fullmatch(text) is None:
        raise SensorError(f"{file}: {text[:24]!r} is not a whole number")
    return int(text)


def read_text_if(file: Path) -> str | None:
    """As `read_text`; None where there is no such file."""
    return read_text(file) if file.exists() else None


def read_number_if(file: Path) -> int | None:
    """As `read_number`; None where there is no such file."""
    return read_number(file) if file.exists() else None
