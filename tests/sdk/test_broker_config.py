"""`tidegate broker config`: the folder it writes, and what it refuses."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tidegate.cli.main import main
from tidegate.link.certificate_facts import check_issued, read_facts
from tidegate.link.certificates_store import load_authority
from tidegate.link.fleet import create_fleet
from tidegate.link.wire import MAX_MESSAGE_BYTES


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    create_fleet(tmp_path / "fleet", group="works")
    return tmp_path / "fleet"


def config(
    folder: Path, fleet: Path, *more: str, gateway: str = "gw0", host: str = "b.example"
) -> int:
    where = ["broker", "config", str(folder), "--fleet", str(fleet)]
    return main([*where, "--gateway", gateway, "--host", host, *more])


def settings(folder: Path) -> dict[str, str]:
    """The configuration as key and value; `log_type` comes more than once."""
    lines = (folder / "mosquitto.conf").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))


def test_it_writes_all_that_mosquitto_needs(tmp_path: Path, fleet: Path) -> None:
    folder = tmp_path / "broker"
    assert config(folder, fleet, "--port", "9000", "--bind", "10.0.0.1") == 0
    found = settings(folder)
    assert found["listener"] == "9000 10.0.0.1"
    assert found["tls_version"] == "tlsv1.3"
    for name in ("require_certificate", "use_identity_as_username", "set_tcp_nodelay"):
        assert found[name] == "true"
    assert found["allow_anonymous"] == "false"
    assert found["persistence"] == "true"
    assert int(found["message_size_limit"]) == MAX_MESSAGE_BYTES < int(found["max_packet_size"])
    for name in ("cafile", "certfile", "keyfile", "crlfile", "acl_file"):
        assert Path(found[name]).parent == folder
        assert Path(found[name]).is_file()
    assert Path(found["persistence_location"]).is_dir()
    assert stat.S_IMODE((folder / "server-key.pem").stat().st_mode) == 0o600
    check_issued(
        (folder / "server.pem").read_bytes(),
        load_authority(fleet).bundle_pem,
        (folder / "server-key.pem").read_bytes(),
    )


def test_the_rules_name_each_gateway_and_the_fleets_group(tmp_path: Path, fleet: Path) -> None:
    folder = tmp_path / "broker"
    assert config(folder, fleet, "--gateway", "gw1") == 0
    rules = (folder / "acl").read_text()
    for line in ("user gw-gw0", "user gw-gw1", "topic write tidegate/1/works/gw/gw1/advert"):
        assert f"\n{line}\n" in rules
    assert "pattern read tidegate/1/works/r/%u\n" in rules
    assert "readwrite" not in rules
    assert "#" not in "".join(line for line in rules.splitlines() if line[:1] != "#")


def test_a_second_run_replaces_the_certificate_and_keeps_the_folder(
    tmp_path: Path, fleet: Path
) -> None:
    folder = tmp_path / "broker"
    config(folder, fleet)
    (folder / "data" / "kept").touch()
    before = read_facts((folder / "server.pem").read_bytes()).serial
    config(folder, fleet)
    assert read_facts((folder / "server.pem").read_bytes()).serial != before
    assert (folder / "data" / "kept").exists()


def test_it_can_be_written_for_another_place(tmp_path: Path, fleet: Path) -> None:
    folder = tmp_path / "broker"
    assert config(folder, fleet, "--installed-at", "/etc/m/t", "--data", "/var/lib/m") == 0
    found = settings(folder)
    assert found["keyfile"] == "/etc/m/t/server-key.pem"
    assert found["persistence_location"] == "/var/lib/m/"
    assert not (folder / "data").exists()


@pytest.mark.parametrize(
    ("more", "gateway", "host", "said"),
    [
        (["--port", "0"], "gw0", "b", "port = 0: must be 1 to 65535"),
        (["--bind", "::1\nallow_anonymous true"], "gw0", "b", "bind = "),
        ([], "g w", "b", "gateway = 'g w'"),
        ([], "g" * 62, "b", "at most"),
        ([], "gw0", "b b", "server name = 'b b'"),
        (["--revoked", "none.pem"], "gw0", "b", "none.pem: cannot be read"),
    ],
)
def test_what_it_cannot_write_it_refuses_by_name(
    tmp_path: Path,
    fleet: Path,
    more: list[str],
    gateway: str,
    host: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert config(tmp_path / "broker", fleet, *more, gateway=gateway, host=host) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "broker" / "mosquitto.conf").exists()


def test_without_a_fleet_there_is_no_authority(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert config(tmp_path / "broker", tmp_path / "none") == 1
    assert "tidegate keys init" in capsys.readouterr().err
