"""Which gateways a device knows: the newest signed advert of each, and which one to ask.

Whether a gateway lives is told by our monotonic clock, from when its advert came, so that a wall
clock that jumps neither forgets one nor keeps one. Health is what we saw ourselves: a gateway that
left requests without any sign of life comes last until it says something, or for a while.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tidegate.errors import IdentityError
from tidegate.link.counters import Tally
from tidegate.link.gateway_revocation import RevokedGateways
from tidegate.link.identity import DeviceIdentity
from tidegate.link.prekeys import Advert, open_advert
from tidegate.link.suites import PREFERENCE, check_suites
from tidegate.link.timing import Timing
from tidegate.link.topics import Topics

_GATEWAYS_KEPT = 256


@dataclass(slots=True)
class _Known:
    """A gateway; times are monotonic seconds."""

    advert: Advert
    until_s: float
    suspect_until_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Sign:
    """A gateway lives, and whether that is news."""

    gateway_id: str
    was_dead: bool


class GatewayDirectory:
    """Adverts that verified against the pinned fleet root; an older version never replaces one.

    `suites` are those that the device may use, preferred ones first (setting `link.suites`);
    `revoked` remembers which gateways' keys are no longer believed.

    Raises:
        ConfigError: `suites` cannot be used.
    """

    def __init__(
        self,
        identity: DeviceIdentity,
        *,
        timing: Timing,
        rng: random.Random,
        wall_s: Callable[[], float],
        tally: Tally,
        suites: Sequence[int] = PREFERENCE,
        revoked: RevokedGateways | None = None,
    ) -> None:
        self.suites = check_suites(suites)
        self._identity = identity
        self._topics = Topics(identity.group)
        self._timing = timing
        self._rng = rng
        self._wall_s = wall_s
        self._tally = tally
        self._revoked = revoked or RevokedGateways(identity.root, identity.group, None)
        self._known: dict[str, _Known] = {}
        self.problem = ""
        """Why the last advert was rejected, for people; empty when none was."""

    def receive(self, now_s: float, topic: str, payload: bytes) -> Sign | None:
        """Take in an advert; what it shows, if it is new and says that its gateway lives."""
        wall_s = self._wall_s()
        try:
            advert = open_advert(
                payload, root=self._identity.root, group=self._identity.group, now_s=wall_s
            )
            self._check_revoked(advert)
        except (IdentityError, ValueError) as error:
            self.problem = str(error)
            self._tally.add("adverts_rejected")
            return None
        known = self._known.get(advert.gateway_id)
        if known is not None and self._lost_its_key(known):
            # What it said, its version too, was perhaps said by whoever stole its key.
            known = None
            del self._known[advert.gateway_id]
        if known is not None and advert.version == known.advert.version:
            # The broker repeats the retained advert after every subscription.
            return None
        older = known is not None and advert.version < known.advert.version
        full = known is None and len(self._known) >= _GATEWAYS_KEPT
        if older or full or topic != self._topics.advert(advert.gateway_id):
            self._tally.add("adverts_rejected")
            return None
        self._tally.add("adverts")
        # One that follows an older advert has just been sent, so it lasts from now. The first one
        # may be what the broker kept of a gateway that is long gone: it also ends when it says.
        lives_s = float(advert.expires_s - advert.issued_s)
        if known is None:
            lives_s = min(lives_s, advert.expires_s - wall_s)
            self._known[advert.gateway_id] = _Known(advert, now_s + lives_s)
            return Sign(advert.gateway_id, was_dead=True) if lives_s > 0 else None
        was_dead = known.until_s <= now_s
        known.advert, known.until_s = advert, now_s + lives_s
        return Sign(advert.gateway_id, was_dead=was_dead)

    def has_seen(self, model: str | None, only: str | None) -> bool:
        """A gateway that would do has been known in this life, whether it lives now or not."""
        return any(
            only in (None, gateway_id)
            and (model is None or model in {one.id for one in known.advert.models})
            for gateway_id, known in self._known.items()
        )

    def _check_revoked(self, advert: Advert) -> None:
        """Learn from an advert which gateways are revoked, and whether its own is.

        Raises:
            IdentityError: it is, or the list is none of our fleet's.
        """
        self._revoked.refresh()
        if advert.revocations:
            self._revoked.take(advert.revocations)
        if self.is_revoked(advert.gateway_id, advert.certified_s):
            raise IdentityError(f"advert: the key of gateway {advert.gateway_id} is revoked")

    def is_revoked(self, gateway_id: str, certified_s: int) -> bool:
        """Whether the key that was certified for this gateway then is no longer believed."""
        return self._revoked.current.revokes(gateway_id, certified_s)

    def _lost_its_key(self, known: _Known) -> bool:
        return self.is_revoked(known.advert.gateway_id, known.advert.certified_s)

    def alive(self, now_s: float) -> list[Advert]:
        """Adverts that are valid now, the least loaded first."""
        return sorted(
            (known.advert for known in self._usable(now_s)), key=lambda advert: advert.load
        )

    def choose(
        self,
        now_s: float,
        model: str | None,
        *,
        before: str | None,
        avoid: Collection[str] = (),
        only: str | None = None,
    ) -> Advert | None:
        """The gateway to ask: with `model`, if it is given, and never one of `avoid`.

        `only` names the one gateway that will do.

        The one from `before` while it is healthy; else the less loaded of two healthy ones taken
        at random, so that devices that hear the same adverts do not all move to the same gateway;
        else, when all went silent, the one whose silence is longest ago.
        """
        fit = [
            known
            for known in self._usable(now_s)
            if known.advert.gateway_id not in avoid
            and only in (None, known.advert.gateway_id)
            and (model is None or model in {one.id for one in known.advert.models})
        ]
        healthy = [known.advert for known in fit if known.suspect_until_s <= now_s]
        for advert in healthy:
            if advert.gateway_id == before:
                return advert
        if healthy:
            two = self._rng.sample(healthy, min(2, len(healthy)))
            return min(two, key=lambda advert: advert.load)
        return min(fit, key=lambda known: known.suspect_until_s).advert if fit else None

    def went_silent(self, now_s: float, gateway_id: str) -> None:
        """Requests to `gateway_id` were left without a sign of life."""
        if (known := self._known.get(gateway_id)) is not None:
            known.suspect_until_s = now_s + self._timing.lease_s

    def heard(self, gateway_id: str) -> None:
        """`gateway_id` sent something that opened."""
        if (known := self._known.get(gateway_id)) is not None:
            known.suspect_until_s = 0.0

    def _usable(self, now_s: float) -> list[_Known]:
        wall_s = self._wall_s()
        return [
            known
            for known in self._known.values()
            if now_s < known.until_s
            and not self._lost_its_key(known)
            and known.advert.prekey(wall_s, self.suites) is not None
        ]
