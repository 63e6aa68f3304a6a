"""What a device says about its requests, sealed: the request itself and the controls after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tidegate.link.counters import Tally
from tidegate.link.device_live import Live
from tidegate.link.effects import Publish
from tidegate.link.envelope import seal_request
from tidegate.link.identity import DeviceIdentity
from tidegate.link.lingering import Sent
from tidegate.link.messages import Call, Control, ControlKind
from tidegate.link.prekeys import Advert
from tidegate.link.timing import Timing
from tidegate.link.topics import Topics

_MAX_TTL_MS = 0xFFFF_FFFF


class DeviceSealer:
    """Seals for one device. Whatever must be durable first is its caller's business."""

    def __init__(
        self,
        *,
        identity: DeviceIdentity,
        timing: Timing,
        wall_s: Callable[[], float],
        tally: Tally,
        suites: Sequence[int],
    ) -> None:
        self._identity = identity
        self._topics = Topics(identity.group)
        self._timing = timing
        self._wall_s = wall_s
        self._tally = tally
        self._suites = suites

    def use_key(self, key: Ed25519PrivateKey) -> None:
        """Sign with this key of the device from now on."""
        self._identity = replace(self._identity, key=key)

    def request(self, now_s: float, live: Live, attempt: int, advert: Advert) -> list[Publish]:
        """`live` as its `attempt`, sealed for the gateway of `advert`: one message or several."""
        prekey = advert.prekey(self._wall_s(), self._suites)
        assert prekey is not None, "only gateways with a valid prekey are chosen"
        ttl_ms = max(0, int((live.session.deadline_s - now_s) * 1000))
        call = Call(
            have=live.session.have,
            credit=self._timing.credit,
            ttl_ms=min(ttl_ms, _MAX_TTL_MS),
            proof=live.prefix.proof(),
            body=live.row.body,
        )
        messages, keys = seal_request(
            call.encode(),
            request_id=live.row.request_id,
            attempt=attempt,
            prekey_id=prekey.prekey_id,
            prekey=prekey.public,
            gateway_key=advert.gateway_key,
            device_id=self._identity.device_id,
            device_key=self._identity.key,
            handle=self._identity.handle,
        )
        topic = self._topics.request(advert.gateway_id, self._identity.handle)
        live.remember(attempt, Sent(keys, topic, advert.gateway_id, advert.certified_s))
        return [self._publish(topic, message) for message in messages]

    def control(self, live: Live, kind: ControlKind, *, rewind: bool = False) -> list[Publish]:
        """Speak under the newest attempt the gateway has shown to know, if there is one yet.

        Nothing when the keys died with an earlier process: the lease will tell the gateway.
        """
        if not live.sent:
            return []
        session = live.session
        newest = next(reversed(live.sent.values()))
        control = Control(
            kind=kind,
            have=session.have,
            credit=self._timing.credit,
            seen=session.seen,
            rewind=rewind,
        )
        return [self.say(live.sent.get(session.heard_attempt, newest), control)]

    def say(self, sent: Sent, control: Control) -> Publish:
        """Seal `control` under the keys of `sent`."""
        return self._publish(sent.topic, sent.keys.seal_control(control.encode()))

    def _publish(self, topic: str, payload: bytes) -> Publish:
        self._tally.add("sent")
        return Publish(topic=topic, payload=payload)
