"""The flags of the link's second path, HTTP: where a gateway listens, where a device finds it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tidegate.cli.listen import parse_listen
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.cloud.link_http_server import LinkHttpSettings

_PLAIN = (
    "allow HTTP without TLS beyond this machine: the network then sees handles, sizes and times"
)


def add_link_http(parser: argparse.ArgumentParser) -> None:
    """Declare where a gateway takes devices over HTTP."""
    parser.add_argument(
        "--link-http",
        metavar="HOST:PORT",
        help="take devices over HTTP there too, for when they cannot reach the broker",
    )
    parser.add_argument(
        "--link-http-name",
        action="append",
        default=[],
        metavar="NAME",
        help="a host name or address that devices call this gateway by: TLS with a certificate of"
        " the fleet's authority for it; may be given more than once (without it: http-cert.pem and"
        " http-key.pem in --keys, if they are there)",
    )
    parser.add_argument(
        "--link-http-url",
        default="",
        metavar="URL",
        help="what devices are told, in signed adverts, to find --link-http at, as behind a proxy"
        " (default: the first --link-http-name)",
    )
    parser.add_argument(
        "--link-http-certificates",
        action="store_true",
        help="ask devices on --link-http for their certificate of the fleet, too",
    )
    parser.add_argument(
        "--link-http-plain", action="store_true", help=f"{_PLAIN}; for a proxy that has TLS"
    )
    parser.add_argument(
        "--link-http-per-address",
        type=int,
        metavar="N",
        help="connections from one address, 0 for any number (default 128, and any number with"
        " --link-http-plain, since a proxy is one address for everybody)",
    )


def read_link_http(args: argparse.Namespace) -> LinkHttpSettings | None:
    """Read what `add_link_http` declared.

    Raises:
        ConfigError: it is no address, or something is said of a listener that there is not.
    """
    if args.link_http is None:
        for flag in (
            "link_http_name",
            "link_http_url",
            "link_http_certificates",
            "link_http_plain",
            "link_http_per_address",
        ):
            if getattr(args, flag) not in (None, "", []) and getattr(args, flag) is not False:
                raise ConfigError(flag.replace("_", "-"), "given", "used with --link-http")
        return None
    from tidegate.cloud.link_http_server import MOST_PER_ADDRESS, LinkHttpSettings

    host, port = parse_listen(args.link_http)
    per_address = args.link_http_per_address
    if per_address is None:
        per_address = 0 if args.link_http_plain else MOST_PER_ADDRESS
    return LinkHttpSettings(
        host=host,
        port=port,
        names=tuple(args.link_http_name),
        url=args.link_http_url,
        client_certificates=args.link_http_certificates,
        plain=args.link_http_plain,
        most_per_address=per_address,
    )


def add_gateway_urls(parser: argparse.ArgumentParser) -> None:
    """Declare where a device finds gateways over HTTP."""
    # A literal here, because the link's modules take a while to import: see `path_choice`.
    parser.add_argument(
        "--link-http",
        action="append",
        default=[],
        metavar="URL",
        help="https://... of a gateway, used while the broker cannot be reached, or alone without"
        " --link; may be given more than once, beside those that gateways name in signed adverts",
    )
    parser.add_argument(
        "--link-http-given-only",
        action="store_true",
        help="use no URL that was not given, whatever a gateway's signed advert names",
    )
    parser.add_argument(
        "--link-http-after",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="without the broker before --link-http is used, and with it before it is gone back to"
        " (default 5)",
    )
    parser.add_argument("--link-http-plain", action="store_true", help=_PLAIN)
