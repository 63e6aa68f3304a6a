"""Put the `benchmarks` folder on the import path: its programs are not part of the distribution."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
