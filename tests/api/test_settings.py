"""Who may reach a service: by address, or by key, and never by a rebound name."""

from __future__ import annotations

import httpx
import pytest
from echobackend import EchoBackend
from loopback import serving

from tidegate.api.http import create_app
from tidegate.api.keys import hash_key
from tidegate.api.settings import surface_for
from tidegate.errors import ConfigError

KEY = hash_key("tg-test")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "kiosk.local"])
def test_beyond_loopback_a_key_is_required(host: str) -> None:
    with pytest.raises(ConfigError, match="with --api-key-file"):
        surface_for(host, key_hashes=())
    surface = surface_for(host, key_hashes=(KEY,))
    assert surface.authorise is not None
    assert surface.authorise("tg-test")
    assert not surface.authorise("tg-guess")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_none_but_may_have_one(host: str) -> None:
    assert surface_for(host, key_hashes=()).authorise is None
    assert surface_for(host, key_hashes=(KEY,)).authorise is not None


def test_a_page_that_was_rebound_to_loopback_gets_nothing() -> None:
    app = create_app(EchoBackend(), settings=surface_for("127.0.0.1", key_hashes=()))
    with serving(app) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        assert client.get("/status").status_code == 200
        rebound = client.get("/status", headers={"Host": f"evil.example:{server.port}"})
        assert rebound.status_code == 403


def test_the_status_is_behind_the_key() -> None:
    surface = surface_for("0.0.0.0", key_hashes=(KEY,))
    app = create_app(EchoBackend(), settings=surface)
    with serving(app) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        assert client.get("/status").status_code == 401
        allowed = client.get("/status", headers={"Authorization": "Bearer tg-test"})
        assert allowed.status_code == 200
