"""Ask a running device or cloud one question and stream the answer.

The answer goes to stdout; where it ran, why, how fast and with how many joules go to stderr.

Example:
  tidegate chat "turn on the lamp in the kitchen" --url http://127.0.0.1:8080
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from tidegate.errors import TidegateError

if TYPE_CHECKING:
    from tidegate.client import Answer, Client

_RETRY_S = 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("prompt", help="what to ask")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of the device or cloud")
    parser.add_argument("--api-key", help="for a cloud that wants one")
    parser.add_argument("--privacy", choices=("local", "redact", "sealed", "any"), default="sealed")
    parser.add_argument("--route", choices=("auto", "edge", "cloud"), default="auto")
    parser.add_argument("--deadline-ms", type=int, help="until the whole answer should be there")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer (default 256)")
    parser.add_argument(
        "--wait", type=float, default=20.0, help="seconds to wait for a service that starts"
    )


def run(args: argparse.Namespace) -> int:
    """Stream the answer to stdout and where it came from to stderr."""
    from tidegate.client import Client, UnavailableError

    give_up_s = time.monotonic() + args.wait
    with Client(args.url, api_key=args.api_key) as client:
        while True:
            try:
                _stream_once(client, args)
                return 0
            except _BrokenOffError as error:
                raise error.cause from None
            except UnavailableError:
                if time.monotonic() > give_up_s:
                    raise
                time.sleep(_RETRY_S)


class _BrokenOffError(Exception):
    """The answer failed after some of it was printed: asking again would print it twice."""

    def __init__(self, cause: TidegateError) -> None:
        super().__init__()
        self.cause = cause


def _stream_once(client: Client, args: argparse.Namespace) -> None:
    """Print one answer as it comes, then where it came from."""
    printed = False
    with client.stream(
        args.prompt,
        privacy=args.privacy,
        route=args.route,
        deadline_ms=args.deadline_ms,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
    ) as stream:
        try:
            for text in stream:
                printed = True
                sys.stdout.write(text)
                sys.stdout.flush()
        except TidegateError as error:
            if printed:
                raise _BrokenOffError(error) from error
            raise
    sys.stdout.write("\n")
    print(f"[{_stats(stream.answer)}]", file=sys.stderr)


def _stats(answer: Answer) -> str:
    """Where it ran and why, how fast, and what it took of the device's energy if that is known."""
    from tidegate.cli.energy_text import energy_text

    rate = answer.timings.tokens_per_s
    speed = "" if rate is None else f", {rate:.0f} tokens/s"
    energy = "" if answer.energy is None else f", {energy_text(answer.energy)}"
    where = f"{answer.route or 'unknown'}: {answer.reason}" if answer.reason else answer.model
    return f"{where}; {answer.usage.completion_tokens} tokens{speed}{energy}"
