"""A device changes its signing key over the link: requests go on, and a crash costs nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from linklab import FAST
from linkpair import going

from tidegate.errors import IdentityError, UnavailableError
from tidegate.link import key_rotation
from tidegate.link.device import DeviceLink
from tidegate.link.effects import InboundRequest
from tidegate.link.envelope import DeviceId, RequestId
from tidegate.link.fleet import add_device, add_gateway, create_fleet
from tidegate.link.gateway import Gateway
from tidegate.link.identity import load_device
from tidegate.link.key_rotation import CONFIRM, STAGED, KeyRegistrar, KeyRotation, stage
from tidegate.link.keyfiles import rewrite_secret, write_atomic
from tidegate.link.memory import MemoryBroker, MemoryTransport
from tidegate.link.registry import DeviceRecord, DeviceRegistry
from tidegate.link.registry_exchange import export_devices, import_devices
from tidegate.link.wrapping import command_file

ANSWER = [b"%d" % number for number in range(30)]


class Slow:
    """Answers in 30 parts; waits after the tenth until it is let go."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    async def __call__(self, request: InboundRequest) -> AsyncIterator[bytes]:
        for number, part in enumerate(ANSWER):
            if number == 10 and request.body == b"slow":
                await self.go_on.wait()
            yield part


class Home:
    """A fleet's folder: a device and the gateways that know it."""

    def __init__(self, root: Path, gateways: int = 1) -> None:
        self.root, self.device = root, root / "device"
        create_fleet(root / "fleet")
        self.gateways = [root / f"gw{number}" for number in range(gateways)]
        for folder in self.gateways:
            add_gateway(root / "fleet", folder, folder.name, enrols=False)
        add_device(root / "fleet", self.device, self.gateways)

    def key(self) -> bytes:
        """The public key in use."""
        return load_device(self.device).key.public_key().public_bytes_raw()

    def known(self, number: int = 0) -> DeviceRecord:
        with closing(DeviceRegistry(self.gateways[number] / "devices.sqlite")) as registry:
            (record,) = registry.devices()
            return record

    @asynccontextmanager
    async def running(
        self, handler: Slow | None = None, *, registrars: bool = True
    ) -> AsyncIterator[DeviceLink]:
        """All gateways and the device on one broker; every gateway has been heard."""
        broker, handler = MemoryBroker(), handler or Slow()
        async with AsyncExitStack() as stack:
            for folder in self.gateways:
                registry = stack.enter_context(closing(DeviceRegistry(folder / "devices.sqlite")))
                answers = KeyRegistrar(handler, registry) if registrars else handler
                gateway = Gateway(folder, MemoryTransport(broker), answers, timing=FAST)
                stack.push_async_callback(gateway.close)
                await stack.enter_async_context(going(gateway.run()))
            link = DeviceLink(self.device, MemoryTransport(broker), timing=FAST)
            stack.push_async_callback(link.close)
            await stack.enter_async_context(going(link.run()))
            while len(await link.gateways()) < len(self.gateways):
                await asyncio.sleep(0.01)
            yield link


