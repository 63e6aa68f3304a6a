"""`tidegate keys token|serve|answer|devices|revoke|export|import`: who may use a gateway."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.cli.keys_passphrase import add_passphrase, passphrase_source
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.link.enrolment_gateway import Enrolment

    Kinds = argparse._SubParsersAction[argparse.ArgumentParser]

_MOST_HOURS = 24


def add_kinds(kinds: Kinds) -> None:
    """Declare the commands and their flags."""
    token = _add(kinds, "token", "print a one-time token for a device to enrol with")
    token.add_argument(
        "--url", default="", help="where the device finds 'keys serve'; without it, it uses files"
    )
    token.add_argument(
        "--hours", type=int, default=_MOST_HOURS, help=f"it lasts, 1 to {_MOST_HOURS} (default)"
    )
    serve = _add(kinds, "serve", "answer devices that enrol, over HTTP")
    serve.add_argument("--listen", default="127.0.0.1:8091", help="HOST:PORT to listen on")
    answer = _add(kinds, "answer", "answer a device's request file")
    answer.add_argument("--request-file", type=Path, required=True, help="from the device")
    answer.add_argument("--answer-file", type=Path, required=True, help="to give back to it")
    _add(kinds, "devices", "list a gateway's devices")
    revoke = _add(kinds, "revoke", "refuse a device from its next message on")
    revoke.add_argument("handle", help="as 'keys devices' shows it")
    export = _add(kinds, "export", "write a gateway's devices to a file, for other gateways")
    export.add_argument("file", type=Path, help="signed; keep it as private as a key")
    taking = _add(kinds, "import", "add the devices and revocations that another gateway exported")
    taking.add_argument("file", type=Path, help="from 'keys export' of a gateway of this fleet")


def _add(kinds: Kinds, name: str, summary: str) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=summary)
    parser.add_argument("gateway", type=Path, help="folder of the gateway's keys")
    add_passphrase(parser)
    return parser


def token(args: argparse.Namespace) -> None:
    """Print a token on stdout, and nothing else there."""
    from tidegate.link.enrolment_device import fingerprint

    if not 1 <= args.hours <= _MOST_HOURS:
        raise ConfigError("hours", args.hours, f"1 to {_MOST_HOURS}")
    url = _endpoint_url(args.url)
    with closing(_open(args)) as enrolment:
        made = enrolment.make_token(url, valid_s=args.hours * 3600)
    where = f"at {url}" if url else "by files"
    _say(f"for one device, within {args.hours} h, {where}; root {fingerprint(made.root)}")
    print(made.encode())


def _endpoint_url(url: str) -> str:
    """The endpoint's whole address from what `keys serve` announced."""
    from urllib.parse import urlsplit

    from tidegate.cli.keys_endpoint import PATH

    if not url:
        return ""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise ConfigError("url", "...", "http://HOST:PORT or https://HOST:PORT, without a user")
    return url if parts.path not in ("", "/") else url.rstrip("/") + PATH


def serve(args: argparse.Namespace) -> None:
    """Answer devices until SIGTERM or SIGINT."""
    from tidegate.api.server import BoundServer
    from tidegate.cli.keys_endpoint import endpoint
    from tidegate.cli.listen import announce, parse_listen, run_until_signal

    host, port = parse_listen(args.listen)
    with closing(_open(args)) as enrolment:

        async def main(stop: asyncio.Event) -> None:
            server = BoundServer(endpoint(enrolment), host, port, drain_s=5)
            announce(f"tidegate keys serve: {server.url}")
            serving = asyncio.create_task(server.run())
            await stop.wait()
            server.drain()
            await serving

        run_until_signal(main)


def answer(args: argparse.Namespace) -> None:
    """Answer one request file."""
    from tidegate.link.enrolment import MOST_MESSAGE_BYTES
    from tidegate.link.keyfiles import read_public, write_atomic

    request = read_public(args.request_file, max_bytes=MOST_MESSAGE_BYTES)
    with closing(_open(args)) as enrolment:
        write_atomic(args.answer_file, enrolment.enrol(request))
    _say(f"enrolled; bring {args.answer_file} to the device")


