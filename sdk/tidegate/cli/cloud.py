r"""Run the cloud service on a checkpoint or bundle: HTTP behind an API key, a gateway on a broker.

Example:
  tidegate cloud examples/assistant/cloud --listen 127.0.0.1:8090 --api-key-file keys.txt \
      --link mqtt://127.0.0.1:1883 --keys /var/lib/tidegate/gateway
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.cli.cloud_access import LOG_FORMATS, add_access, read_access
from tidegate.cli.cloud_encoders import add_encoders, read_encoders
from tidegate.cli.executor_flags import add_executor, read_executor
from tidegate.cli.link_http import add_link_http, read_link_http
from tidegate.cli.service import add_link, add_service, read_service
from tidegate.cli.trust import add_trust, read_trust
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.cloud.model_settings import PoolSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        metavar="MODEL",
        help="folder with config.json and safetensors, or a bundle of `convert --target packed`",
    )
    parser.add_argument("--name", help="model id to serve it under (default: the folder's name)")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a further model, loaded when it is first asked for; may be given several times",
    )
    parser.add_argument(
        "--models-mib",
        type=int,
        help="what several models may take together; idle ones make room (default: nine tenths of"
        " what is available at start)",
    )
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
    """Open the checkpoint, then serve until SIGTERM or SIGINT."""
    from tidegate.cli.listen import announce, run_until_signal
    from tidegate.cloud.link_front import GatewaySettings
    from tidegate.cloud.service import CloudSettings, open_cloud

    service = read_service(args)
    gateway = None
    if service.link is not None:
        gateway = GatewaySettings(
            broker=service.link.broker,
            keys=service.link.keys,
            broker_check=service.link.broker_check,
            suites=service.link.suites,
            pacing=args.link_pacing,
            http=read_link_http(args),
        )
    settings = CloudSettings(
        models=_models(args),
        host=service.host,
        port=service.port,
        api_key_hashes=service.api_key_hashes,
        gateway=gateway,
        drain_s=args.drain,
        stall_after_s=args.stall_after,
        restart_when_stuck=args.restart_when_stuck,
        access=read_access(args),
        encoders=read_encoders(args),
        tls=service.tls,
        vllm_metrics=not args.no_vllm_metrics,
        trusted=read_trust(args.trust),
    )

    async def main(stop: asyncio.Event) -> None:
        async with open_cloud(settings) as cloud:
            if cloud.http is not None:
                print(f"tidegate cloud: devices over HTTP on {cloud.http.url}", file=sys.stderr)
            names = ", ".join(cloud.inside.pool.entries)
            announce(f"tidegate cloud: {names} on {cloud.server.url}")
            await cloud.run(stop)

    return run_until_signal(main, formatter=LOG_FORMATS[args.log_format]())


def _models(args: argparse.Namespace) -> PoolSettings:
    from tidegate.cloud.model_settings import ModelSettings, PoolSettings

    executor = read_executor(args)
    named: list[tuple[str, Path]] = []
    if args.checkpoint is not None:
        named.append((args.name or args.checkpoint.resolve().name, args.checkpoint))
    named += [_named(one) for one in args.model]
    models = tuple(
        ModelSettings(
            name=name, path=path, executor=executor, load="first-use" if place else "start"
        )
        for place, (name, path) in enumerate(named)
    )
    return PoolSettings(models=models, models_mib=args.models_mib, drain_s=args.drain or 1.0)


def _named(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise ConfigError("model", text, "NAME=PATH")
    return name, Path(path)
