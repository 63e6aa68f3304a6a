"""The native libraries of this checkout, built from source where there is a compiler."""

from __future__ import annotations

import functools
import importlib
import subprocess
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_FOLDER = _ROOT / "kernels" / "native" / "build" / "tidegate_native"


@functools.cache
def native_folder() -> Path:
    """The folder of the libraries; skips the test where they cannot be built."""
    script = _ROOT / "scripts" / "build-native"
    if script.is_file():
        subprocess.run([script], check=True)
    if not (_FOLDER / "tidegate_openvino.json").is_file():
        pytest.skip("the native layer is not built: that needs a C++ compiler, CMake and openvino")
    importlib.invalidate_caches()  # the folder may not have been there when it was looked for
    return _FOLDER
