"""What a gateway uses its keys for: opening requests of devices it knows, signing what it says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tidegate.errors import IdentityError
from tidegate.link.assembly import Assembler
from tidegate.link.envelope import DeviceId, GatewayAttempt
from tidegate.link.gateway_revocation import RevokedGateways
from tidegate.link.identity import GatewayIdentity
from tidegate.link.opening import PartialRequest, open_first
from tidegate.link.prekeys import Advert, ModelOffer, PrekeyStore, seal_advert
from tidegate.link.registry import REVOKED, DeviceRegistry
from tidegate.link.suites import PrivatePrekey

logger = logging.getLogger(__name__)


class GatewayKeys:
    """Identity, prekeys and device registry of one gateway.

    `revoked` is the list of revoked gateways that its adverts carry, `http` the URL they name.
    """

    def __init__(
        self,
        *,
        identity: GatewayIdentity,
        prekeys: PrekeyStore,
        registry: DeviceRegistry,
        wall_s: Callable[[], float],
        revoked: RevokedGateways | None = None,
        http: str = "",
    ) -> None:
        self.identity = identity
        self._prekeys = prekeys
        self._registry = registry
        self._wall_s = wall_s
        self._revoked = revoked
        self._http = http
        self._assembler = Assembler(self._open_first)

    def open(self, now_s: float, handle: str, message: bytes) -> GatewayAttempt | None:
        """Open a message of a request that came on the topic of `handle`; `now_s` is monotonic.

        Returns:
            The request when it is whole, None while parts of it are missing.

        Raises:
            SealError: damaged, forged, under a prekey that is gone, or from a device that is
                unknown or not the one of this topic. One that is refused, see `refusal`, opens.
        """
        whole = self._assembler.receive(now_s, handle, message)
        return None if whole is None else whole.finish(self.identity.key)

    def _open_first(self, handle: str, message: bytes) -> PartialRequest:

        def find_device(device_id: DeviceId) -> list[Ed25519PublicKey]:
            record = self._registry.find(device_id)
            if record is None or record.handle != handle:
                return []
            return [Ed25519PublicKey.from_public_bytes(key) for key in record.keys]

        def find_prekey(suite: int, prekey_id: bytes) -> PrivatePrekey | None:
            return self._prekeys.find(suite, prekey_id, self._wall_s())

        return open_first(message, handle=handle, find_prekey=find_prekey, find_device=find_device)

    def refusal(self, device_id: DeviceId) -> str | None:
        """Why nothing from this device is taken any more, as a code; None when it is.

        Raises:
            CapacityError: the registry cannot be read.
        """
        record = self._registry.find(device_id)
        return REVOKED if record is None else record.refusal(self._wall_s())

    def rotate(self) -> None:
        """Make and erase prekeys as their time comes.

        Raises:
            CapacityError: the disk refuses; the prekeys are what they were.
        """
        self._prekeys.rotate(self._wall_s())

    def advert(
        self, *, version: int, models: Sequence[ModelOffer], load: float, valid_s: float
    ) -> bytes:
        """A fresh signed advert of the prekeys there are."""
        now_s = self._wall_s()
        advert = Advert(
            group=self.identity.group,
            gateway_id=self.identity.gateway_id,
            gateway_key=self.identity.key.public_key(),
            version=version,
            issued_s=int(now_s),
            expires_s=int(now_s + valid_s) + 1,
            suites=self._prekeys.suites,
            models=tuple(models),
            load=load,
            prekeys=tuple(self._prekeys.public(now_s)),
            revocations=self._revocations(),
            http=self._http,
        )
        return seal_advert(self.identity, advert)

    def _revocations(self) -> bytes:
        """The newest list of revoked gateways; a damaged file is told and does not replace one."""
        if self._revoked is None:
            return b""
        try:
            self._revoked.refresh()
        except IdentityError as error:
            logger.warning("%s", error)
        return self._revoked.current.statement
