"""The steps of `tidegate doctor link`, in the order in which each needs the one before.

A step that fails ends the walk; what follows is listed as not looked at, never left out.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tidegate.cli.doctor_link_gateway import REVOKED_KEY, AdvertFacts, hear_advert, round_trip
from tidegate.errors import IdentityError, TidegateError, UnavailableError
from tidegate.link.broker_access import device_transport
from tidegate.link.broker_check import Plan, device_plan, find_breaches, gateway_plan
from tidegate.link.broker_tls import TlsFiles, describe_ssl, tls_context
from tidegate.link.broker_url import BrokerUrl
from tidegate.link.certificate_facts import check_issued, read_facts, renewal_due_s
from tidegate.link.certificates import gateway_common_name
from tidegate.link.clock import CLOCK_SKEW_S, describe_s, utc
from tidegate.link.gateway_revocation import REVOKED_FILE, read_revocations
from tidegate.link.identity import DeviceIdentity, GatewayIdentity, load_device, load_gateway
from tidegate.link.mqtt_connection import Access, Connection
from tidegate.link.prekeys import ROTATE_AFTER_S
from tidegate.link.topics import Topics
from tidegate.link.transport import EventQueue

NOTICEABLE_S = 5.0
"""A clock this far off is worth a warning; the network takes a part of it."""
_SOON_S = 14 * 86400
_PATIENCE_S = 5.0
_RULES = "give the broker the rules of `tidegate broker config` (docs/deploy/mosquitto.md)"
_ALERTS = {
    "certificate required": "put the client certificate into the folder of keys: tidegate enroll",
    "certificate revoked": "this device was revoked; enroll it anew if that was a mistake",
    "certificate expired": "get a new client certificate: tidegate enroll; or set the clock",
    "unknown ca": "the broker does not know our authority: give it ca.pem of `broker config`",
    "protocol version": "let the broker speak TLS 1.3: tls_version tlsv1.3",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one step found, and what to do about it."""

    check: str
    state: Literal["ok", "warning", "failed", "skipped"]
    what: str
    mend: str = ""


Step = Callable[[], Awaitable[Finding]]


