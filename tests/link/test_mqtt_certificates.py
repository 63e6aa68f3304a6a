"""Which client certificate a connection shows, before and after the files have changed."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tidegate.link.broker_tls import BrokerSocket, TlsFiles, tls_context
from tidegate.link.certificate_facts import read_facts
from tidegate.link.certificates import (
    CertifiedKey,
    issue_device,
    issue_server,
    make_ca,
    make_request,
)
from tidegate.link.mqtt import MqttTransport

HANDLE = "ab" * 16


@pytest.fixture(scope="module")
def ca() -> CertifiedKey:
    return make_ca("home")


def _write(folder: Path, name: str, key: CertifiedKey) -> TlsFiles:
    """Files of a key and its certificate."""
    files = TlsFiles(
        ca=folder / "ca.pem", certificate=folder / f"{name}.pem", key=folder / f"{name}-key.pem"
    )
    assert files.certificate is not None
    assert files.key is not None
    files.certificate.write_bytes(key.certificate_pem)
    files.key.write_bytes(key.key_pem)
    return files


def _device(ca: CertifiedKey) -> CertifiedKey:
    csr_pem, key_pem = make_request()
    return CertifiedKey(certificate_pem=issue_device(ca, csr_pem, HANDLE), key_pem=key_pem)


@asynccontextmanager
async def _door(folder: Path, ca: CertifiedKey) -> AsyncIterator[tuple[int, asyncio.Queue[int]]]:
    """A TLS server that notes whose certificate each connection shows, and hangs up."""
    files = _write(folder, "server", issue_server(ca, ["127.0.0.1"]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    assert files.certificate is not None
    context.load_cert_chain(files.certificate, files.key)
    context.load_verify_locations(cadata=ca.certificate_pem.decode())
    context.verify_mode = ssl.CERT_REQUIRED
    shown: asyncio.Queue[int] = asyncio.Queue()

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        shown.put_nowait(int(writer.get_extra_info("peercert")["serialNumber"], 16))
        writer.close()
        with suppress(OSError, ssl.SSLError):
            await writer.wait_closed()

    server = await asyncio.start_server(note, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1], shown


def test_the_next_connection_shows_a_renewed_certificate_and_never_half_of_one(
    tmp_path: Path, ca: CertifiedKey
) -> None:
    (tmp_path / "ca.pem").write_bytes(ca.certificate_pem)
    old, new = _device(ca), _device(ca)
    files = _write(tmp_path, "device", old)
    serials = [read_facts(one.certificate_pem).serial for one in (old, new)]

    async def main() -> None:
        async with _door(tmp_path, ca) as (port, shown):
            transport = MqttTransport(f"mqtts://127.0.0.1:{port}", files=files)
            running = asyncio.create_task(transport.run())
            try:
                async with asyncio.timeout(20):
                    assert await shown.get() == serials[0]
                    # The key is new, its certificate is not yet: the old pair is used.
                    assert files.key is not None
                    files.key.write_bytes(new.key_pem)
                    for _ in range(2):
                        assert await shown.get() == serials[0]
                    _write(tmp_path, "device", new)
                    while await shown.get() != serials[1]:
                        pass
                    assert await shown.get() == serials[1]
            finally:
                running.cancel()
                with suppress(asyncio.CancelledError):
                    await running

    asyncio.run(main())


def _write_on(sock: BrokerSocket) -> None:
    """Until it cannot: the first may still go, and is answered by a reset."""
    for _ in range(100):
        sock.send(b"CONNECT")
        time.sleep(0.01)


def test_why_a_certificate_was_refused_is_heard_even_by_who_writes_first(
    tmp_path: Path, ca: CertifiedKey
) -> None:
    (tmp_path / "ca.pem").write_bytes(ca.certificate_pem)
    files = _write(tmp_path, "device", _device(make_ca("elsewhere")))
    served = _write(tmp_path, "server", issue_server(ca, ["127.0.0.1"]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    assert served.certificate is not None
    context.load_cert_chain(served.certificate, served.key)
    context.load_verify_locations(cadata=ca.certificate_pem.decode())
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def refuse() -> None:
            accepted, _ = listening.accept()
            with accepted, pytest.raises(ssl.SSLError):
                context.wrap_socket(accepted, server_side=True)

        server = threading.Thread(target=refuse)
        server.start()
        with socket.create_connection(listening.getsockname()) as plain:
            sock = tls_context(files).wrap_socket(plain, server_hostname="127.0.0.1")
            with sock:
                server.join()
                assert isinstance(sock, BrokerSocket)
                with pytest.raises((ConnectionError, ssl.SSLError)):
                    _write_on(sock)
                assert sock.failure == "unknown ca"
