"""Where kernels of tests run: on the GPU that is there, else interpreted on the CPU."""

from __future__ import annotations

import os
from typing import Final

DEVICE: Final = "cuda" if os.path.exists("/dev/nvidiactl") else "cpu"
