"""The cloud as the governor expects it: a first guess, corrected by every answer that came back.

The guess is a well-filled GPU behind a short way (`simulate.boards.GPU_CLOUD`). Answers tell how
long the way and the queue take (`wait_s`) and how fast tokens come (`token_s`); joules of the
service are never seen here and stay a guess. The radio is the profile's, by what kind of network
the default route leads over; without its numbers sending takes no joules that anybody could name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from tidegate.edge.energy.cost import CloudCost, RadioCost
from tidegate.edge.energy.profile import Profile
from tidegate.edge.energy.simulate.boards import GPU_CLOUD

_WEIGHT: Final = 0.2
"""Of the newest answer, as the router's smoothed time has it."""
_MB: Final = 1e6


@dataclass(kw_only=True)
class CloudTimes:
    """What is known of the cloud, and of the radio that leads there."""

    cost: CloudCost
    radio: RadioCost | None = None
    """None: nobody knows what sending takes."""
    tail_until_s: float = field(default=-math.inf)

    @staticmethod
    def guess(token_price_j: float, radio: RadioCost | None) -> CloudTimes:
        """Before any answer; the owner counts a token of the cloud as `token_price_j`."""
        return CloudTimes(cost=replace(GPU_CLOUD, token_price=token_price_j), radio=radio)

    def answered(
        self, *, prompt_tokens: int, output_tokens: int, took_s: float, decode_s: float
    ) -> None:
        """An answer is back.

        Args:
            prompt_tokens: of its prompt.
            output_tokens: of the answer.
            took_s: from leaving the device to its last token.
            decode_s: from its first token to its last, as the cloud saw it.
        """
        cost = self.cost
        if output_tokens > 1 and decode_s > 0:
            token_s = decode_s / (output_tokens - 1)
            cost = replace(cost, token_s=(1 - _WEIGHT) * cost.token_s + _WEIGHT * token_s)
        rest = replace(cost, wait_s=0.0)
        waited_s = took_s - rest.answer_s(self.radio or RadioCost(), prompt_tokens, output_tokens)
        wait_s = (1 - _WEIGHT) * cost.wait_s + _WEIGHT * max(0.0, waited_s)
        self.cost = replace(cost, wait_s=wait_s)

    def sent_j(self, *, prompt_tokens: int, output_tokens: int, now_s: float) -> float | None:
        """Joules of the radio for an answer that is back now; None where nobody knows them.

        A tail that the one before left running is paid only for what it is prolonged by.
        """
        radio = self.radio
        if radio is None:
            return None
        shared_s = max(0.0, self.tail_until_s - now_s)
        self.tail_until_s = max(self.tail_until_s, now_s + radio.tail_s)
        tail = max(0.0, radio.tail_s - shared_s) / radio.tail_s if radio.tail_s else 0.0
        return self.cost.device_j(radio, prompt_tokens, output_tokens, tail=tail)

    def warm(self, now_s: float) -> bool:
        """Whether a tail is running."""
        return now_s < self.tail_until_s


def radio_of(profile: Profile, kind: str | None) -> RadioCost | None:
    """What the profile says of one kind of network; a cable takes nothing worth counting."""
    if kind == "ethernet":
        return RadioCost()
    known = None if kind is None else profile.radio.get(kind)
    if known is None or known.up_j_mb is None or known.down_j_mb is None:
        return None
    return RadioCost(
        up_byte_j=known.up_j_mb / _MB,
        down_byte_j=known.down_j_mb / _MB,
        tail_s=known.tail_s or 0.0,
        tail_w=known.tail_w or 0.0,
    )


def network_kind(sysroot: Path) -> str | None:
    """`ethernet`, `wifi` or `lte`: what the default route leads over; None: it is not known.

    Linux: /proc/net/route, and what drivers put into /sys/class/net.
    """
    try:
        lines = (sysroot / "proc/net/route").read_text(errors="replace").splitlines()[1:]
        routes = [line.split() for line in lines]
        found = [(int(one[6]), one[0]) for one in routes if len(one) > 7 and one[1] == "0" * 8]
    except (OSError, ValueError):
        return None
    name = min(found, default=(0, ""))[1]
    folder = sysroot / "sys/class/net" / name
    if not name or "/" in name or not folder.is_dir():
        return None
    if (folder / "wireless").exists() or (folder / "phy80211").exists():
        return "wifi"
    try:
        events = (folder / "uevent").read_text(errors="replace").splitlines()
    except OSError:
        events = []
    if "DEVTYPE=wwan" in events or name.startswith("wwan"):
        return "lte"
    return "ethernet" if name.startswith(("eth", "en")) else None
