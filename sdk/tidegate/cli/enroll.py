"""Join a fleet with a one-time token: keys are made here, the gateway certifies them.

The token comes from `tidegate keys token`; a dash reads it from stdin, so that it is in no list of
processes. Without a way to the gateway, the request and its answer travel as files: run it once
with --request-file and, when the answer is here, once more with --answer-file.

Example:
  tidegate enroll tgt1_... --keys /var/lib/tidegate/device
  tidegate enroll - --keys device --request-file device.request < token
  tidegate enroll - --keys device --answer-file device.answer < token
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tidegate.errors import ConfigError, IdentityError, UnavailableError

_TIMEOUT_S = 30.0
_MOST_CHARACTERS = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("token", help="from 'tidegate keys token', or - to read it from stdin")
    parser.add_argument("--keys", type=Path, required=True, help="folder for the device's keys")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--request-file", type=Path, help="write the request there and end")
    files.add_argument("--answer-file", type=Path, help="finish with the answer in this file")


def run(args: argparse.Namespace) -> int:
    """Enrol."""
    from tidegate.link.enrolment import MOST_MESSAGE_BYTES, Token
    from tidegate.link.enrolment_device import begin, fingerprint, finish
    from tidegate.link.keyfiles import read_public, write_atomic

    token = Token.decode(sys.stdin.readline() if args.token == "-" else args.token)
    if args.request_file is not None:
        write_atomic(args.request_file, begin(args.keys, token))
        _say(f"bring {args.request_file} to the gateway (tidegate keys answer), then run this")
        _say("again with --answer-file")
        return 0
    if args.answer_file is not None:
        answer = read_public(args.answer_file, max_bytes=MOST_MESSAGE_BYTES)
    elif token.url:
        answer = _post(token.url, begin(args.keys, token), MOST_MESSAGE_BYTES)
    else:
        raise ConfigError("request-file", None, "given: this token's fleet enrols by files")
    granted = finish(args.keys, token, answer, now_s=time.time())
    _say(f"enrolled in {granted.group!r} as {granted.handle}; root {fingerprint(token.root)}")
    return 0


def _post(url: str, request: bytes, most_bytes: int) -> bytes:
    """Send the request; what comes back is believed only once it verifies."""
    import httpx

    try:
        with httpx.stream("POST", url, content=request, timeout=_TIMEOUT_S) as response:
            body = b""
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > most_bytes:
                    raise IdentityError(f"enrolment answer: larger than {most_bytes} bytes")
            status = response.status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UnavailableError(f"enrolment endpoint {url}: {error}") from error
    if status == 200:
        return body
    raise IdentityError(f"the gateway refuses with status {status}: {_message(body)}")


def _message(body: bytes) -> str:
    """The endpoint's error, as a stranger's text: printable and short."""
    import json

    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = "no reason given"
    return "".join(one if one.isprintable() else "?" for one in message)[:_MOST_CHARACTERS]


def _say(line: str) -> None:
    print(line, file=sys.stderr)
