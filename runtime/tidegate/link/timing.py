"""The waits of a link, in seconds. One place, because they only make sense together."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

from tidegate.errors import ConfigError

Pacing = Literal["off", "tick", "constant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Defaults suit a home connection; tests shrink them.

    A gateway that works shows life every `heartbeat_s`; a device that hears nothing for
    `silence_s` sends its request again under a new attempt, after `resend_min_s` and then ever
    longer up to `resend_max_s`, always with jitter. A generation whose device has said nothing
    for `lease_s` ends.
    """

    pacing: Pacing = "tick"
    """When answers leave the gateway, see `gateway_pacing`."""
    tick_s: float = 0.04
    """The beat of `tick` and `constant`; 0 is no beat, as `off`."""
    chunk_bytes: int = 1024
    """Plaintext bytes of every chunk of an answer in `constant`: 25 kB/s with the usual tick."""
    heartbeat_s: float = 2.0
    silence_s: float = 7.0
    resend_min_s: float = 1.0
    resend_max_s: float = 30.0
    ack_delay_s: float = 0.5
    """At most so long an acknowledgement waits for more; a quarter of the credit ends it."""
    lease_s: float = 60.0
    connect_timeout_s: float = 60.0
    """How long a caller waits for the first gateway ever to be known: every gateway that lives has
    said so three times by then. Once one has been, a request waits until its deadline."""
    advert_every_s: float = 20.0
    advert_valid_s: float = 60.0
    credit: int = 32
    """Sealed messages in flight towards the device before it must acknowledge."""
    window: int = 512
    """Requests of one device under way at once; the others wait in the outbox, by priority."""

    @property
    def is_paced(self) -> bool:
        """Answers leave on a beat."""
        return self.pacing != "off" and self.tick_s > 0

    @property
    def is_constant(self) -> bool:
        """Answers leave at a constant rate."""
        return self.pacing == "constant" and self.tick_s > 0

    def __post_init__(self) -> None:
        if self.pacing not in get_args(Pacing):
            raise ConfigError("link.pacing", self.pacing, " | ".join(get_args(Pacing)))
        if not 256 <= self.chunk_bytes <= 16384 or self.chunk_bytes % 64:
            raise ConfigError(
                "link.chunk_bytes", self.chunk_bytes, "a multiple of 64, 256 to 16384"
            )
        if not 1 <= self.credit <= 1024:
            raise ConfigError("link.credit", self.credit, "1 to 1024")
        if not 1 <= self.window <= 65536:
            raise ConfigError("link.window", self.window, "1 to 65536")
        if not 0 <= self.tick_s <= 1:
            raise ConfigError("link.tick_s", self.tick_s, "0 to 1 s")
        if not 0 < self.heartbeat_s < self.silence_s < self.lease_s:
            raise ConfigError(
                "link.silence_s",
                self.silence_s,
                f"between heartbeat_s ({self.heartbeat_s}) and lease_s ({self.lease_s})",
            )
        if not 0 < self.resend_min_s <= self.resend_max_s:
            raise ConfigError(
                "link.resend_min_s", self.resend_min_s, f"above 0, up to {self.resend_max_s}"
            )


def backoff_s(tries: int, rng: random.Random, timing: Timing) -> float:
    """Wait before try number `tries + 1`: doubling, capped, with 50 to 100 % jitter."""
    longest = min(timing.resend_max_s, timing.resend_min_s * 2.0 ** min(tries, 16))
    return longest * rng.uniform(0.5, 1.0)