class _Walk:
    """What the steps have learned; each method is one step."""

    def __init__(self, url: str, keys: Path, wait_s: float) -> None:
        self._url_text, self._keys, self._wait_s = url, keys, wait_s
        self._url = BrokerUrl.parse(url)
        self._who: DeviceIdentity | GatewayIdentity | None = None
        self._access: Access | None = None
        self._address: tuple[str, int] | None = None
        self._advert: AdvertFacts | None = None

    @property
    def steps(self) -> Sequence[tuple[str, Step]]:
        shared: list[tuple[str, Step]] = [
            ("keys", self.keys),
            ("certificate", self.certificate),
            ("name", self.name),
            ("tcp", self.tcp),
            ("tls", self.tls),
            ("broker", self.broker),
            ("topics", self.topics),
        ]
        if (self._keys / "gateway.json").exists():
            return shared
        return [
            *shared,
            ("gateway", self.gateway),
            ("clock", self.clock),
            ("prekeys", self.prekeys),
            ("round trip", self.round_trip),
        ]

    async def keys(self) -> Finding:
        is_gateway = (self._keys / "gateway.json").exists()
        try:
            self._who = load_gateway(self._keys) if is_gateway else load_device(self._keys)
        except IdentityError as error:
            return _failed("keys", str(error), "name the folder that `tidegate enroll` wrote")
        what = "a device"
        if isinstance(self._who, GatewayIdentity):
            what = f"gateway {self._who.gateway_id}"
        return _ok("keys", f"{what} of group {self._who.group}")

    async def certificate(self) -> Finding:
        step = "certificate"
        try:
            files = TlsFiles.in_folder(self._keys)
            context = tls_context(files) if self._url.tls else None
            self._access = Access(url=self._url, tls=context, mqtt5=True)
            if files.certificate is None:
                return self._without_certificate()
            pem = files.certificate.read_bytes()
            ca = files.ca.read_bytes() if files.ca is not None else pem
            assert files.key is not None
            check_issued(pem, ca, files.key.read_bytes())
        except TidegateError as error:
            return _failed(step, str(error), "get a new one: tidegate enroll, in a new folder")
        facts, now_s = read_facts(pem), time.time()
        if facts.common_name != self._name():
            what = f"it names {facts.common_name!r}, this folder's topics are {self._name()!r}'s"
            return _failed(step, what, "use the certificate that came with these keys")
        if now_s >= facts.naf_s:
            mend = "get a new one (tidegate enroll), or set the clock if it is wrong"
            return _failed(step, f"expired {utc(facts.naf_s)}", mend)
        if now_s < facts.nbf_s:
            return _failed(step, f"not valid before {utc(facts.nbf_s)}", "set the clock")
        what = f"valid for {describe_s(facts.naf_s - now_s)} more"
        if now_s >= renewal_due_s(pem):
            mend = "it renews itself while the daemon runs and a gateway enrols; see its log"
            return Finding(check=step, state="warning", what=f"{what}, renewal is due", mend=mend)
        return _ok(step, what)

    def _without_certificate(self) -> Finding:
        if not self._url.tls:
            return _ok("certificate", "none, and mqtt:// uses none")
        what = "there is none: a broker of `tidegate broker config` will not let us in"
        mend = "tidegate enroll, or copy broker-cert.pem and broker-key.pem into the folder"
        return Finding(check="certificate", state="warning", what=what, mend=mend)

    def _name(self) -> str:
        """What our certificate must call us."""
        assert self._who is not None
        if isinstance(self._who, DeviceIdentity):
            return self._who.handle
        return gateway_common_name(self._who.gateway_id)

    async def name(self) -> Finding:
        loop, url = asyncio.get_running_loop(), self._url
        try:
            async with asyncio.timeout(_PATIENCE_S):
                found = await loop.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
        except TimeoutError:
            mend = "see /etc/resolv.conf, or use the broker's address"
            return _failed("name", f"{url.host}: the name server does not answer", mend)
        except OSError as error:
            mend = "correct the name in --link, or see /etc/resolv.conf and /etc/hosts"
            return _failed("name", f"{url.host}: {error.strerror or error}", mend)
        addresses = sorted({str(one[4][0]) for one in found})
        return _ok("name", f"{url.host} is {', '.join(addresses)}")

    async def tcp(self) -> Finding:
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(_PATIENCE_S):
                _, writer = await asyncio.open_connection(self._url.host, self._url.port)
        except TimeoutError:
            what = f"{self._url}: no answer within {_PATIENCE_S:g} s"
            return _failed("tcp", what, "a firewall drops it, or the machine is off")
        except OSError as error:
            what = f"{self._url}: {(error.strerror or str(error)).lower()}"
            return _failed("tcp", what, "start the broker, or correct the port in --link")
        writer.close()
        return _ok("tcp", f"connected in {(time.monotonic() - began_s) * 1000:.1f} ms")

    async def tls(self) -> Finding:
        assert self._access is not None
        if self._access.tls is None:
            if self._url.loopback:
                return _ok("tls", "none, and the broker is on this machine")
            what = "none: the network sees handles, sizes and times (what is said stays sealed)"
            mend = "use mqtts:// (docs/deploy/mosquitto.md)"
            return Finding(check="tls", state="warning", what=what, mend=mend)
        try:
            facts = await asyncio.to_thread(_handshake, self._url, self._access.tls)
        except ssl.SSLError as error:
            told = describe_ssl(error)
            return _failed("tls", told, _mend_server(told, self._url.host))
        except OSError as error:
            what = (error.strerror or str(error) or type(error).__name__).lower()
            return _failed("tls", what, "the port may not speak TLS: see the broker's log")
        left_s = ssl.cert_time_to_seconds(str(facts["notAfter"])) - time.time()
        what = f"{facts['version']}, the broker's certificate is good for {describe_s(left_s)}"
        if left_s < _SOON_S:
            mend = "run `tidegate broker config` again and send mosquitto SIGHUP"
            return Finding(check="tls", state="warning", what=what, mend=mend)
        return _ok("tls", what)

    async def broker(self) -> Finding:
        assert self._access is not None
        said = ""
        for mqtt5 in (True, False):
            self._access = replace(self._access, mqtt5=mqtt5)
            connection = Connection(self._access, EventQueue())
            try:
                await connection.open()
            except UnavailableError as error:
                said = said or str(error)
                continue
            finally:
                await connection.close()
            return _ok("broker", f"takes us, MQTT {'5' if mqtt5 else '3.1.1'}")
        advice = [mend for alert, mend in _ALERTS.items() if alert in said]
        return _failed("broker", said, (advice or ["see the broker's log"])[0])

    async def topics(self) -> Finding:
        assert self._access is not None
        try:
            breaches = await find_breaches(self._access, self._plan())
            problem = await self._own_topics()
        except UnavailableError as error:
            return _failed("topics", str(error), "see the broker's log")
        if problem:
            return _failed("topics", problem, _RULES)
        if breaches:
            return _failed("topics", f"this client may {breaches}", _RULES)
        if not self._access.mqtt5:
            return _ok("topics", "others' cannot be read; MQTT 3.1.1 does not tell about writing")
        return _ok("topics", "ours can be used, others' can be neither read nor written")

    def _plan(self) -> Plan:
        assert self._who is not None
        if isinstance(self._who, DeviceIdentity):
            return device_plan(self._who.group, self._who.handle)
        return gateway_plan(self._who.group, self._who.gateway_id)

    async def _own_topics(self) -> str:
        """What of our own we cannot use."""
        assert self._who is not None
        assert self._access is not None
        topics = Topics(self._who.group)
        if isinstance(self._who, DeviceIdentity):
            read = [topics.response(self._who.handle), topics.every_advert]
            write = topics.request("doctor", self._who.handle)
        else:
            read = [topics.every_request(self._who.gateway_id)]
            write = topics.response("doctor")
        connection = Connection(self._access, EventQueue())
        try:
            await connection.open()
            for topic in read:
                if not all(await connection.subscribe([topic])):
                    return f"the broker does not let us read {topic}"
            if not await connection.try_publish(write, b"") and self._access.mqtt5:
                return f"the broker does not let us write {write}"
        finally:
            await connection.close()
        return ""

    async def gateway(self) -> Finding:
        assert isinstance(self._who, DeviceIdentity)
        assert self._access is not None
        try:
            revoked = read_revocations(self._keys, self._who.root, self._who.group)
            heard = await hear_advert(self._access, self._who, wait_s=self._wait_s, revoked=revoked)
        except UnavailableError as error:
            return _failed("gateway", str(error), "see the broker's log")
        except IdentityError as error:
            mend = "another fleet uses this broker and group: enroll the device in this one"
            if REVOKED_FILE in str(error):
                mend = "bring the fleet's newest list here: tidegate keys import-revoked"
            if REVOKED_KEY in str(error):
                mend = "give it a new key (tidegate keys rotate gateway), or start another gateway"
            return _failed("gateway", str(error), mend)
        if heard is None:
            what = f"none has announced itself within {self._wait_s:g} s"
            mend = "start it (tidegate cloud ... --link), on this broker and in this group"
            return _failed("gateway", what, mend)
        self._advert = heard
        models = ", ".join(model.id for model in heard.advert.models) or "no model"
        return _ok("gateway", f"{heard.advert.gateway_id} serves {models}")

    async def clock(self) -> Finding:
        assert self._advert is not None
        heard = self._advert
        off_s = heard.heard_s - heard.advert.issued_s
        if heard.retained and off_s >= 0:
            if heard.heard_s < heard.advert.expires_s:
                return _ok("clock", f"agrees with the gateway's to {describe_s(off_s)} or better")
            what = (
                f"the gateway's last advert ended {describe_s(off_s)} ago, or this clock is ahead"
            )
            mend = "see whether the gateway runs, and set the clock (timedatectl set-ntp true)"
            return _failed("clock", what, mend)
        way = "ahead of" if off_s > 0 else "behind"
        what = f"{describe_s(abs(off_s))} {way} the gateway's signed time"
        mend = "set the clock: timedatectl set-ntp true"
        if abs(off_s) > CLOCK_SKEW_S:
            return _failed("clock", what, mend)
        if abs(off_s) > NOTICEABLE_S:
            return Finding(check="clock", state="warning", what=what, mend=mend)
        return _ok("clock", what)

    async def prekeys(self) -> Finding:
        assert self._advert is not None
        advert, now_s = self._advert.advert, self._advert.advert.issued_s
        mend = "see the gateway's disk and log: it makes one a day, and `prekeys.json` holds them"
        good = [prekey for prekey in advert.prekeys if prekey.nbf_s <= now_s < prekey.naf_s]
        if not good or advert.prekey(now_s) is None:
            return _failed("prekeys", "the gateway offers none that is valid", mend)
        age_s = now_s - max(prekey.nbf_s for prekey in good)
        what = f"the youngest is {describe_s(age_s)} old"
        if age_s > ROTATE_AFTER_S + 3600:
            return Finding(check="prekeys", state="warning", what=what, mend=mend)
        return _ok("prekeys", what)

    async def round_trip(self) -> Finding:
        try:
            transport = device_transport(self._url_text, self._keys, check="off")
            took_s = await round_trip(transport, self._keys)
        except TidegateError as error:
            if "another process is using these keys" in str(error):
                what = "the daemon is using these keys: ask it, GET /status"
                return Finding(check="round trip", state="skipped", what=what)
            return _failed("round trip", str(error), "see the gateway's log and its registry")
        return _ok("round trip", f"{took_s * 1000:.0f} ms, sealed both ways")


