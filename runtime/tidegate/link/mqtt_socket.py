"""paho's socket, watched by the asyncio loop instead of by paho's thread and its `select`.

So a file descriptor above 1023 or a dead thread cannot silence us (paho issues #183, #365), and a
packet that paho trips over, or that is larger than anything legal, ends the connection.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode

from tidegate.link.broker_tls import BrokerSocket
from tidegate.link.wire import MAX_MESSAGE_BYTES

MAX_PACKET_BYTES = 2 * MAX_MESSAGE_BYTES
"""A broker that announces a larger packet is left: paho would hold up to 256 MB of it."""


class PahoSocket:
    """The reading and writing of one paho client.

    Args:
        client: its socket callbacks become ours.
        heard: called whenever there is something to read.
        broken: called with what is wrong when the connection cannot go on.
    """

    def __init__(
        self, client: paho.Client, *, heard: Callable[[], None], broken: Callable[[str], None]
    ) -> None:
        self._client = client
        self._heard = heard
        self._broken = broken
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._socket: Any = None
        self._stopped = False
        self._watched = False
        """The loop tells when the socket takes more."""
        client.on_socket_open = self._on_open
        client.on_socket_close = self._on_close
        client.on_socket_register_write = self._on_register_write
        client.on_socket_unregister_write = self._on_unregister_write

    @property
    def opened(self) -> bool:
        """TCP and, where wanted, TLS stood once."""
        return self._socket is not None

    @property
    def tls_failure(self) -> str | None:
        """What TLS said when it ended, if it did."""
        return self._socket.failure if isinstance(self._socket, BrokerSocket) else None

    def stop(self) -> None:
        """Watch nothing new."""
        self._stopped = True

    def close(self) -> None:
        """Free the socket; paho is not asked any more."""
        self.stop()
        client, sock = self._client, self._client.socket()
        if sock is not None:
            self._forget(sock)
        client.on_socket_open = client.on_socket_close = None
        client.on_socket_register_write = client.on_socket_unregister_write = None
        if sock is not None:
            sock.close()

    # `connect` runs in a worker thread, so these callbacks may too.

    def _on_open(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        # Two small packets in a row would otherwise wait for a delayed ACK: 40 ms per answer.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._loop.call_soon_threadsafe(self._watch, sock)

    def _watch(self, sock: Any) -> None:
        if not self._stopped and sock.fileno() >= 0:
            self._loop.add_reader(sock, self._readable, sock)

    def _on_close(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        self._forget(sock)

    def _forget(self, sock: Any) -> None:
        if sock.fileno() >= 0:
            self._loop.remove_reader(sock)
            self._loop.remove_writer(sock)

    def _on_register_write(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        self._soon(self._write_at_once, sock)

    def _write_at_once(self, sock: Any) -> None:
        """Nearly always all of it goes: only what does not makes the loop watch the socket."""
        if self._stopped or sock.fileno() < 0:
            return
        self._writable()
        if not self._stopped and sock.fileno() >= 0 and self._client.want_write():
            self._watched = True
            self._loop.add_writer(sock, self._writable)

    def _on_unregister_write(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        if self._watched and sock.fileno() >= 0:
            self._soon(self._unwatch_writable, sock)

    def _unwatch_writable(self, sock: Any) -> None:
        if sock.fileno() >= 0 and not self._client.want_write():
            self._watched = False
            self._loop.remove_writer(sock)

    def _soon(self, callback: Callable[[Any], None], sock: Any) -> None:
        if threading.get_ident() == self._thread_id:
            self._loop.call_soon(callback, sock)
        else:
            self._loop.call_soon_threadsafe(callback, sock)

    def _readable(self, sock: Any) -> None:
        self._heard()
        try:
            more = self._client.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
            # TLS may have decrypted more than one packet: the socket won't turn readable for it.
            while more and isinstance(sock, ssl.SSLSocket) and sock.fileno() >= 0:
                if not sock.pending():
                    break
                more = self._client.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
        except Exception as error:
            # paho's parser raises whatever a malformed packet leads it to. The loop would go on
            # calling us for ever, with a client that is in an unknown state.
            self._broken(f"the broker sent a packet that makes no sense ({type(error).__name__})")
            return
        # paho has no limit of its own and no public way to ask.
        announced_bytes = self._client._in_packet["remaining_length"]
        if announced_bytes > MAX_PACKET_BYTES:
            self._broken(f"the broker sends a packet of {announced_bytes} bytes")

    def _writable(self) -> None:
        try:
            self._client.loop_write()
        except Exception as error:
            self._broken(f"connection lost ({type(error).__name__})")
