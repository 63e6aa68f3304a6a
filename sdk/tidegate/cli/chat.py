"""Ask a running device or cloud one question and stream the answer.

Example:
  tidegate chat "turn on the lamp in the kitchen" --url http://127.0.0.1:8080
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("prompt", help="what to ask")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of the device or cloud")
    parser.add_argument("--api-key", help="for a cloud that wants one")
    parser.add_argument("--privacy", choices=("local", "redact", "sealed", "any"))
    parser.add_argument("--route", choices=("auto", "edge", "cloud"))
    parser.add_argument("--deadline-ms", type=int, help="until the whole answer should be there")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--max-tokens", type=int)


def run(args: argparse.Namespace) -> int:
    """Stream the answer to stdout and where it came from to stderr."""
    raise NotImplementedError
