"""docs/deploy/http.md and docs/link-format.md name the numbers and flags that the code has."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tidegate.cli.link_http import add_gateway_urls, add_link_http
from tidegate.cloud.link_http import LinkHttpTiming
from tidegate.cloud.link_http_server import MOST_PER_ADDRESS, PromptProtocol
from tidegate.link.http_access import CHALLENGE_BYTES, CHALLENGE_S, PATH, SCHEME, WINDOW
from tidegate.link.http_device import MOST_GATEWAYS
from tidegate.link.http_frames import HEAD, POST_BYTES, Kind
from tidegate.link.http_stream import BEAT_S, HubLimits
from tidegate.link.path_choice import PathTiming
from tidegate.link.wire import MAX_MESSAGE_BYTES

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "deploy" / "http.md").read_text(encoding="utf-8")
FORMAT = (DOCS / "link-format.md").read_text(encoding="utf-8").partition("## HTTP")[2]
SESSIONS = (DOCS / "link-sessions.md").read_text(encoding="utf-8")


def test_the_flags_of_the_page_are_those_of_the_commands() -> None:
    known = set[str]()
    for add in (add_link_http, add_gateway_urls):
        parser = argparse.ArgumentParser()
        add(parser)
        known |= {word for word in parser.format_help().split() if word.startswith("--link-http")}
    known = {word.strip("[],:)") for word in known}
    assert known <= set(re.findall(r"--link-http[a-z-]*", PAGE))
    assert set(re.findall(r"--link-http[a-z-]*", PAGE)) <= known


def test_the_limits_of_the_page_are_those_of_the_code() -> None:
    limits, timing = HubLimits(), LinkHttpTiming()
    assert f"| {limits.most_devices}; the next one" in PAGE
    assert f"| connections | {2 * limits.most_devices + 64} |" in PAGE
    assert f"| connections from one address | {MOST_PER_ADDRESS}," in PAGE
    assert f"(gateway) | {MOST_PER_ADDRESS}; any number" in PAGE
    assert f"| one message | {MAX_MESSAGE_BYTES // 1024} KiB |" in PAGE
    assert f"| {POST_BYTES // 1024} KiB, whole within {timing.body_s:g} s |" in PAGE
    assert f"| {limits.device_bytes >> 20} MiB, then messages are lost" in PAGE
    assert f"| {limits.all_bytes >> 20} MiB |" in PAGE
    assert f"is hung up on after {timing.write_s:g} s" in PAGE
    assert f"is closed within {2 * PromptProtocol.look_every_s:g} s" in PAGE
    assert f"its stream ends within {timing.recheck_s:g} s" in PAGE
    assert f"more than {BEAT_S:g} s" in PAGE
    assert f"client_max_body_size {POST_BYTES // 1024}k" in PAGE
    assert MOST_GATEWAYS == 8
    assert "up to eight" in PAGE


def test_when_a_path_is_changed_is_told_as_it_is() -> None:
    timing = PathTiming()
    assert f"`--link-http-after SECONDS` (device) | {timing.patience_s:g} |" in PAGE
    assert f"away for {timing.patience_s:g} s" in SESSIONS
    assert f"through it for {timing.fresh_s:g} s" in SESSIONS
    assert f"stays open for {timing.linger_s:g} s" in SESSIONS
    assert timing.patience_s == timing.steady_s


def test_the_format_is_told_as_it_is() -> None:
    assert HEAD.size == 5
    for kind in Kind:
        assert f"{kind.value} {kind.name}" in FORMAT
    for call in ("GET", "POST"):
        assert f"`{call} {PATH}/" in FORMAT
    assert f"Authorization: {SCHEME} NAME.STATEMENT" in FORMAT
    assert CHALLENGE_BYTES == 16 + 8 + 16
    assert f"for {CHALLENGE_S:g} s" in FORMAT
    assert f"{WINDOW} or more behind" in FORMAT
    assert f"every {BEAT_S:g} s" in FORMAT
    assert f"{POST_BYTES:,}".replace(",", " ") in FORMAT
