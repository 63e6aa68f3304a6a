"""Kernels that are interpreted are interpreted quickly, in this process's other tests too."""

from __future__ import annotations

import gpus
import quickinterpreter

if gpus.DEVICE == "cpu":
    quickinterpreter.install()
