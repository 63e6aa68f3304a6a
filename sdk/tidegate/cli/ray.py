r"""Run the cloud service on Ray Serve: several engines, an HTTP front, a gateway on a broker.

It starts a Ray of its own on this machine, or joins the cluster at --address. It needs the extra
`ray`. Ray's own ports take no password: keep a cluster on a private network.

Example:
  tidegate ray examples/assistant/cloud --listen 127.0.0.1:8090 --replicas 1:4
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.cli.cloud_access import add_access, read_access
from tidegate.cli.executor_flags import add_executor, read_executor
from tidegate.cli.link_http import add_link_http, read_link_http
from tidegate.cli.logs import LOG_FORMATS
from tidegate.cli.service import add_link, add_service, read_service
from tidegate.cli.trust import add_trust, read_trust
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.cloud.ray.settings import RaySettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "model",
        type=Path,
        help="checkpoint or bundle as for tidegate cloud, the same on every node",
    )
    parser.add_argument("--name", help="model id to serve it under (default: the folder's name)")
    parser.add_argument("--address", help="HOST:PORT of a Ray cluster, or auto for this machine's")
    add_service(parser, listen="127.0.0.1:8090")
    add_access(parser)
    add_trust(parser)
    parser.add_argument("--context", type=int, help="prompt plus answer of one request, in tokens")
    add_executor(parser)
    add_link(parser, end="gateway", broker="to listen on")
    add_link_http(parser)
    _add_scale(parser)


def _add_scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--replicas", default="1:4", metavar="LEAST:MOST", help="engines (default 1:4)"
    )
    parser.add_argument(
        "--target-ongoing",
        type=float,
        help="requests of one engine that they are scaled to (default: three quarters of --rows)",
    )
    parser.add_argument(
        "--queue", type=int, default=512, help="calls that may wait in a front (default 512)"
    )
    parser.add_argument("--fronts", type=int, default=1, help="processes for HTTP (default 1)")
    parser.add_argument("--cpus", type=float, default=1.0, help="of each engine (default 1)")
    parser.add_argument("--gpus", type=float, default=0.0, help="of each engine (default 0)")
    parser.add_argument("--upscale-delay", type=float, default=5.0, help="seconds (default 5)")
    parser.add_argument(
        "--downscale-delay", type=float, default=120.0, help="seconds (default 120)"
    )
    parser.add_argument(
        "--look-back", type=float, default=10.0, help="seconds of load to look at (default 10)"
    )
    parser.add_argument("--drain", type=float, default=30.0, help="seconds to finish (default 30)")


def run(args: argparse.Namespace) -> int:
    """Deploy everything, then serve until SIGTERM or SIGINT."""
    from tidegate.cli.listen import announce, run_until_signal

    settings = _settings(args)

    async def main(stop: asyncio.Event) -> None:
        from tidegate.api.lifecycle import stop_on_signals
        from tidegate.cloud.ray.application import cluster, deploy, withdraw

        # Ray's calls block, and what is put on the cluster runs in processes of its own.
        with cluster(address=args.address):
            # Ray has put its own in their place, which would abort the process after 3 s.
            stop_on_signals(stop)
            url = await asyncio.to_thread(deploy, settings)
            announce(f"tidegate ray: {settings.model_id} on {url}")
            await stop.wait()
            await asyncio.to_thread(withdraw)

    return run_until_signal(main, formatter=LOG_FORMATS[args.log_format]())


def _settings(args: argparse.Namespace) -> RaySettings:
    """What the flags say.

    Raises:
        ConfigError: a flag is wrong, or nothing that a cluster can do.
    """
    from tidegate.cloud.link_front import GatewaySettings
    from tidegate.cloud.ray.settings import RaySettings, ScaleSettings

    service = read_service(args)
    if service.traces is not None:
        allowed = "absent: spans do not go through Ray yet"
        raise ConfigError("otlp-traces-endpoint", args.otlp_traces_endpoint, allowed)
    gateway = None
    if service.link is not None:
        gateway = GatewaySettings(
            broker=service.link.broker,
            keys=service.link.keys.resolve(),
            broker_check=service.link.broker_check,
            suites=service.link.suites,
            http=read_link_http(args),
        )
    least, most = _replicas(args.replicas)
    return RaySettings(
        model=args.model.resolve(),
        model_id=args.name or args.model.resolve().name,
        host=service.host,
        port=service.port,
        fronts=args.fronts,
        executor=read_executor(args),
        scale=ScaleSettings(
            min_replicas=least,
            max_replicas=most,
            target_ongoing=args.target_ongoing,
            most_queued=args.queue,
            upscale_delay_s=args.upscale_delay,
            downscale_delay_s=args.downscale_delay,
            look_back_s=args.look_back,
            cpus=args.cpus,
            gpus=args.gpus,
        ),
        api_key_hashes=service.api_key_hashes,
        access=read_access(args),
        gateway=gateway,
        drain_s=args.drain,
        trusted=read_trust(args.trust),
        tls=service.tls,
        vllm_metrics=not args.no_vllm_metrics,
    )


def _replicas(text: str) -> tuple[int, int]:
    """Read `LEAST:MOST`, or one number for both."""
    least, _, most = text.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal()):
        raise ConfigError("replicas", text, "LEAST:MOST, as 1:4, or one number")
    return int(least), int(most or least)
