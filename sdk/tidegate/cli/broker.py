"""Run a small MQTT broker in this process, for laptops and trials; production runs mosquitto.

Anonymous and without TLS, so it listens on loopback only. What goes through it is sealed end to end
either way.

Example:
  tidegate broker --listen 127.0.0.1:1883
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--listen", default="127.0.0.1:1883", help="HOST:PORT to listen on")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
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
