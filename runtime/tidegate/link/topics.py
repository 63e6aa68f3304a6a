"""Topic names. A handle is the only thing a topic says about a device, and it is random."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tidegate.errors import ConfigError

GONE, HERE = b"\0", b"\1"
"""First byte of a presence message; a random number of the connection follows."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ROOT = "tidegate/1"


def check_name(setting: str, value: str) -> str:
    """Return `value` if it may be one topic level, else raise `ConfigError` naming `setting`."""
    if not _NAME.fullmatch(value):
        raise ConfigError(setting, value, "1 to 64 letters, digits, '-' or '_'")
    return value


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of one group. At most 6 slashes and 210 bytes (AWS IoT allows 7 and 256)."""

    group: str

    def __post_init__(self) -> None:
        check_name("link.group", self.group)

    def advert(self, gateway_id: str) -> str:
        return f"{_ROOT}/{self.group}/gw/{gateway_id}/advert"

    @property
    def every_advert(self) -> str:
        return self.advert("+")

    def request(self, gateway_id: str, handle: str) -> str:
        return f"{_ROOT}/{self.group}/gw/{gateway_id}/q/{handle}"

    def every_request(self, gateway_id: str) -> str:
        return self.request(gateway_id, "+")

    def response(self, handle: str) -> str:
        return f"{_ROOT}/{self.group}/r/{handle}"

    def presence(self, handle: str) -> str:
        return f"{_ROOT}/{self.group}/s/{handle}"

    @property
    def every_presence(self) -> str:
        return self.presence("+")

    def is_advert(self, topic: str) -> bool:
        return topic.startswith(f"{_ROOT}/{self.group}/gw/") and topic.endswith("/advert")


def last_level(topic: str) -> str:
    """The handle of a request or response topic."""
    return topic.rsplit("/", 1)[-1]
