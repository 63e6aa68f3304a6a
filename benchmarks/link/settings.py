"""What a run's processes are told, as a file, so that a restarted one is told the same."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from tidegate.link.timing import Timing

Way = Literal["sealed", "qos1", "qos2"]
"""Our link, or plain paho at QoS 1 or 2."""
WAYS: tuple[Way, ...] = ("sealed", "qos1", "qos2")
TIMINGS = ("default", "fast")
_FAST = Timing(
    heartbeat_s=0.5,
    silence_s=1.5,
    resend_min_s=0.2,
    resend_max_s=2.0,
    ack_delay_s=0.05,
    lease_s=15.0,
    advert_every_s=2.0,
)
"""For a network that is known to be near."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run of one way."""

    folder: Path
    url: str
    way: Way
    requests: int
    together: int
    words: int
    """Chunks of an answer, but for one before and one after."""
    word_s: float
    deadline_s: float
    """Until a request counts as unanswered. The plain ways wait so long for any news of it."""
    waits: str
    """One of `TIMINGS`; the plain ways have no such waits."""

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.jsonl"

    @property
    def runs(self) -> Path:
        """The cloud's own ledger."""
        return self.folder / "runs.jsonl"

    @property
    def subscribed(self) -> Path:
        """Exists once the plain gateway's session stands."""
        return self.folder / "subscribed"

    @property
    def qos(self) -> int:
        return 2 if self.way == "qos2" else 1

    @property
    def timing(self) -> Timing:
        return _FAST if self.waits == "fast" else Timing()

    def write(self) -> Path:
        """The file that `read` takes."""
        path = self.folder / "settings.json"
        fields = {**asdict(self), "folder": str(self.folder)}
        path.write_text(json.dumps(fields), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> Settings:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return replace(cls(**fields), folder=Path(fields["folder"]))
