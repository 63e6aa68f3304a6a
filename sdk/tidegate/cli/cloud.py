r"""Run the cloud service on a checkpoint or bundle: HTTP behind an API key, a gateway on a broker.

Example:
  tidegate cloud examples/assistant/cloud --listen 127.0.0.1:8090 --api-key-file keys.txt \
      --link mqtt://127.0.0.1:1883 --keys /var/lib/tidegate/gateway
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidegate.cli.cloud_access import add_access, read_access
from tidegate.cli.cloud_encoders import add_encoders, read_encoders
from tidegate.cli.cloud_models import add_models, model_lines, read_models
from tidegate.cli.executor_flags import add_executor
from tidegate.cli.link_http import add_link_http, read_link_http
from tidegate.cli.logs import LOG_FORMATS
from tidegate.cli.service import add_link, add_service, read_service
from tidegate.cli.settings_file import Options, Origin, read_table
from tidegate.cli.trust import add_trust, read_trust

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from tidegate.cloud.model_settings import PoolSettings
    from tidegate.cloud.service import CloudSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="cloud.toml: flags without dashes, and [[model]] tables; given flags count before it",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="show what holds and where it comes from, and stop",
    )
    add_models(parser)
    add_service(parser, listen="127.0.0.1:8090")
    add_access(parser)
    add_trust(parser)
    parser.add_argument("--context", type=int, help="prompt plus answer of one request, in tokens")
    add_executor(parser)
    add_encoders(parser)
    _add_supervision(parser)
    add_link(parser, end="gateway", broker="to listen on")
    add_link_http(parser)
    parser.add_argument(
        "--link-pacing",
        choices=("off", "tick", "constant"),
        default="tick",
        help="when chunks of answers leave: at once, every 40 ms, or every 40 ms in one size with"
        " fillers, so that neither their times nor their sizes follow the text (default tick)",
    )
    options = Options(parser, without=("config", "print-config", "name", "model"))
    parser.set_defaults(options=options)


def _add_supervision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--drain",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long running answers may take after SIGTERM (default 30)",
    )
    parser.add_argument(
        "--stall-after",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="/health fails when there is work and no step ended for so long (default 30)",
    )
    parser.add_argument(
        "--restart-when-stuck",
        action="store_true",
        help="exit with status 70 when /health fails, for a supervisor to start it again",
    )


def run(args: argparse.Namespace) -> int:
    """Open the models, then serve until SIGTERM or SIGINT; SIGHUP reads the file again."""
    from tidegate.cli.listen import announce, run_until_signal
    from tidegate.cloud.service import open_cloud

    if options_of(args).given(args, "print_config"):
        print("\n".join(_effective(args)))
        return 0
    settings = read_settings(args)
    found, _, _ = _resolved(args)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the service listens to it

    async def main(stop: asyncio.Event) -> None:
        async with open_cloud(settings, reread=partial(read_settings, args)) as cloud:
            if cloud.http is not None:
                _log.info("devices over HTTP on %s", cloud.http.url)
            names = ", ".join(cloud.inside.pool.entries)
            announce(f"tidegate cloud: {names} on {cloud.server.url}")
            await cloud.run(stop)

    return run_until_signal(main, formatter=LOG_FORMATS[found.log_format]())


def options_of(args: argparse.Namespace) -> Options:
    """The flags, as `add_arguments` declared them."""
    options = args.options
    assert isinstance(options, Options), "the parser keeps them"
    return options


def read_settings(args: argparse.Namespace) -> CloudSettings:
    """What flags and file say now.

    Raises:
        ConfigError: a value is not allowed, or the file has a key that nothing reads.
    """
    from tidegate.cloud.link_front import GatewaySettings
    from tidegate.cloud.service import CloudSettings

    found, _, models = _resolved(args)
    service = read_service(found)
    gateway = None
    if service.link is not None:
        gateway = GatewaySettings(
            broker=service.link.broker,
            keys=service.link.keys,
            broker_check=service.link.broker_check,
            suites=service.link.suites,
            pacing=found.link_pacing,
            http=read_link_http(found),
        )
    return CloudSettings(
        models=models,
        update=found.update,
        host=service.host,
        port=service.port,
        api_key_hashes=service.api_key_hashes,
        gateway=gateway,
        drain_s=found.drain,
        stall_after_s=found.stall_after,
        restart_when_stuck=found.restart_when_stuck,
        access=read_access(found),
        encoders=read_encoders(found),
        tls=service.tls,
        traces=service.traces,
        vllm_metrics=not found.no_vllm_metrics,
        trusted=read_trust(found.trust),
    )


def _resolved(
    args: argparse.Namespace,
) -> tuple[argparse.Namespace, dict[str, Origin], PoolSettings]:
    """Flags before file before defaults; where each comes from; the models."""
    options, table, folder = options_of(args), dict[str, Any](), Path()
    if options.given(args, "config"):
        table, folder = read_table(args.config), args.config.parent
    tables = table.pop("model", None)
    found, origins = options.resolved(args, table, folder)
    return found, origins, read_models(found, tables, options, folder)


def _effective(args: argparse.Namespace) -> Iterator[str]:
    read_settings(args)  # what is wrong is said, and not shown
    found, origins, models = _resolved(args)
    yield from options_of(args).lines(found, origins)
    yield from model_lines(models.models)
