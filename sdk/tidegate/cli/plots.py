"""The `--plot` flag: where a page may be written, known before hours of work and not after."""

from __future__ import annotations

from pathlib import Path

from tidegate.errors import ConfigError


def check_plot(path: Path | None) -> None:
    """Refuse a file that is no page, or that has no folder to lie in; None is no plot."""
    if path is None:
        return
    if path.suffix not in (".html", ".htm"):
        raise ConfigError("plot", str(path), "a file that ends in .html")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError("plot", str(path), "a file in a folder that exists")
