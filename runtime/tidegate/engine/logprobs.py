"""How likely a token was: log softmax of the raw logits, and the likeliest tokens beside it.

Raw means the model's own distribution, before bias, penalties, masks and temperature, as OpenAI's
and vLLM's are: the numbers say what the model thinks, and are the same for every way to choose. So
a token that a bias or a mask forced may have a very low one, and need not be among the likeliest.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from tidegate.engine.executor import Logits
from tidegate.engine.ranking import heaviest

LEAST: Final = -9999.0
"""Told instead of minus infinity, which JSON cannot say (OpenAI and vLLM tell the same)."""


def score(logits: Logits, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The logprob of `token`, and the `top` likeliest tokens with theirs, likeliest first.

    Args:
        logits: [V] as the model gave them; the largest is finite.
        token: the one that was chosen.
        top: 0 for none.
    """
    peak = logits.max()
    total = float(peak) + math.log(float(np.exp(logits - peak).sum(dtype=np.float64)))

    def logprob(one: int) -> float:
        # Rounding may lift a certain token above 0.
        return min(0.0, max(LEAST, float(logits[one]) - total))

    ids = heaviest(logits, top).tolist() if top else []
    return logprob(token), tuple((one, logprob(one)) for one in ids)
