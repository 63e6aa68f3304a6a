"""The steps of `tidegate doctor link` for the second path: each gateway, then one sealed answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tidegate.cli.doctor_link_checks import Finding
from tidegate.cli.doctor_link_gateway import round_trip
from tidegate.errors import ConfigError, IdentityError, TidegateError
from tidegate.link.broker_tls import TlsFiles, tls_context
from tidegate.link.http_device import HttpTransport
from tidegate.link.http_peer import Peer
from tidegate.link.http_url import HttpUrl
from tidegate.link.identity import DeviceIdentity, load_device

_IN_USE = "another process is using these keys"
_MENDS = {
    "mismatch": "let the gateway make a certificate for this name: --link-http-name",
    "certificate refused": "put the authority's ca.pem into the folder of keys as broker-ca.pem",
    "certificate required": "put the client certificate into the folder of keys: tidegate enroll",
    "no gateway": "something else answers there: correct --link-http, or the proxy's path",
    "refused": "start the gateway with --link-http, or correct the port",
    "unrecognised name": "let the gateway make a certificate for this name: --link-http-name",
}


async def examine_http(urls: Sequence[str], keys: Path, *, plain: bool) -> list[Finding]:
    """Take the steps for every URL.

    Raises:
        ConfigError: a URL is none.
    """
    parsed = [HttpUrl.parse(url, plain=plain) for url in urls]
    try:
        who = load_device(keys)
        files = TlsFiles.in_folder(keys)
        tls_context(files)
    except (IdentityError, ConfigError) as error:
        mend = "name the folder that `tidegate enroll` wrote; only a device has this path"
        return [_failed("http", str(error), mend)]
    findings = [await _greet(url, who, files) for url in parsed]
    if any(finding.state == "failed" for finding in findings):
        what = "a gateway over HTTP comes first"
        return [*findings, Finding(check="http trip", state="skipped", what=what)]
    return [*findings, *[await _trip(str(url), keys, files, plain=plain) for url in parsed]]


async def _greet(url: HttpUrl, who: DeviceIdentity, files: TlsFiles) -> Finding:
    tls = tls_context(files) if url.tls else None
    began_s = time.monotonic()
    peer = Peer(
        url, tls, who, who=lambda: who, take=lambda frame: None, opened=lambda gateway_id: None
    )
    try:
        gateway_id = await peer.greet()
    except TidegateError as error:
        said = str(error)
        known = [mend for word, mend in _MENDS.items() if word in said]
        mend = (known or ["see the gateway's log, and whether a firewall lets HTTPS through"])[0]
        return _failed("http", f"{url}: {said}", mend)
    took_ms = (time.monotonic() - began_s) * 1000
    what = f"{url} is {gateway_id}, answers in {took_ms:.1f} ms"
    if url.tls or url.loopback:
        return _ok("http", what)
    mend = "use https:// (docs/deploy/http.md)"
    return Finding(check="http", state="warning", what=f"{what}, without TLS", mend=mend)


async def _trip(url: str, keys: Path, files: TlsFiles, *, plain: bool) -> Finding:
    try:
        transport = HttpTransport([url], partial(load_device, keys), files=files, plain=plain)
        took_s = await round_trip(transport, keys)
    except TidegateError as error:
        if _IN_USE in str(error):
            # A stream of ours would end the daemon's.
            what = "the daemon is using these keys: ask it, GET /status"
            return Finding(check="http trip", state="skipped", what=what)
        return _failed("http trip", str(error), "see the gateway's log and its registry")
    return _ok("http trip", f"{took_s * 1000:.0f} ms, sealed both ways")


def _ok(check: str, what: str) -> Finding:
    return Finding(check=check, state="ok", what=what)


def _failed(check: str, what: str, mend: str) -> Finding:
    return Finding(check=check, state="failed", what=what, mend=mend)
