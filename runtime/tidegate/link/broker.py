"""`tidegate broker`: amqtt in this process, for laptops and demos.

It takes anyone, so it only listens on loopback; a fleet uses mosquitto. What it relays is
sealed all the same. amqtt 0.12 needs its plugins named: by default it loads one that warns about
psutil and logs every packet.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Callable

from tidegate.errors import ConfigError, UnavailableError

MAX_CONNECTIONS = 256


async def run_broker(
    host: str = "127.0.0.1", port: int = 1883, *, on_ready: Callable[[], None] | None = None
) -> None:
    """Serve MQTT 3.1.1 on `host:port` until cancelled.

    Args:
        host: a loopback address.
        port: 1 to 65535.
        on_ready: called once connections are accepted.

    Raises:
        ConfigError: the address is not loopback, or the port is out of range.
        UnavailableError: amqtt is not installed, or the port is taken.
    """
    _check(host, port)
    try:
        from amqtt.broker import Broker
        from amqtt.errors import BrokerError
    except ImportError as error:
        raise UnavailableError(
            "the embedded broker needs amqtt: pip install 'tidegate[broker]', or run mosquitto"
        ) from error
    # amqtt and its state machine tell every state change and every connection at INFO.
    for name in ("amqtt", "transitions"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    broker = Broker(
        {
            "listeners": {
                "default": {"type": "tcp", "bind": bind, "max_connections": MAX_CONNECTIONS}
            },
            "plugins": {
                "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}
            },
        }
    )
    try:
        await broker.start()
    except BrokerError as error:
        raise UnavailableError(f"broker: cannot listen on {bind}: {error}") from error
    try:
        if on_ready is not None:
            on_ready()
        await asyncio.Event().wait()
    finally:
        await broker.shutdown()


def _check(host: str, port: int) -> None:
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(
            "broker.host", host, "a loopback address (it takes anyone; use mosquitto elsewhere)"
        )
    if not 1 <= port <= 65535:
        raise ConfigError("broker.port", port, "1 to 65535")
