"""Where the buckets of histograms end: vLLM's bounds, and finer ones where theirs begin too late.

A device's queue takes milliseconds, and a GPU's token less than ten; vLLM's first bounds are 0.3 s
and 0.01 s. `tidegate.api.exposition` leaves the finer ones out under vLLM's names.
"""

from __future__ import annotations

from typing import Final

Buckets = tuple[float, ...]

_TTFT_FINE: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75)
_TTFT_COARSE: Final = (1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
TTFT_S: Final[Buckets] = _TTFT_FINE + _TTFT_COARSE

_TOKEN_FINE: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)
_TOKEN_COARSE: Final = (1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
VLLM_TOKEN_S: Final[Buckets] = _TOKEN_FINE + _TOKEN_COARSE
TOKEN_S: Final[Buckets] = (0.001, 0.002, 0.005, *VLLM_TOKEN_S)

_REQUEST_FINE: Final = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0)
_REQUEST_COARSE: Final = (40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
VLLM_REQUEST_S: Final[Buckets] = _REQUEST_FINE + _REQUEST_COARSE
REQUEST_S: Final[Buckets] = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, *VLLM_REQUEST_S)

COUNTS: Final[Buckets] = tuple(
    float(mantissa * 10**exponent) for exponent in range(6) for mantissa in (1, 2, 5)
)
"""Of tokens: 1, 2, 5 to half a million. vLLM ends where its model's context does."""

CHOICES: Final[Buckets] = (1.0, 2.0, 5.0, 10.0, 20.0)
