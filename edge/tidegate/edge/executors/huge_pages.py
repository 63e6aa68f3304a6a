"""Memory in huge pages: what every decode step reads from end to end.

With pages of 4 KiB a read from memory stops at every page for a table walk, which a virtual machine
makes longer, and the processor fetches ahead within a page only: two threads of Zen 4 read 640 MiB
at 20 to 29 GB/s from small pages and at 32 to 34 GB/s from huge ones. Linux gives huge pages to who
asks for them ("madvise", the usual setting); where it does not, these are plain pages.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

HUGE_BYTES: Final = 2 << 20


def huge_memory(nbytes: int) -> npt.NDArray[np.uint8]:
    """Memory [nbytes] that begins at a huge page; its pages are taken when they are written.

    numpy asks Linux for huge pages where an array is large (NUMPY_MADVISE_HUGEPAGE).
    """
    whole = np.empty(nbytes + HUGE_BYTES, np.uint8)
    start = -whole.ctypes.data % HUGE_BYTES
    return whole[start : start + nbytes]
