"""How much memory this process may still take: the machine's, or its control group's if less."""

from __future__ import annotations

from pathlib import Path

_KIB = 1024


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes, or None where the system does not say.

    Args:
        root: of the file system, for tests.
    """
    found = [one for one in (_machine(root), _group(root)) if one is not None]
    return min(found, default=None)


def _machine(root: Path) -> int | None:
    """`MemAvailable` of proc(5): what can be taken without swapping."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeError):
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * _KIB
    return None


def _group(root: Path) -> int | None:
    """What the limit of a container leaves: `memory.max` less `memory.current` of cgroup v2."""
    folder = root / "sys/fs/cgroup"
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = (folder / "memory.current").read_text(encoding="ascii").strip()
    except (OSError, UnicodeError):
        return None
    return max(0, int(limit) - int(used)) if limit.isdecimal() and used.isdecimal() else None
