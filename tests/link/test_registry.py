"""The gateway's registry: old files, several processes, and revocations that stay."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import CapacityError, IdentityError
from tidegate.link.clock import (
    CLOCK_SKEW_S,
    check_clock,
    check_period,
    describe_s,
    is_within,
    utc,
)
from tidegate.link.envelope import DeviceId
from tidegate.link.registry import (
    MOST_CERTIFICATES,
    DeviceRecord,
    DeviceRegistry,
    IssuedCertificate,
)

NOW_S = 1_800_000_000


def _record(number: int = 1, **changes: object) -> DeviceRecord:
    fields: dict[str, object] = {
        "device_id": DeviceId(bytes([number]) * 16),
        "handle": f"{number:032x}",
        "public_key": bytes([number]) * 32,
        "revoked": False,
        "enrolled_s": NOW_S,
    }
    return DeviceRecord(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def registry(tmp_path: Path) -> DeviceRegistry:
    return DeviceRegistry(tmp_path / "devices.sqlite")


def test_a_registry_from_before_versions_is_brought_up_and_keeps_its_devices(
    tmp_path: Path,
) -> None:
    path = tmp_path / "devices.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute(
            "CREATE TABLE devices (device_id BLOB PRIMARY KEY, handle TEXT"
            " NOT NULL UNIQUE, public_key BLOB NOT NULL, revoked INTEGER NOT NULL)"
        )
        db.execute("INSERT INTO devices VALUES (?, 'h', ?, 1)", (bytes(16), bytes(32)))
        db.commit()
    for _ in range(2):
        registry = DeviceRegistry(path)
        (record,) = registry.devices()
        registry.close()
        assert (record.handle, record.revoked, record.expires_s) == ("h", True, None)


def test_a_registry_of_a_newer_version_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "devices.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(IdentityError, match="registry version 9"):
        DeviceRegistry(path)
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    with pytest.raises(IdentityError, match="cannot be used as a registry"):
        DeviceRegistry(tmp_path / "junk")


def test_a_revocation_is_not_taken_back_by_adding_the_device_again(
    registry: DeviceRegistry,
) -> None:
    registry.add(_record())
    registry.revoke(_record().device_id)
    registry.add(_record(public_key=bytes(32)))
    found = registry.find_handle(_record().handle)
    assert found is not None
    assert (found.revoked, found.public_key) == (True, bytes(32))


def test_two_devices_never_share_a_handle(registry: DeviceRegistry) -> None:
    registry.add(_record(1))
    with pytest.raises(IdentityError, match="another device's"):
        registry.add(_record(2, handle=_record(1).handle))
    assert [one.device_id for one in registry.devices()] == [_record(1).device_id]


def test_a_revoked_device_lends_its_live_certificates_to_the_list(
    registry: DeviceRegistry,
) -> None:
    for number, expires_s in ((1, NOW_S + 1), (2, NOW_S + 1), (3, NOW_S - CLOCK_SKEW_S)):
        registry.add(_record(number))
        issued = IssuedCertificate(
            serial=2**150 + number, expires_s=expires_s, request_digest=b"d", pem=b"pem"
        )
        registry.renewed(_record(number).device_id, issued, now_s=NOW_S - 10**6)
    assert registry.revoked_serials(NOW_S) == []
    registry.revoke(_record(1).device_id)
    registry.revoke(_record(3).device_id)
    assert registry.revoked_serials(NOW_S) == [2**150 + 1]


def test_a_renewal_moves_the_end_of_a_device_and_answers_its_request_again(
    registry: DeviceRegistry,
) -> None:
    name = _record().device_id
    registry.add(_record(expires_s=NOW_S))
    for serial, expires_s in ((1, NOW_S + 50), (2, NOW_S + 20)):
        issued = IssuedCertificate(
            serial=serial, expires_s=expires_s, request_digest=bytes([serial]), pem=b"%d" % serial
        )
        registry.renewed(name, issued, now_s=NOW_S)
    found = registry.find(name)
    assert found is not None
    assert found.expires_s == NOW_S + 50
    assert registry.certificate_for(name, b"\1") == b"1"
    assert registry.certificate_for(name, b"\3") is None
    assert registry.certificate_for(DeviceId(os.urandom(16)), b"\1") is None


def _outside(path: Path, statement: str) -> list[str]:
    """What another process reads or writes in the file, which it then leaves."""
    program = (
        "import sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1])\n"
        "print(*(row[0] for row in db.execute(sys.argv[2])), sep='\\n')\n"
        "db.commit()\n"
        "db.close()\n"
    )
    command = [sys.executable, "-I", "-c", program, str(path), statement]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_who_opens_the_file_a_second_time_here_takes_no_lock_from_the_first(
    registry: DeviceRegistry, tmp_path: Path
) -> None:
    path = tmp_path / "devices.sqlite"
    registry.add(_record(1))
    with closing(DeviceRegistry(path)) as second:
        second.add(_record(2))
        # A process that takes itself for the last one deletes the log when it leaves, and what is
        # written from then on by the one is never seen by the other.
        for number in (1, 2):
            _outside(path, f"UPDATE devices SET revoked = 1 WHERE handle = '{number:032x}'")
            for one in (registry, second):
                found = one.find_handle(f"{number:032x}")
                assert found is not None
                assert found.revoked
        registry.change_key(DeviceId(b"\2" * 16), lambda old: replace(old, public_key=bytes(32)))
        kept = _outside(path, "SELECT hex(public_key) FROM devices ORDER BY handle")
    assert kept == ["01" * 32, "00" * 32]


def test_a_registry_that_cannot_be_written_says_so_and_keeps_nothing(
    registry: DeviceRegistry,
) -> None:
    def write_half() -> None:
        with registry.transaction() as db:
            db.execute("INSERT INTO tokens VALUES (x'00', x'', x'', 0, 0, NULL, NULL)")
            db.execute("INSERT INTO nothing VALUES (1)")

    with pytest.raises(CapacityError, match="registry cannot be used"):
        write_half()
    assert registry.read("SELECT count(*) FROM tokens") == [(0,)]


def test_the_registrys_files_are_private(registry: DeviceRegistry, tmp_path: Path) -> None:
    registry.add(_record())
    files = list(tmp_path.iterdir())
    assert len(files) >= 1
    assert [path for path in files if path.stat().st_mode & 0o077] == []


@given(off_s=st.integers(-3000, 3000), long_s=st.integers(1, 10**6))
def test_a_period_tolerates_ten_minutes_on_both_sides_and_names_the_rest(
    off_s: int, long_s: int
) -> None:
    start, end = NOW_S, NOW_S + long_s
    for edge, inside in ((start, off_s >= -CLOCK_SKEW_S), (end, off_s < CLOCK_SKEW_S)):
        now_s = edge + off_s
        if start <= now_s < end or inside:
            continue
        assert not is_within(start, end, now_s)
        with pytest.raises(IdentityError, match="this machine's clock"):
            check_period("advert", start, end, now_s)
    check_period("advert", start, end, start - CLOCK_SKEW_S)
    check_period("advert", start, end, end + CLOCK_SKEW_S - 1)


def test_a_clock_that_is_off_is_told_by_how_much_and_which_way() -> None:
    check_clock("answer", NOW_S, NOW_S + 600)
    check_clock("answer", NOW_S, NOW_S - 600)
    with pytest.raises(IdentityError, match=r"is 2 h 5 min ahead of the signed time 2027-01-15"):
        check_clock("answer", NOW_S, NOW_S + 7500)
    with pytest.raises(IdentityError, match=r"is 365 d behind"):
        check_clock("answer", NOW_S, NOW_S - 365 * 86400)


def test_durations_and_times_are_written_for_people() -> None:
    shown = [describe_s(one) for one in (0, 0.4, 59, 60, 90061, 172800)]
    assert shown == ["0 s", "0 s", "59 s", "1 min", "1 d 1 h", "2 d"]
    assert utc(0) == "1970-01-01 00:00:00 UTC"
    assert utc(1e30) == "1e+30 s"


def test_a_device_has_few_certificates_at_a_time_and_ended_ones_make_room(
    registry: DeviceRegistry,
) -> None:
    name = _record().device_id
    registry.add(_record(expires_s=NOW_S))

    def renew(serial: int, now_s: int) -> None:
        issued = IssuedCertificate(
            serial=serial, expires_s=now_s + 100, request_digest=b"%d" % serial, pem=b"pem"
        )
        registry.renewed(name, issued, now_s=now_s)

    for serial in range(MOST_CERTIFICATES):
        renew(serial, NOW_S)
    with pytest.raises(IdentityError, match="8 certificates that have not ended"):
        renew(99, NOW_S)
    assert registry.certificate_for(name, b"99") is None
    renew(99, NOW_S + 100 + CLOCK_SKEW_S)
    assert registry.read("SELECT count(*) FROM certificates") == [(1,)]
