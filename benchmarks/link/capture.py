"""What an eavesdropper at the broker gets: a whole session, recorded by a subscriber to everything.

A gateway advertises, a device asks, reads a streamed answer, asks again and gives up half way. All
that a subscriber to `#` heard is searched for prompts, answers, the model that was asked for, the
device's id, public key, folder and host, as they are and in hex and base64. Then it is told what
the messages do show, which is what `docs/security.md` says they may. Models that a gateway offers
are in its advert by design.

    python benchmarks/link/capture.py --keep benchmarks/results/link-capture.json
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from link.children import free_port, import_paths, mosquitto, wait_listening  # noqa: E402

sys.path[1:1] = import_paths()

from eavesdropping import eavesdropper  # noqa: E402
from report import report  # noqa: E402

from tidegate.link.device import DeviceLink  # noqa: E402
from tidegate.link.effects import InboundRequest  # noqa: E402
from tidegate.link.envelope import MessageType, route  # noqa: E402
from tidegate.link.fleet import pair  # noqa: E402
from tidegate.link.gateway import Gateway  # noqa: E402
from tidegate.link.identity import load_device  # noqa: E402
from tidegate.link.mqtt import MqttTransport  # noqa: E402
from tidegate.link.prekeys import ModelOffer  # noqa: E402
from tidegate.link.statements import SIGNATURE_BYTES  # noqa: E402
from tidegate.link.transport import Message  # noqa: E402

OFFERED = "offered-model-70b"
ASKED_FOR = "house-finetune-7b"
PROMPT = "Summarise the oncology report of patient Andersson"
ANSWER = [f"confidential-word-{number} " for number in range(150)]
TIME_LIMIT_S = 60.0
SHORTEST_BYTES = 6
"""Shorter words turn up in ciphertext by chance."""


async def answer(request: InboundRequest) -> AsyncIterator[bytes]:
    """Word by word."""
    for word in ANSWER:
        yield word.encode()
        await asyncio.sleep(0.005)


async def session(folder: Path, url: str) -> None:
    """Advert, request, whole answer, request, half an answer, cancel."""
    pair(folder / "device", folder / "gateway")
    offer = ModelOffer(id=OFFERED, context_tokens=4096)
    gateway = Gateway(folder / "gateway", MqttTransport(url), answer, models=lambda: (offer,))
    device = DeviceLink(folder / "device", MqttTransport(url))
    tasks = [asyncio.create_task(gateway.run()), asyncio.create_task(device.run())]
    body = json.dumps({"model": ASKED_FOR, "prompt": PROMPT}).encode()
    try:
        got = [part.decode() async for part in device.request(body, deadline_s=TIME_LIMIT_S)]
        assert got == ANSWER, "the session is a real one"
        async with aclosing(device.request(body, deadline_s=TIME_LIMIT_S)) as half:
            for _ in range(len(ANSWER) // 3):
                await anext(half)
        while not gateway.counters.cancelled:
            await asyncio.sleep(0.02)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await gateway.close()
        await device.close()


def secrets_of(folder: Path) -> dict[str, bytes]:
    """What must not be seen, by name."""
    device = load_device(folder / "device")
    secrets = {
        **{f"prompt: {word}": word.encode() for word in PROMPT.split()},
        "an answer's word": ANSWER[3].strip().encode(),
        "part of every answer's word": b"confidential",
        "the model asked for": ASKED_FOR.encode(),
        "the device's id": device.device_id,
        "the device's public key": device.key.public_key().public_bytes_raw(),
        "the device's folder": str(folder).encode(),
        "the host's name": socket.gethostname().encode(),
    }
    return {name: secret for name, secret in secrets.items() if len(secret) >= SHORTEST_BYTES}


def spellings(secret: bytes) -> Iterator[bytes]:
    """As it is, in hex, and in base64 wherever it may begin within a longer text."""
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + secret)
        # Of the first and last groups some bits belong to the neighbours.
        yield encoded[4 * (shift > 0) : -4]


def leaks(heard: list[Message], secrets: Mapping[str, bytes]) -> list[str]:
    """Names of secrets that are seen anywhere."""
    everything = b"\n".join(one.topic.encode() + b"\0" + one.payload for one in heard)
    return [
        name
        for name, secret in secrets.items()
        if any(one in everything for one in spellings(secret))
    ]


def kind_of(message: Message) -> str:
    """What an eavesdropper would call it."""
    if message.topic.endswith("/advert"):
        return "advert"
    return MessageType(route(message.payload).kind).name.lower()


def seen(heard: list[Message]) -> dict[str, object]:
    """What the messages do show."""
    kinds: dict[str, list[Message]] = {}
    for message in heard:
        kinds.setdefault(kind_of(message), []).append(message)
    sealed = [one for one in heard if kind_of(one) != "advert"]
    advert = advert_fields(kinds["advert"][0].payload)
    return {
        "topics": sorted({one.topic for one in heard}),
        "kinds": {
            name: {"count": len(ones), "sizes_bytes": sorted({len(one.payload) for one in ones})}
            for name, ones in sorted(kinds.items())
        },
        "requests": len({route(one.payload).request_id for one in sealed}),
        "advert_fields": sorted(advert),
        "models_in_advert": advert["models"],
    }


def advert_fields(payload: bytes) -> dict[str, object]:
    """What an advert says: u16 certificate bytes, the certificate, then the signed statement."""
    at = 2 + int.from_bytes(payload[:2], "big") + SIGNATURE_BYTES
    fields: dict[str, object] = json.loads(payload[at:])
    return fields


async def record(folder: Path, url: str) -> list[Message]:
    """Listen to a session from before it begins to after it has ended."""
    async with asyncio.timeout(TIME_LIMIT_S), eavesdropper(url) as heard:
        await session(folder, url)
        await asyncio.sleep(0.3)
    return heard


def main() -> int:
    """Record, search, tell; 1 when anything leaked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        port = free_port()
        broker = mosquitto(folder, port)
        broker.start()
        try:
            wait_listening(port)
            heard = asyncio.run(record(folder, f"mqtt://127.0.0.1:{port}"))
        finally:
            broker.kill()
        secrets = secrets_of(folder)
    for secret in secrets.values():
        planted = Message("t", b"before " + base64.b64encode(b"x" + secret + b"yz") + b" after")
        assert leaks([planted], {"planted": secret}), "the search finds what is there"
    found = leaks(heard, secrets)
    outside = [one for one in heard if kind_of(one) != "advert"]
    if leaks(outside, {"the offered model": OFFERED.encode()}):
        found.append("the offered model, outside of adverts")
    results = {
        "messages": len(heard),
        "searched_for": list(secrets),
        "leaked": found,
        "seen": seen(heard),
    }
    text = report("link/capture.py", ("cryptography", "paho-mqtt"), results)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")
    print(text if args.json else json.dumps(results, indent=2))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
