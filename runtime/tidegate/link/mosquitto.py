"""A folder that mosquitto 2 runs from in production: its configuration, access rules and TLS files.

Every client shows a certificate of the fleet's authority and is called by the name in it: a device
by its handle, a gateway by `gw-<name>`. The rules give each its own topics and nothing else; what
they do not name is refused.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from tidegate.errors import ConfigError
from tidegate.link.certificates import CertifiedKey, gateway_common_name
from tidegate.link.keyfiles import write_atomic
from tidegate.link.topics import Topics, check_name
from tidegate.link.wire import MAX_MESSAGE_BYTES

CONFIG, RULES = "mosquitto.conf", "acl"
CA, CERTIFICATE, KEY, REVOKED = "ca.pem", "server.pem", "server-key.pem", "revoked.pem"

_ADDRESS = re.compile(r"[A-Za-z0-9.:%_-]{1,253}")
_TOPIC_BYTES = 256
_HEADER_BYTES = 64
"""Fixed header, packet id and the properties of an MQTT 5 PUBLISH, generously."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MosquittoSettings:
    """What the configuration depends on."""

    group: str
    gateways: tuple[str, ...]
    installed_at: Path
    """Where the folder lies on the broker's machine."""
    data: Path
    """Folder, writable by mosquitto, for retained messages across restarts."""
    port: int = 8883
    bind: str | None = None
    """An address of one interface; all of them by default."""

    def __post_init__(self) -> None:
        check_name("group", self.group)
        if not self.gateways:
            raise ConfigError("gateways", "", "at least one gateway's name")
        if not 1 <= self.port <= 65535:
            raise ConfigError("port", self.port, "1 to 65535")
        if self.bind is not None and not _ADDRESS.fullmatch(self.bind):
            raise ConfigError("bind", self.bind, "an address or a host name")
        for name, folder in (("installed_at", self.installed_at), ("data", self.data)):
            if not folder.is_absolute() or not str(folder).isprintable():
                raise ConfigError(name, str(folder), "an absolute path that can be printed")


def configuration(settings: MosquittoSettings) -> str:
    """The text of `mosquitto.conf`."""
    at = settings.installed_at
    listener = f"listener {settings.port}" + (f" {settings.bind}" if settings.bind else "")
    packet_bytes = MAX_MESSAGE_BYTES + _TOPIC_BYTES + _HEADER_BYTES
    return f"""\
# mosquitto 2 for Tidegate. Made by `tidegate broker config`; rules for topics are in {RULES}.
per_listener_settings false
allow_anonymous false
acl_file {at / RULES}

{listener}
tls_version tlsv1.3
cafile {at / CA}
certfile {at / CERTIFICATE}
keyfile {at / KEY}
crlfile {at / REVOKED}
require_certificate true
use_identity_as_username true

# Adverts survive a restart. What was acknowledged does not, whatever is set here: both ends of the
# link keep their own copies.
persistence true
persistence_location {settings.data}/
autosave_interval 60
persistent_client_expiration 1h

# The largest message of the link, and the packet around it.
message_size_limit {MAX_MESSAGE_BYTES}
max_packet_size {packet_bytes}
# A device has up to 32 answers' messages under way; a gateway those of all its devices.
max_inflight_messages 64
max_queued_messages 1000
max_queued_bytes 16777216
# Without this, two small packets wait for a delayed ACK: 40 ms.
set_tcp_nodelay true
max_keepalive 300

sys_interval 0
log_dest stderr
log_type error
log_type warning
log_type notice
connection_messages true
log_timestamp_format %Y-%m-%dT%H:%M:%S
"""


def rules(group: str, gateways: tuple[str, ...]) -> str:
    """The text of the access rules: LINK.md's topics, each for whom it is meant.

    Raises:
        ConfigError: a name is none.
    """
    topics = Topics(group)
    lines = [
        "# Devices: %u is the handle in the client's certificate.",
        "# mosquitto warns that the first of these names no user: adverts are for all.",
        f"pattern read {topics.every_advert}",
        f"pattern write {topics.request('+', '%u')}",
        f"pattern read {topics.response('%u')}",
        f"pattern write {topics.presence('%u')}",
    ]
    for gateway in gateways:
        lines += [
            "",
            f"user {gateway_common_name(gateway)}",
            f"topic write {topics.advert(gateway)}",
            f"topic read {topics.every_request(gateway)}",
            f"topic write {topics.response('+')}",
            f"topic read {topics.every_presence}",
        ]
    return "\n".join(lines) + "\n"


def write_folder(
    folder: Path,
    settings: MosquittoSettings,
    *,
    ca_pem: bytes,
    server: CertifiedKey,
    revoked_pem: bytes,
) -> None:
    """Write everything mosquitto needs into `folder`; the key is readable by its owner only.

    Files that are there are replaced: a new certificate, list or gateway needs no new folder.
    """
    files = {
        CONFIG: configuration(settings).encode(),
        RULES: rules(settings.group, settings.gateways).encode(),
        CA: ca_pem,
        CERTIFICATE: server.certificate_pem,
        KEY: server.key_pem,
        REVOKED: revoked_pem,
    }
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic(folder / name, content)
        if name != KEY:
            os.chmod(folder / name, 0o644)
