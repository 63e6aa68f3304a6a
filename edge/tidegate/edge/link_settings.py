"""`LinkSettings`: how a device reaches its gateways, by a broker or over HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tidegate.link.broker_access import CheckMode
from tidegate.link.path_choice import PATIENCE_S
from tidegate.link.paths_access import DeviceWay, device_way
from tidegate.link.suites import PREFERENCE


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkSettings:
    """How a device reaches its gateways."""

    broker: str | None = field(repr=False)
    """`mqtt://` or `mqtts://`, with the password in it if there is one: never logged."""
    keys: Path
    """The folder that the device's keys and outbox live in."""
    broker_check: CheckMode = "auto"
    """Whether to refuse a broker on which others' topics can be used."""
    suites: tuple[int, ...] = PREFERENCE
    """Those of the envelope that may be used, preferred ones first."""
    http: tuple[str, ...] = ()
    """URLs of gateways, for when the broker cannot be reached; alone without a broker."""
    http_after_s: float = PATIENCE_S
    """Without the broker before they are used, and with it before it is gone back to."""
    http_learn: bool = True
    """Use the URLs that gateways name in their signed adverts, too."""
    http_plain: bool = False
    """Allow `http://` to other machines."""

    def way(self) -> DeviceWay:
        """What carries the link.

        Raises:
            ConfigError, IdentityError: see `device_way`.
        """
        return device_way(
            self.broker,
            self.keys,
            check=self.broker_check,
            http=self.http,
            http_after_s=self.http_after_s,
            learn=self.http_learn,
            plain=self.http_plain,
        )
