"""Reads `host:port` and other flags of services, and runs one until a signal says stop."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from tidegate.cli.logs import TextFormatter, log_stray, start_log
from tidegate.errors import ConfigError


def parse_listen(text: str) -> tuple[str, int]:
    """Read `HOST:PORT`, `[IPv6]:PORT` or `:PORT` (then loopback); port 0 takes any free one."""
    host, separator, port = text.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError("listen", text, "HOST:PORT with a port from 0 to 65535")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def check_link(link: str | None, keys: Path | None) -> None:
    """Refuse `--link` without `--keys` and the other way round; shows no URL: it may hold a key."""
    if link is not None and keys is None:
        raise ConfigError("keys", None, "the folder of the keys for --link (tidegate keys pair)")
    if keys is not None and link is None:
        raise ConfigError("link", None, "the broker's URL, as --keys is given")


def parse_suites(text: str) -> tuple[int, ...]:
    """Read `--link-suites`: numbers with commas in between."""
    from tidegate.link.suites import check_suites

    words = text.split(",")
    known = all(word.isascii() and word.isdigit() for word in words)
    return check_suites([int(word) for word in words] if known else [])


def run_until_signal(
    main: Callable[[asyncio.Event], Awaitable[None]], *, formatter: logging.Formatter | None = None
) -> int:
    """Run `main` with an event that SIGTERM and SIGINT set; returns the exit status."""
    from tidegate.api.lifecycle import stop_on_signals

    start_log(formatter or TextFormatter())

    async def supervise() -> None:
        asyncio.get_running_loop().set_exception_handler(log_stray)
        stop = asyncio.Event()
        stop_on_signals(stop)
        await main(stop)

    asyncio.run(supervise())
    return 0


def announce(line: str) -> None:
    """Tell people, and scripts that wait for it, that a service is up: one line on stdout."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def read_hashes(path: Path) -> tuple[str, ...]:
    """The first word of every line that is neither empty nor a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError("api-key-file", str(path), "a readable text file") from error
    words = [line.split()[0] for line in lines if line.strip()]
    hashes = tuple(word for word in words if not word.startswith("#"))
    if not hashes:
        # Serving everyone is what leaving the flag out means; an empty file is a mistake.
        raise ConfigError("api-key-file", str(path), "a file with at least one hash")
    return hashes
