"""The native library of this checkout, built on demand; skipped only where nothing can build it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from nativelinear import NativeLibrary

ROOT = Path(__file__).resolve().parents[3]
BUILT = ROOT / "kernels/native/build/tidegate_native/libtidegate_native.so"


@pytest.fixture(scope="session")
def native() -> NativeLibrary:
    """The library; each process of a test run loads it once."""
    done = subprocess.run(
        [ROOT / "scripts/build-native"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    if "skipped" in done.stderr:
        pytest.skip(done.stderr.strip())
    return NativeLibrary(BUILT)
