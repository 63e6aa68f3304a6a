"""`ThreadLimit`: fewer threads while a model is loaded, without compiling it again.

OpenVINO fixes threads when it compiles. But they are oneTBB's, whose workers can be held back for
the whole process, and the native layer, which is linked with the same library, can ask for that.
So without that layer there is no limit, nor is there with ONNX Runtime, whose threads are its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

SetThreads = Callable[[ctypes.c_int32], int]
"""`tidegate_openvino_threads`."""


class ThreadLimit:
    """Of every model in the process: nothing but the last call counts."""

    def __init__(self, set_threads: SetThreads) -> None:
        self._set = set_threads

    def use(self, threads: int | None) -> int:
        """Let so many threads work from now on, also in a step that runs; None: all there are.

        Returns:
            How many may work now, in a process whatever its models were compiled for.
        """
        assert threads is None or threads > 0
        return int(self._set(ctypes.c_int32(threads or 0)))


def thread_limit(operation: Path) -> ThreadLimit | None:
    """That of a loaded extension; None if it was built before it had one."""
    try:
        function = ctypes.CDLL(str(operation)).tidegate_openvino_threads
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = [ctypes.c_int32], ctypes.c_int32
    return ThreadLimit(function)