def devices(args: argparse.Namespace) -> None:
    """One line per device."""
    from tidegate.link.clock import utc
    from tidegate.link.registry import DeviceRegistry

    path = args.gateway / "devices.sqlite"
    if not path.exists():
        _say("no devices")
        return
    with closing(DeviceRegistry(path)) as registry:
        records = registry.devices()
    for record in records:
        state = (record.refusal(time.time()) or "active").removeprefix("device_")
        since = utc(record.enrolled_s) if record.enrolled_s else "before enrolment was kept"
        until = "no certificate" if record.expires_s is None else f"until {utc(record.expires_s)}"
        print(f"{record.handle}  {state:8}{since}  {until}")


def revoke(args: argparse.Namespace) -> None:
    """Refuse a device."""
    from tidegate.link.certificates_store import REVOKED, has_authority
    from tidegate.link.envelope import DeviceId
    from tidegate.link.registry import DeviceRegistry

    path = args.gateway / "devices.sqlite"
    if not path.exists():
        raise ConfigError("gateway", str(args.gateway), "a gateway's folder with devices")
    with closing(DeviceRegistry(path)) as registry:
        record = registry.find_handle(args.handle)
        if record is None:
            raise ConfigError("handle", args.handle, "one that 'tidegate keys devices' shows")
        registry.revoke(DeviceId(record.device_id))
    _say(f"{args.handle} is refused from its next message on")
    if not has_authority(args.gateway):
        _say("no authority here: the broker is not told; revoke at the gateway that enrols, too")
        return
    with closing(_open(args)) as enrolment:
        count = enrolment.write_revocations()
    _say(f"{args.gateway / REVOKED} lists {count} certificates: give it to the broker")


def export(args: argparse.Namespace) -> None:
    """Write the list of devices."""
    from tidegate.link.identity import load_gateway
    from tidegate.link.keyfiles import write_atomic
    from tidegate.link.registry import DeviceRegistry
    from tidegate.link.registry_exchange import export_devices

    identity = load_gateway(args.gateway, passphrase=passphrase_source(args))
    with closing(DeviceRegistry(args.gateway / "devices.sqlite")) as registry:
        data = export_devices(identity, registry, now_s=time.time())
        count = len(registry.devices())
    write_atomic(args.file, data)
    _say(f"{count} devices in {args.file}; it is private")


def take(args: argparse.Namespace) -> None:
    """Take in a list of devices."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from tidegate.link.certificates_store import has_authority
    from tidegate.link.gateway_revocation import read_revocations
    from tidegate.link.identity import load_gateway, read_root
    from tidegate.link.keyfiles import read_public
    from tidegate.link.registry import DeviceRegistry
    from tidegate.link.registry_exchange import MOST_LIST_BYTES, import_devices

    identity = load_gateway(args.gateway, passphrase=passphrase_source(args))
    root = read_root(args.gateway)
    pinned = Ed25519PublicKey.from_public_bytes(root)
    with closing(DeviceRegistry(args.gateway / "devices.sqlite")) as registry:
        done = import_devices(
            read_public(args.file, max_bytes=MOST_LIST_BYTES),
            root=root,
            group=identity.group,
            registry=registry,
            now_s=time.time(),
            revoked=read_revocations(args.gateway, pinned, identity.group),
        )
    if has_authority(args.gateway):
        with closing(_open(args)) as enrolment:
            enrolment.write_revocations()
    _say(f"{done.added} devices added, {done.revoked} revoked")


def _open(args: argparse.Namespace) -> Enrolment:
    from tidegate.link.enrolment_gateway import Enrolment

    return Enrolment(args.gateway, passphrase=passphrase_source(args))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "token": token,
    "serve": serve,
    "answer": answer,
    "devices": devices,
    "revoke": revoke,
    "export": export,
    "import": take,
}
