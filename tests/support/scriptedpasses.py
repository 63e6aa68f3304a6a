"""Makes `scripted` a pass that recipes know, and gives the module that the recipes will use."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from tidegate.converters import passes

_FOLDER = str(Path(__file__).parent / "extrapasses")

if _FOLDER not in passes.__path__:
    passes.__path__.append(_FOLDER)

scripted: Any = importlib.import_module("tidegate.converters.passes.scripted").scripted
