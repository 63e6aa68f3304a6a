"""Flags of `tidegate cloud` for keys with limits, usage, audit and logs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.cli.logs import add_log_format
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.cloud.access_settings import AccessSettings


def add_access(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        help="folder of the API keys with limits (tidegate keys api add), of usage and audit",
    )
    parser.add_argument(
        "--limits-redis",
        metavar="URL",
        help="redis://... that several services count limits in (default: each in its own memory)",
    )
    parser.add_argument(
        "--metrics-per-key",
        action="store_true",
        help="tell usage by name of key in /metrics; a series for each key",
    )
    parser.add_argument(
        "--metrics-need-key", action="store_true", help="serve /metrics to keys of that scope only"
    )
    parser.add_argument(
        "--tls-client-keys",
        action="store_true",
        help="with --tls-client-ca: who brings no key has that of its certificate's common name",
    )
    parser.add_argument(
        "--no-vllm-metrics", action="store_true", help="leave vLLM's names out of /metrics"
    )
    parser.add_argument(
        "--prices",
        type=Path,
        metavar="TOML",
        help="prices of models, for keys without prices of their own (docs/api-keys.md)",
    )
    parser.add_argument(
        "--usage-days",
        type=int,
        default=400,
        help="keep rows of usage so long, at least 32; 0 for ever (default 400)",
    )
    parser.add_argument(
        "--audit-days", type=float, default=90.0, help="keep audit lines so long; 0 writes none"
    )
    parser.add_argument(
        "--audit-mib", type=int, default=1024, help="bytes of old audit files (default 1024)"
    )
    add_log_format(parser)


def read_access(args: argparse.Namespace) -> AccessSettings | None:
    """Read what `add_access` declared; None without `--state`.

    Raises:
        ConfigError: a flag that needs `--state` came without it, or a value is out of range.
    """
    from tidegate.cloud.access_settings import AccessSettings
    from tidegate.cloud.audit import AuditSettings
    from tidegate.cloud.price_table import PriceTable, read_prices

    if args.state is None:
        given = (args.limits_redis, args.metrics_per_key, args.metrics_need_key)
        if any((*given, args.tls_client_keys, args.prices)):
            raise ConfigError("state", None, "a folder, as limits or metrics of keys are asked for")
        return None
    if args.tls_client_keys and args.tls_client_ca is None:
        raise ConfigError("tls-client-ca", None, "a PEM file, as --tls-client-keys is given")
    audit = None
    if args.audit_days != 0:
        audit = AuditSettings(keep_days=args.audit_days, keep_bytes=args.audit_mib << 20)
    return AccessSettings(
        state=args.state,
        redis=args.limits_redis,
        audit=audit,
        metrics_per_key=args.metrics_per_key,
        metrics_need_key=args.metrics_need_key,
        client_keys=args.tls_client_keys,
        prices=PriceTable() if args.prices is None else read_prices(args.prices),
        usage_days=args.usage_days or None,
    )
