"""Which gateways a device knows: the newest signed advert of each, and which one to ask."""

from __future__ import annotations

from collections.abc import Callable

from tidegate.errors import IdentityError
from tidegate.link.counters import Tally
from tidegate.link.identity import DeviceIdentity
from tidegate.link.prekeys import Advert, open_advert
from tidegate.link.topics import Topics

_GATEWAYS_KEPT = 256


class GatewayDirectory:
    """Adverts that verified against the pinned fleet root; an older version never replaces one."""

    def __init__(self, identity: DeviceIdentity, wall_s: Callable[[], float], tally: Tally) -> None:
        self._identity = identity
        self._topics = Topics(identity.group)
        self._wall_s = wall_s
        self._tally = tally
        self._adverts: dict[str, Advert] = {}
        self._alive_until_s: dict[str, float] = {}
        self.problem = ""
        """Why the last advert was rejected, for people; empty when none was."""

    def receive(self, topic: str, payload: bytes) -> bool:
        """Take in an advert; True when it shows a gateway that was not alive before."""
        now_s = self._wall_s()
        try:
            advert = open_advert(
                payload, root=self._identity.root, group=self._identity.group, now_s=now_s
            )
        except (IdentityError, ValueError) as error:
            self.problem = str(error)
            self._tally.add("adverts_rejected")
            return False
        known = self._adverts.get(advert.gateway_id)
        if known is not None and advert.version == known.version:
            # The broker repeats the retained advert after every subscription.
            return False
        older = known is not None and advert.version < known.version
        full = known is None and len(self._adverts) >= _GATEWAYS_KEPT
        if older or full or topic != self._topics.advert(advert.gateway_id):
            self._tally.add("adverts_rejected")
            return False
        was_alive = known is not None and now_s < self._alive_until_s[advert.gateway_id]
        self._adverts[advert.gateway_id] = advert
        self._alive_until_s[advert.gateway_id] = _alive_until_s(known, advert, now_s)
        self._tally.add("adverts")
        return not was_alive

    def alive(self) -> list[Advert]:
        """Adverts that are valid now, the least loaded first."""
        now_s = self._wall_s()
        valid = [
            advert
            for advert in self._adverts.values()
            if now_s < self._alive_until_s[advert.gateway_id] and advert.prekey(now_s) is not None
        ]
        return sorted(valid, key=lambda advert: advert.load)

    def choose(self, model: str | None, *, before: str | None, moving: bool) -> Advert | None:
        """The gateway to ask: the one from `before`, or, when `moving`, rather another one.

        Among others the least loaded. Only gateways with `model` count, if it is given.
        """
        fit = [
            advert
            for advert in self.alive()
            if model is None or model in {one.id for one in advert.models}
        ]
        same = [advert for advert in fit if advert.gateway_id == before]
        others = [advert for advert in fit if advert.gateway_id != before]
        ranked = others + same if moving else same + others
        return ranked[0] if ranked else None


def _alive_until_s(known: Advert | None, advert: Advert, now_s: float) -> float:
    """When to give a gateway up, by our clock, which may be a while off from its clock.

    One that follows an older advert has just been sent, so it lasts from now. The first one may be
    what the broker kept of a gateway that is long gone, so it also ends when it says.
    """
    lasts_until_s = now_s + advert.expires_s - advert.issued_s
    return min(lasts_until_s, advert.expires_s) if known is None else lasts_until_s