def _handshake(url: BrokerUrl, context: ssl.SSLContext) -> dict[str, object]:
    """What a TLS handshake says about the broker; raises what goes wrong."""
    with (
        socket.create_connection((url.host, url.port), timeout=_PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname=url.host) as secure,
    ):
        return {**(secure.getpeercert() or {}), "version": secure.version()}


def _mend_server(told: str, host: str) -> str:
    if "mismatch" in told:
        return f"run `tidegate broker config` again with --host {host}, and send SIGHUP"
    if "expired" in told:
        return "run `tidegate broker config` again for a new certificate; or set the clock"
    if "not yet valid" in told:
        return "set the clock: timedatectl set-ntp true"
    if "certificate refused" in told:
        return "put the authority's ca.pem into the folder of keys as broker-ca.pem"
    advice = [mend for alert, mend in _ALERTS.items() if alert in told]
    return (advice or ["the port may not speak TLS: see the broker's log"])[0]


def _ok(check: str, what: str) -> Finding:
    return Finding(check=check, state="ok", what=what)


def _failed(check: str, what: str, mend: str) -> Finding:
    return Finding(check=check, state="failed", what=what, mend=mend)


async def examine(url: str, keys: Path, *, wait_s: float = 25.0) -> list[Finding]:
    """Take every step; after one that fails the rest is listed as not looked at."""
    walk = _Walk(url, keys, wait_s)
    findings: list[Finding] = []
    failed = ""
    for name, step in walk.steps:
        if failed:
            what = f"{failed} comes first"
            findings.append(Finding(check=name, state="skipped", what=what))
            continue
        findings.append(await step())
        if findings[-1].state == "failed" and name != "topics":
            failed = name
    return findings
