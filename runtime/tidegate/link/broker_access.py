"""The transport of an end, from the folder its keys lie in: TLS files, presence, the look before.

A folder may hold `broker-ca.pem`, `broker-cert.pem` and `broker-key.pem` for `mqtts://`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

from tidegate.link.broker_check import (
    CANARY_HANDLE,
    Plan,
    check_broker,
    device_plan,
    gateway_plan,
)
from tidegate.link.broker_tls import TlsFiles
from tidegate.link.broker_url import BrokerUrl
from tidegate.link.identity import load_device, load_gateway
from tidegate.link.mqtt import Check, MqttTransport
from tidegate.link.topics import Topics

CheckMode = Literal["auto", "on", "off"]
"""`auto` looks at every broker but one on loopback, where there is nobody else."""


def device_transport(url: str, keys: Path, *, check: CheckMode = "auto") -> MqttTransport:
    """How the device whose keys lie in `keys` reaches the broker at `url`.

    Raises:
        IdentityError: the keys cannot be used.
        ConfigError: the URL or a TLS file cannot.
    """
    identity = load_device(keys)
    return MqttTransport(
        url,
        files=TlsFiles.in_folder(keys),
        presence=Topics(identity.group).presence(identity.handle),
        check=_check(url, check, device_plan(identity.group, identity.handle)),
        mqtt5=_hints(url),
    )


def gateway_transport(url: str, keys: Path, *, check: CheckMode = "auto") -> MqttTransport:
    """How the gateway whose keys lie in `keys` reaches the broker at `url`.

    Raises:
        IdentityError: the keys cannot be used.
        ConfigError: the URL or a TLS file cannot.
    """
    identity = load_gateway(keys)
    return MqttTransport(
        url,
        files=TlsFiles.in_folder(keys),
        canary=Topics(identity.group).response(CANARY_HANDLE),
        check=_check(url, check, gateway_plan(identity.group, identity.gateway_id)),
        mqtt5=_hints(url),
    )


def _hints(url: str) -> bool:
    """Whether to try MQTT 5. amqtt, the laptop's broker, waits 5 s for the rest of such a will."""
    return not BrokerUrl.parse(url).loopback


def _check(url: str, mode: CheckMode, plan: Plan) -> Check | None:
    wanted = mode == "on" or (mode == "auto" and not BrokerUrl.parse(url).loopback)
    return partial(check_broker, plan=plan) if wanted else None
