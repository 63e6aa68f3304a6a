"""What bounds every engine here: how fast memory is read.

A decode step reads all weights once, so tokens per second of one stream times their bytes cannot
pass this. Measured as a plain read of a large buffer by as many threads as the engines have:
compiled for this processor where there is a compiler, else numpy's quickest reduction.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

BUFFER_MIB = 512
"""Far beyond the last cache of any device."""
_PASSES = 5
_SOURCE = """
#include <stddef.h>
#include <stdint.h>
uint64_t read_all(const uint64_t *values, size_t count) {
    uint64_t a = 0, b = 0, c = 0, d = 0;
    size_t quarter = count / 4;
    for (size_t i = 0; i < quarter; ++i) {
        a |= values[i];
        b |= values[i + quarter];
        c |= values[i + 2 * quarter];
        d |= values[i + 3 * quarter];
    }
    return a | b | c | d;
}
"""
"""Four streams, as one alone does not keep a core's line buffers busy."""

Values = npt.NDArray[np.uint64]


def read_gb_per_s(threads: int, mib: int = BUFFER_MIB) -> float:
    """The best of a few passes over a buffer, in GB (10^9 bytes) per second."""
    values = np.ones(mib * 2**20 // 8, np.uint64)
    parts = np.array_split(values, threads)
    read = _compiled_read() or np.bitwise_or.reduce
    best_s = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_PASSES):
            began_s = time.perf_counter()
            list(pool.map(read, parts))
            best_s = min(best_s, time.perf_counter() - began_s)
    return values.nbytes / best_s / 1e9


@cache
def _compiled_read() -> Callable[[Values], object] | None:
    """A read compiled for this processor; None where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "read.c", Path(folder) / "read.so"
        source.write_text(_SOURCE)
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-o", str(library)]
        done = subprocess.run([compiler, *flags, str(source)], capture_output=True, check=False)
        if done.returncode != 0:
            return None
        function = ctypes.CDLL(str(library)).read_all
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    function.restype = ctypes.c_uint64
    return lambda values: function(values.ctypes.data, len(values))
