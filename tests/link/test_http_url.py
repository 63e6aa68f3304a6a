"""Where a gateway is, and that strangers' networks are not crossed without TLS unless told so."""

from __future__ import annotations

import pytest

from tidegate.errors import ConfigError
from tidegate.link.http_url import HttpUrl


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://gateway.example", "https://gateway.example:443"),
        ("https://gateway.example:8443/", "https://gateway.example:8443"),
        ("https://proxy.example/fleet/home/", "https://proxy.example:443/fleet/home"),
        ("http://127.0.0.1:8092", "http://127.0.0.1:8092"),
        ("http://localhost", "http://localhost:80"),
        ("http://[::1]:99", "http://[::1]:99"),
    ],
)
def test_a_url_is_understood(url: str, shown: str) -> None:
    parsed = HttpUrl.parse(url)
    assert str(parsed) == shown
    assert HttpUrl.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    "url",
    [
        "",
        "gateway.example",
        "mqtt://gateway.example",
        "https://",
        "https://me:secret@gateway.example",
        "https://gateway.example?x=1",
        "https://gateway.example/#x",
        "https://gateway.example:0",
        "https://gateway.example:70000",
        "https://gateway.example/a b",
        "https://gateway.example/%2e",
        "https://gateway.example/" + "x" * 256,
        "https://gateway.example/\N{SNOWMAN}",
    ],
)
def test_what_is_no_url_is_refused_and_no_secret_is_shown(url: str) -> None:
    with pytest.raises(ConfigError, match=r"link\.http") as caught:
        HttpUrl.parse(url)
    assert "secret" not in str(caught.value)


def test_without_tls_only_this_machine_is_reached_unless_told_otherwise() -> None:
    with pytest.raises(ConfigError, match="--link-http-plain"):
        HttpUrl.parse("http://gateway.example")
    assert not HttpUrl.parse("http://gateway.example", plain=True).tls
