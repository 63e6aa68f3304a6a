"""The flags that `tidegate serve` and `tidegate cloud` share: where they listen, and their link."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.cli.listen import check_link, parse_listen, parse_suites, read_hashes
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.api.tls import TlsFiles
    from tidegate.api.trace_settings import TraceSettings
    from tidegate.link.broker_access import CheckMode


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkFlags:
    """How an end reaches the other ones; `broker` is None where only HTTP was asked for."""

    broker: str | None = field(repr=False)
    keys: Path
    broker_check: CheckMode
    suites: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceFlags:
    """What either service was told; `link` is None without `--link`."""

    host: str
    port: int
    api_key_hashes: tuple[str, ...]
    link: LinkFlags | None
    tls: TlsFiles | None = None
    traces: TraceSettings | None = None


def add_service(parser: argparse.ArgumentParser, *, listen: str) -> None:
    """Declare where the HTTP API listens and who may call it; `listen` is the default."""
    parser.add_argument("--listen", default=listen, help="HOST:PORT of the HTTP API")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        help="file with one SHA-256 per line of the keys that may call (see: tidegate keys api);"
        " beyond loopback required",
    )
    parser.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="send OpenTelemetry spans there, as http://127.0.0.1:4318/v1/traces (extra: otel)",
    )
    parser.add_argument(
        "--trace-share",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of the traces that begin here, 0 to 1 (default 1); a caller's trace is its decision",
    )
    parser.add_argument("--tls-cert", type=Path, metavar="PEM", help="serve HTTPS with this")
    parser.add_argument("--tls-key", type=Path, metavar="PEM", help="the key of --tls-cert")
    parser.add_argument(
        "--tls-client-ca",
        type=Path,
        metavar="PEM",
        help="serve only clients with a certificate of these authorities (mutual TLS)",
    )


def add_encoder_wait(parser: argparse.ArgumentParser) -> None:
    """Declare how long encoders wait for company."""
    parser.add_argument(
        "--encoder-wait-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="how long an idle encoder waits for more texts to run together (default 0: what comes"
        " while it runs shares the next run)",
    )


def add_link(parser: argparse.ArgumentParser, *, end: str, broker: str) -> None:
    """Declare the link of `end` (device or gateway); `broker` says what it does with one."""
    parser.add_argument("--link", metavar="URL", help=f"mqtt://... of the broker {broker}")
    parser.add_argument("--keys", type=Path, help=f"folder with the {end}'s keys, for --link")
    parser.add_argument(
        "--broker-check",
        choices=("auto", "on", "off"),
        default="auto",
        help="refuse a broker that lets one client use another's topics (default: unless it is"
        " on loopback)",
    )
    parser.add_argument(
        "--link-suites",
        default="2,1",
        metavar="N,N",
        help="what may seal requests, preferred first: 1 X25519, 2 ML-KEM-768 with X25519"
        " (default 2,1; both ends need one in common)",
    )


def read_service(args: argparse.Namespace) -> ServiceFlags:
    """Read what `add_service` and `add_link` declared.

    Raises:
        ConfigError: a value is not allowed, or one of `--link` and `--keys` is missing.
    """
    http = args.link_http
    if args.link is not None or not http:
        check_link(args.link, args.keys)
    elif args.keys is None:
        raise ConfigError("keys", None, "the folder of the keys for --link-http")
    host, port = parse_listen(args.listen)
    link = None
    if args.link is not None or http:
        link = LinkFlags(
            broker=args.link,
            keys=args.keys,
            broker_check=args.broker_check,
            suites=parse_suites(args.link_suites),
        )
    return ServiceFlags(
        host=host,
        port=port,
        api_key_hashes=() if args.api_key_file is None else read_hashes(args.api_key_file),
        link=link,
        tls=_tls(args),
        traces=_traces(args),
    )


def _traces(args: argparse.Namespace) -> TraceSettings | None:
    from tidegate.api.trace_settings import TraceSettings

    if args.otlp_traces_endpoint is None:
        return None
    return TraceSettings(
        endpoint=args.otlp_traces_endpoint,
        service=f"tidegate-{args.command}",
        share=args.trace_share,
    )


def _tls(args: argparse.Namespace) -> TlsFiles | None:
    from tidegate.api.tls import TlsFiles

    certificate, key, client_ca = args.tls_cert, args.tls_key, args.tls_client_ca
    if certificate is None and key is None and client_ca is None:
        return None
    if certificate is None:
        raise ConfigError("tls-cert", None, "a PEM file, as other flags of TLS are given")
    if key is None:
        raise ConfigError("tls-key", None, "the PEM file with the key of --tls-cert")
    return TlsFiles(certificate=certificate, key=key, client_ca=client_ca)