def play(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(main())


async def ask(link: DeviceLink, body: bytes = b"quick") -> list[bytes]:
    return [part async for part in link.request(body, deadline_s=20.0)]


def test_a_key_is_replaced_at_every_gateway_while_a_request_goes_on(tmp_path: Path) -> None:
    home = Home(tmp_path, gateways=2)
    before = home.key()

    async def test() -> None:
        handler = Slow()
        async with home.running(handler) as link:
            slow = asyncio.create_task(ask(link, b"slow"))
            while not link.counters.opened:
                await asyncio.sleep(0.01)
            assert stage(home.device)
            assert not stage(home.device), "one at a time"
            assert home.key() == before
            await KeyRotation(home.device, link).rotate()
            assert not slow.done()
            handler.go_on.set()
            assert await slow == ANSWER, "begun under the old key, ended under the new one"
            assert await ask(link) == ANSWER

    play(test)
    assert home.key() != before
    assert not (home.device / STAGED).exists()
    assert [home.known(number).keys for number in range(2)] == [(home.key(),)] * 2

    async def again() -> None:
        async with home.running() as link:
            assert await ask(link) == ANSWER

    play(again)


def test_the_old_key_is_worth_nothing_afterwards(tmp_path: Path) -> None:
    home = Home(tmp_path)
    old = (home.device / "device.key").read_bytes()

    async def rotate() -> None:
        async with home.running() as link:
            stage(home.device)
            await KeyRotation(home.device, link).rotate()

    async def steal() -> None:
        async with home.running() as link:
            with pytest.raises(UnavailableError):
                async for _ in link.request(b"quick", deadline_s=1.0):
                    pass

    play(rotate)
    write_atomic(home.device / "device.key", old)
    play(steal)


@pytest.mark.parametrize("step", range(1, 8))
def test_a_daemon_that_dies_anywhere_goes_on_and_its_key_works_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    home = Home(tmp_path, gateways=2)
    steps = [0]

    def dies_at(name: str, thing: Any) -> Any:
        """`thing`, which dies before or after what it does when its turn has come."""

        def one_step() -> None:
            steps[0] += 1
            if steps[0] == step:
                raise KeyError(name)

        if asyncio.iscoroutinefunction(thing):

            async def acted(*given: Any) -> Any:
                result = await thing(*given)
                one_step()
                return result

            return acted

        def did(*given: Any) -> Any:
            one_step()
            return thing(*given)

        return did

    async def dying() -> None:
        async with home.running() as link:
            stage(home.device)
            with monkeypatch.context() as patched:
                # Two gateways told, the key written, two confirmed, the staged file taken away.
                patched.setattr(KeyRotation, "_tell", dies_at("tell", KeyRotation._tell))
                patched.setattr(key_rotation, "_write", dies_at("write", key_rotation._write))
                patched.setattr(Path, "unlink", dies_at("unlink", Path.unlink))
                try:
                    await KeyRotation(home.device, link).rotate()
                except KeyError:
                    died = True
                else:
                    died = False
            assert died == (step <= 6)
            assert await ask(link) == ANSWER, "the key in memory"

    async def afterwards() -> None:
        async with home.running() as link:
            assert await ask(link) == ANSWER, "the key on the disk"
            if (home.device / STAGED).exists():
                await KeyRotation(home.device, link).rotate()
            assert await ask(link) == ANSWER

    play(dying)
    play(afterwards)
    assert [home.known(number).keys for number in range(2)] == [(home.key(),)] * 2
    assert not (home.device / STAGED).exists()


def test_a_change_whose_device_went_is_over_before_the_next_one_begins(tmp_path: Path) -> None:
    home = Home(tmp_path)
    begun, go_on = threading.Event(), threading.Event()

    class Dawdling(DeviceRegistry):
        """Says how many were at it at once."""

        now = most = 0

        def change_key(
            self, device_id: DeviceId, change: Callable[[DeviceRecord], DeviceRecord]
        ) -> DeviceRecord:
            self.now += 1
            self.most = max(self.most, self.now)
            begun.set()
            go_on.wait(10)
            try:
                return super().change_key(device_id, change)
            finally:
                self.now -= 1

    async def test() -> None:
        device_id = load_device(home.device).device_id
        request = InboundRequest(
            device_id=device_id,
            handle="it",
            request_id=RequestId(bytes(16)),
            body=CONFIRM + b"x",
            attempt=0,
        )

        async def answer(registrar: KeyRegistrar) -> list[bytes]:
            return [part async for part in registrar(request)]

        with closing(Dawdling(home.gateways[0] / "devices.sqlite")) as registry:
            registrar = KeyRegistrar(Slow(), registry)
            first = asyncio.create_task(answer(registrar))
            assert await asyncio.to_thread(begun.wait, 10)
            first.cancel()
            second = asyncio.create_task(answer(registrar))
            await asyncio.sleep(0.1)
            go_on.set()
            (refused,) = await second
            assert b"refused" in refused
            assert first.cancelled()
            assert registry.most == 1

    play(test)


def test_the_daemons_part_sees_a_staged_key_by_itself(tmp_path: Path) -> None:
    home = Home(tmp_path)
    before = home.key()

    async def test() -> None:
        async with home.running() as link:
            async with going(KeyRotation(home.device, link, check_s=0.01).run()):
                stage(home.device)
                while (home.device / STAGED).exists():
                    await asyncio.sleep(0.01)
            assert await ask(link) == ANSWER

    play(test)
    assert home.key() != before


def test_a_gateway_that_does_not_know_the_device_keeps_the_old_key_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path, gateways=2)
    (home.gateways[1] / "devices.sqlite").unlink()
    before = home.key()
    monkeypatch.setattr(key_rotation, "_DEADLINE_S", 0.5)

    async def test() -> None:
        async with home.running() as link:
            stage(home.device)
            with pytest.raises(UnavailableError, match="gateway gw1"):
                await KeyRotation(home.device, link).rotate()
            assert home.key() == before
            registry = DeviceRegistry(home.gateways[1] / "devices.sqlite")
            with closing(registry):
                registry.add(home.known())
            await KeyRotation(home.device, link).rotate()

    play(test)
    assert home.known(0).keys == home.known(1).keys == (home.key(),)


