r"""Run the cloud service on a checkpoint: HTTP behind an API key, and a gateway on a broker.

Example:
  tidegate cloud examples/assistant/cloud --listen 127.0.0.1:8090 --api-key-file keys.txt \
      --link mqtt://127.0.0.1:1883 --keys /var/lib/tidegate/gateway
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from tidegate.cli.service import add_link, add_service, read_service


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("--name", help="model id to serve it under (default: the folder's name)")
    add_service(parser, listen="127.0.0.1:8090")
    parser.add_argument("--context", type=int, help="prompt plus answer of one request, in tokens")
    parser.add_argument("--rows", type=int, default=8, help="requests that run at once (default 8)")
    parser.add_argument("--threads", type=int, help="threads (default: the runtime's choice)")
    add_link(parser, end="gateway", broker="to listen on")
    parser.add_argument(
        "--link-pacing",
        choices=("off", "tick", "constant"),
        default="tick",
        help="when chunks of answers leave: at once, every 40 ms, or every 40 ms in one size with"
        " fillers, so that neither their times nor their sizes follow the text (default tick)",
    )


def run(args: argparse.Namespace) -> int:
    """Open the checkpoint, then serve until SIGTERM or SIGINT."""
    from tidegate.cli.listen import announce, run_until_signal
    from tidegate.cloud.service import CloudSettings, GatewaySettings, open_cloud

    service = read_service(args)
    gateway = None
    if service.link is not None:
        gateway = GatewaySettings(
            broker=service.link.broker,
            keys=service.link.keys,
            broker_check=service.link.broker_check,
            suites=service.link.suites,
            pacing=args.link_pacing,
        )
    settings = CloudSettings(
        checkpoint=args.checkpoint,
        model_id=args.name or args.checkpoint.resolve().name,
        host=service.host,
        port=service.port,
        api_key_hashes=service.api_key_hashes,
        rows=args.rows,
        context_tokens=args.context,
        threads=args.threads,
        gateway=gateway,
    )

    async def main(stop: asyncio.Event) -> None:
        async with open_cloud(settings) as cloud:
            announce(f"tidegate cloud: {cloud.engine.model_id} on {cloud.server.url}")
            await cloud.run(stop)

    return run_until_signal(main)
