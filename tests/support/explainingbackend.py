"""An echo that also says where it would run a call, by the length of the call's text alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from echobackend import EchoBackend

from tidegate.api.schema import Call

FITS_CHARS = 40


@dataclass(kw_only=True)
class ExplainingEcho(EchoBackend):
    """Short calls stay, long ones leave; what may not leave has no way to the cloud."""

    has_pace: bool = True
    costs: str = "calibrated, module"
    failing: Exception | None = None
    """Raised instead of an explanation."""
    explained: list[Call] = field(default_factory=list)

    async def explain(self, call: Call) -> Mapping[str, object]:
        if self.failing is not None:
            raise self.failing
        self.explained.append(call)
        chars = len(call.messages[-1].content if call.messages else str(call.prompt))
        stays = call.options.privacy == "local"
        goes = chars > FITS_CHARS and not stays
        cloud_j = math.inf if stays else 2.5
        terms = {
            "local_j": 0.05 * chars,
            "cloud_j": cloud_j,
            "late_local_s": 0.5,
            "late_cloud_s": 0.0,
        }
        return {
            "route": "cloud" if goes else "edge",
            "reason": f"{chars} characters, {FITS_CHARS} fit",
            "filters": {
                "edge": None,
                "cloud": "private (local): never leaves the device" if stays else None,
            },
            "clock": {"edge_s": 0.1 * chars, "cloud_s": math.inf if stays else 0.75},
            "pace": {"mode": "15W", "reason": "the knee is in time", "terms": terms}
            if self.has_pace
            else None,
            "state": {
                "costs": self.costs,
                "weights": {"energy": 1.0, "late_j_per_s": 50.0},
                "battery": {"share": 0.42, "debt_j": 120.5},
                "heat": {"celsius": 61.5, "soft_c": 70.0, "hard_c": None},
                "quiet": False,
                "faults": ["ina3221: permission denied"],
            },
        }
