r"""Run the cloud service on a checkpoint: HTTP behind an API key, and a gateway on a broker.

Example:
  tidegate cloud examples/assistant/cloud --listen 127.0.0.1:8090 --api-key-file keys.txt \
      --link mqtt://127.0.0.1:1883 --keys /var/lib/tidegate/gateway
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from tidegate.cli.listen import add_link_suites


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("--listen", default="127.0.0.1:8090", help="HOST:PORT of the HTTP API")
    parser.add_argument("--name", help="model id to serve it under (default: the folder's name)")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        help="file with one SHA-256 per line of the keys that may call (see: tidegate keys api);"
        " beyond loopback required",
    )
    parser.add_argument("--context", type=int, help="prompt plus answer of one request, in tokens")
    parser.add_argument("--rows", type=int, default=8, help="requests that run at once (default 8)")
    parser.add_argument("--threads", type=int, help="threads (default: the runtime's choice)")
    parser.add_argument("--link", metavar="URL", help="mqtt://... of the broker to listen on")
    parser.add_argument("--keys", type=Path, help="folder with the gateway's keys, for --link")
    parser.add_argument(
        "--broker-check",
        choices=("auto", "on", "off"),
        default="auto",
        help="refuse a broker that lets one client use another's topics (default: unless it is"
        " on loopback)",
    )
    parser.add_argument(
        "--link-pacing",
        choices=("off", "tick", "constant"),
        default="tick",
        help="when chunks of answers leave: at once, every 40 ms, or every 40 ms in one size with"
        " fillers, so that neither their times nor their sizes follow the text (default tick)",
    )
    add_link_suites(parser)


def run(args: argparse.Namespace) -> int:
    """Open the checkpoint, then serve until SIGTERM or SIGINT."""
    from tidegate.cli.listen import (
        announce,
        check_link,
        parse_listen,
        parse_suites,
        read_hashes,
        run_until_signal,
    )
    from tidegate.cloud.service import CloudSettings, GatewaySettings, open_cloud

    check_link(args.link, args.keys)
    host, port = parse_listen(args.listen)
    settings = CloudSettings(
        checkpoint=args.checkpoint,
        model_id=args.name or args.checkpoint.resolve().name,
        host=host,
        port=port,
        api_key_hashes=() if args.api_key_file is None else read_hashes(args.api_key_file),
        rows=args.rows,
        context_tokens=args.context,
        threads=args.threads,
        gateway=None
        if args.link is None
        else GatewaySettings(
            broker=args.link,
            keys=args.keys,
            broker_check=args.broker_check,
            suites=parse_suites(args.link_suites),
            pacing=args.link_pacing,
        ),
    )

    async def main(stop: asyncio.Event) -> None:
        async with open_cloud(settings) as cloud:
            announce(f"tidegate cloud: {cloud.engine.model_id} on {cloud.server.url}")
            await cloud.run(stop)

    return run_until_signal(main)
