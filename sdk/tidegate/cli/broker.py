"""Run a small MQTT broker in this process, for laptops, or set up mosquitto for everything else.

The one in this process takes anyone and has no TLS, so it listens on loopback only. What goes
through a broker is sealed end to end either way.

Example:
  tidegate broker --listen 127.0.0.1:1883
  tidegate broker config broker/ --fleet fleet/ --gateway gw0 --host broker.example
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    from tidegate.cli import broker_config

    parser.add_argument("--listen", default="127.0.0.1:1883", help="HOST:PORT to listen on")
    kinds = parser.add_subparsers(dest="kind", metavar="config")
    config = kinds.add_parser(
        "config",
        help="write a folder that mosquitto 2 runs from",
        description=broker_config.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    broker_config.add_arguments(config)


def run(args: argparse.Namespace) -> int:
    """Write the folder, or serve until SIGTERM or SIGINT."""
    if args.kind == "config":
        from tidegate.cli import broker_config

        return broker_config.run(args)
    from tidegate.cli.listen import announce, parse_listen, run_until_signal
    from tidegate.link.broker import run_broker

    host, port = parse_listen(args.listen)

    async def main(stop: asyncio.Event) -> None:
        def ready() -> None:
            announce(f"tidegate broker: mqtt://{host}:{port}")

        broker = asyncio.create_task(run_broker(host, port, on_ready=ready))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({broker, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (broker, stopping):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await broker

    return run_until_signal(main)
