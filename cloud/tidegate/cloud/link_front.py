"""The gateway of a service: its settings, and all that stands between a broker and a handler.

Apart from the engine, so that a process without one can be a gateway as well.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tidegate.cloud.handler import LinkHandler
from tidegate.cloud.link_http_server import LinkHttpServer, LinkHttpSettings
from tidegate.errors import ConfigError
from tidegate.link.broker_access import CheckMode, gateway_transport
from tidegate.link.certificates_store import has_authority
from tidegate.link.enrolment_gateway import Enrolment
from tidegate.link.enrolment_renewal import RenewingHandler
from tidegate.link.gateway import Gateway
from tidegate.link.gateway_paths import GatewayPaths
from tidegate.link.key_rotation import KeyRegistrar
from tidegate.link.prekeys import ModelOffer
from tidegate.link.registry import DeviceRegistry
from tidegate.link.suites import PREFERENCE
from tidegate.link.timing import Pacing, Timing
from tidegate.link.transport import Transport


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewaySettings:
    """How devices reach the gateway: through a broker, over HTTP, or both."""

    broker: str | None = field(repr=False)
    """`mqtt://` or `mqtts://`, with the password in it if there is one: never logged."""
    keys: Path
    """The folder that the gateway's keys and its request table live in."""
    broker_check: CheckMode = "auto"
    """Whether to refuse a broker on which others' topics can be used."""
    suites: tuple[int, ...] = PREFERENCE
    """Those of the envelope that devices may use."""
    pacing: Pacing = "tick"
    """When chunks of answers leave, see `tidegate.link.gateway_pacing`."""
    http: LinkHttpSettings | None = None
    """Where to take devices that cannot reach the broker."""

    def __post_init__(self) -> None:
        if self.broker is None and self.http is None:
            raise ConfigError("link", None, "a broker's URL, or an address with --link-http")


@dataclass(frozen=True, kw_only=True, eq=False)
class LinkFront:
    """A gateway that is ready to run."""

    gateway: Gateway
    http: LinkHttpServer | None
    renewing: RenewingHandler | None


@asynccontextmanager
async def open_link(
    settings: GatewaySettings,
    handler: LinkHandler,
    models: Callable[[], Sequence[ModelOffer]],
) -> AsyncIterator[LinkFront]:
    """Open the folder of keys and bind what listens; close it all in the end.

    Args:
        settings: where devices are met, and who this is.
        handler: answers what they ask.
        models: for the advert, asked for at every one.

    Raises:
        ConfigError: an address is taken, or strangers could listen in.
        IdentityError: the keys cannot be used.
    """
    async with AsyncExitStack() as stack:
        renewing = None
        if has_authority(settings.keys):
            enrolment = Enrolment(settings.keys)
            stack.callback(enrolment.close)
            renewing = RenewingHandler(handler, enrolment)
        registry = DeviceRegistry(settings.keys / "devices.sqlite")
        stack.callback(registry.close)
        registrar = KeyRegistrar(renewing or handler, registry)
        http = None
        if settings.http is not None:
            http = LinkHttpServer(settings.keys, settings.http)
            stack.push_async_callback(http.close)
        gateway = Gateway(
            settings.keys,
            _way(settings, http),
            registrar,
            models=models,
            timing=Timing(pacing=settings.pacing),
            suites=settings.suites,
            http="" if http is None else http.public_url,
        )
        stack.push_async_callback(gateway.close)
        yield LinkFront(gateway=gateway, http=http, renewing=renewing)


def _way(settings: GatewaySettings, http: LinkHttpServer | None) -> Transport:
    """The broker, HTTP, or both as one."""
    if settings.broker is None:
        assert http is not None, "the settings have one of them"
        return http.hub
    broker = gateway_transport(settings.broker, settings.keys, check=settings.broker_check)
    return broker if http is None else GatewayPaths(broker, http.hub)