def test_a_gateway_too_old_to_know_of_it_is_named(tmp_path: Path) -> None:
    home = Home(tmp_path)

    async def test() -> None:
        async with home.running(registrars=False) as link:
            stage(home.device)
            with pytest.raises(IdentityError, match="gateway gw0: its answer is none"):
                await KeyRotation(home.device, link).rotate()
            assert await ask(link) == ANSWER

    play(test)


def test_a_gateway_that_was_away_follows_by_a_list(tmp_path: Path) -> None:
    home = Home(tmp_path, gateways=2)
    away = home.gateways.pop()

    async def test() -> None:
        async with home.running() as link:
            for _ in range(2):
                stage(home.device)
                await KeyRotation(home.device, link).rotate()

    play(test)
    fleet = add_gateway(tmp_path / "fleet", tmp_path / "gw9", "gw9", enrols=False)
    with (
        closing(DeviceRegistry(home.gateways[0] / "devices.sqlite")) as there,
        closing(DeviceRegistry(away / "devices.sqlite")) as here,
    ):
        old = export_devices(fleet, here, now_s=time.time())
        new = export_devices(fleet, there, now_s=time.time())
        root = load_device(home.device).root.public_bytes_raw()
        for data in (new, old):
            import_devices(data, root=root, group="home", registry=here, now_s=time.time())
        (record,) = here.devices()
    assert record.keys == (home.key(),), "and the old list brought nothing back"


def test_a_wrapped_key_is_followed_by_a_wrapped_key(tmp_path: Path) -> None:
    home = Home(tmp_path)
    path, secret = home.device / "device.key", b"open sesame"
    rewrite_secret(path, secret, before=lambda: b"")

    async def test() -> None:
        async with home.running() as link:
            stage(home.device, passphrase=lambda: secret)
            await KeyRotation(home.device, link, passphrase=lambda: secret).rotate()

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TIDEGATE_PASSPHRASE", secret.decode())
        play(test)
        assert home.known().keys == (home.key(),)
    assert path.read_bytes().startswith(b"TGWRAP1")


def test_a_key_that_a_command_prints_is_not_rotated_here(tmp_path: Path) -> None:
    home = Home(tmp_path)
    write_atomic(home.device / "device.key", command_file(["tpm2_unseal"]))
    with pytest.raises(IdentityError, match="a command prints it"):
        stage(home.device)
