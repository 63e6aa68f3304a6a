"""`tidegate keys` and `tidegate enroll`, run in this process."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tidegate.cli.keys_endpoint import endpoint, network_of
from tidegate.cli.main import main
from tidegate.link.certificate_facts import read_facts, split_bundle
from tidegate.link.clock import utc
from tidegate.link.enrolment import MOST_MESSAGE_BYTES, Token
from tidegate.link.enrolment_device import begin, finish
from tidegate.link.enrolment_gateway import Enrolment
from tidegate.link.fleet import pair
from tidegate.link.identity import load_device, load_gateway
from tidegate.link.keyfiles import FolderLock, write_atomic

PASSPHRASE = "three plain words"
Tidegate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tidegate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tidegate:
    """Runs a command; returns its status, stdout and stderr."""
    for name in ("TIDEGATE_PASSPHRASE", "TIDEGATE_PASSPHRASE_FILE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        status = main([str(one) for one in arguments])
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


@pytest.fixture
def fleet(tidegate: Tidegate, tmp_path: Path) -> Path:
    assert tidegate("keys", "init", tmp_path / "fleet", tmp_path / "gateway")[0] == 0
    return tmp_path


def _enrolled(tidegate: Tidegate, fleet: Path, name: str = "device") -> str:
    """Enrol a device by files; returns its handle."""
    _, token, _ = tidegate("keys", "token", fleet / "gateway")
    keys = ("--keys", fleet / name)
    request, answer = fleet / f"{name}.request", fleet / f"{name}.answer"
    assert tidegate("enroll", "-", *keys, "--request-file", request, stdin=token)[0] == 0
    files = ("--request-file", request, "--answer-file", answer)
    assert tidegate("keys", "answer", fleet / "gateway", *files)[0] == 0
    status, out, told = tidegate("enroll", "-", *keys, "--answer-file", answer, stdin=token)
    assert (status, out) == (0, ""), told
    return load_device(fleet / name).handle


def _every_secret(folder: Path) -> list[str]:
    """The keys that lie in a folder, as they could be printed."""
    secrets = []
    for path in folder.rglob("*.key"):
        data = path.read_bytes()
        lines = data.splitlines()[1:-1] if data.startswith(b"-----") else [data]
        if data.startswith(b"-----"):
            # A certificate follows the key; its lines are no secret.
            lines = lines[: lines.index(b"-----END PRIVATE KEY-----")]
        secrets += [one.decode() if data.startswith(b"-----") else one.hex() for one in lines]
    return secrets


def test_a_fleet_is_made_private_and_shown_without_its_secrets(
    tidegate: Tidegate, fleet: Path
) -> None:
    files = [path for path in fleet.rglob("*") if path.is_file()]
    assert [path for path in files if path.stat().st_mode & 0o077] == []
    folders = [path for path in fleet.rglob("*") if path.is_dir()]
    assert [path for path in folders if path.stat().st_mode & 0o077] == []
    handle = _enrolled(tidegate, fleet)
    shown = ""
    for name in ("fleet", "gateway", "device"):
        status, out, told = tidegate("keys", "show", fleet / name)
        assert (status, told) == (0, "")
        shown += out
    secrets = _every_secret(fleet)
    assert len(secrets) >= 8
    assert [one for one in secrets if one in shown] == []
    assert "role:                   fleet root; keep it offline" in shown
    assert "role:                   gateway, enrols devices" in shown
    assert f"handle:                 {handle}" in shown
    assert "devices:                1, 0 of them revoked" in shown
    assert len(set(re.findall(r"^root: +(.+)$", shown, re.M))) == 1
    assert "gw-gw0" in shown


def test_a_folder_without_keys_has_nothing_to_show(tidegate: Tidegate, tmp_path: Path) -> None:
    status, _, told = tidegate("keys", "show", tmp_path)
    assert status == 1
    assert "neither a fleet nor a gateway nor a device" in told
    (tmp_path / "device.json").write_text("[]")
    assert "device.json: must be a JSON object" in tidegate("keys", "show", tmp_path)[2]


def test_a_fleet_under_a_passphrase_opens_with_it_only(
    tidegate: Tidegate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tmp_path / "words"
    write_atomic(words, PASSPHRASE.encode() + b"\n")
    folders = (tmp_path / "fleet", tmp_path / "gateway")
    assert tidegate("keys", "init", *folders, "--passphrase-file", words)[0] == 0
    for name in ("root.key", "ca.key"):
        assert (tmp_path / "fleet" / name).read_bytes().startswith(b"TGWRAP1\n")
    more = ("keys", "gateway", tmp_path / "fleet", tmp_path / "gw1", "--name", "gw1")
    status, _, told = tidegate(*more)
    assert status == 1
    assert "TIDEGATE_PASSPHRASE_FILE" in told
    monkeypatch.setenv("WORDS", "three wrong words")
    assert "wrong passphrase" in tidegate(*more, "--passphrase-env", "WORDS")[2]
    monkeypatch.setenv("WORDS", PASSPHRASE)
    assert tidegate(*more, "--passphrase-env", "WORDS")[0] == 0
    assert "wrapped" in tidegate("keys", "show", tmp_path / "fleet")[1]
    assert "NAME" not in tidegate(*more, "--passphrase-env", "NO_SUCH")[1]


def test_a_passphrase_is_asked_for_twice_and_never_shown(
    tidegate: Tidegate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter([PASSPHRASE, "another one", PASSPHRASE, PASSPHRASE])
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(typed))
    init = ("keys", "init", tmp_path / "fleet", tmp_path / "gateway", "--ask-passphrase")
    status, out, told = tidegate(*init)
    assert status == 1
    assert "the same both times" in told
    assert PASSPHRASE not in out + told
    assert not (tmp_path / "fleet").exists()
    assert tidegate(*init)[0] == 0


def test_a_service_key_is_wrapped_in_place_and_found_through_the_environment(
    tidegate: Tidegate, fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _enrolled(tidegate, fleet)
    before = load_device(fleet / "device").key.private_bytes_raw()
    monkeypatch.setenv("WORDS", PASSPHRASE)
    wrap = ("keys", "wrap", fleet / "device" / "device.key", "--passphrase-env", "WORDS")
    assert tidegate(*wrap)[0] == 0
    monkeypatch.setenv("TIDEGATE_PASSPHRASE", PASSPHRASE)
    assert load_device(fleet / "device").key.private_bytes_raw() == before
    pem = fleet / "device" / "broker-key.pem"
    assert "a .key file" in tidegate("keys", "wrap", pem, "--passphrase-env", "WORDS")[2]
    assert "--ask-passphrase" in tidegate("keys", "wrap", fleet / "device" / "device.key")[2]


def test_a_gateways_new_signing_key_is_certified_by_the_same_root(
    tidegate: Tidegate, fleet: Path
) -> None:
    before = load_gateway(fleet / "gateway")
    rotate = ("keys", "rotate", "gateway", fleet / "gateway")
    assert "the fleet's folder" in tidegate(*rotate)[2]
    assert tidegate(*rotate, "--fleet", fleet / "fleet")[0] == 0
    after = load_gateway(fleet / "gateway")
    assert after.gateway_id == before.gateway_id
    assert after.key.private_bytes_raw() != before.key.private_bytes_raw()
    assert tidegate("keys", "show", fleet / "gateway")[0] == 0
    assert tidegate("keys", "init", fleet / "other", fleet / "elsewhere")[0] == 0
    told = tidegate(*rotate, "--fleet", fleet / "other")[2]
    assert "belongs to another fleet" in told


def test_no_key_is_replaced_under_a_running_gateway(tidegate: Tidegate, fleet: Path) -> None:
    lock = FolderLock(fleet / "gateway")
    for what in ("gateway", "prekeys"):
        told = tidegate("keys", "rotate", what, fleet / "gateway", "--fleet", fleet / "fleet")[2]
        assert "another process is using these keys" in told
    lock.release()


def test_a_devices_new_key_waits_beside_the_old_one_for_the_daemon(
    tidegate: Tidegate, fleet: Path
) -> None:
    _enrolled(tidegate, fleet)
    device = fleet / "device"
    key = (device / "device.key").read_bytes()
    assert "key rotation" not in tidegate("keys", "show", device)[1]
    assert "brings it into use" in tidegate("keys", "rotate", "device", device)[2]
    assert "on its way already" in tidegate("keys", "rotate", "device", device)[2]
    shown = tidegate("keys", "show", device)[1]
    assert "key rotation" in shown
    staged = (device / "device.next.key").read_bytes()
    assert staged != key == (device / "device.key").read_bytes()
    assert staged.hex() not in shown
    assert (device / "device.next.key").stat().st_mode & 0o777 == 0o600


def test_prekeys_are_shown_with_their_times_and_without_their_secrets(
    tidegate: Tidegate, fleet: Path
) -> None:
    gateway = fleet / "gateway"
    assert "prekey" not in tidegate("keys", "show", gateway)[1]
    for _ in range(2):
        assert tidegate("keys", "rotate", "prekeys", gateway)[0] == 0
    rows = json.loads((gateway / "prekeys.json").read_text())["prekeys"]
    shown = tidegate("keys", "show", gateway)[1]
    lines = [line for line in shown.splitlines() if line.startswith("prekey:")]
    assert len(lines) == len(rows) >= 4
    for row in rows:
        (line,) = [line for line in lines if row["id"] in line]
        assert f"suite {row['suite']} (" in line
        assert f"valid {utc(row['nbf'])} to {utc(row['naf'])}, is erased then" in line
        assert row["private"] not in shown
    for row in rows:
        row["naf"] = 1
    write_atomic(gateway / "prekeys.json", json.dumps({"prekeys": rows}).encode())
    assert "is erased when the gateway runs" in tidegate("keys", "show", gateway)[1]


def test_a_stolen_gateways_key_is_revoked_and_the_list_is_brought_round(
    tidegate: Tidegate, fleet: Path
) -> None:
    _enrolled(tidegate, fleet)
    path = fleet / "fleet" / "gateways.revoked"
    status, _, told = tidegate("keys", "revoke-gateway", fleet / "fleet", "gw0")
    assert status == 0
    assert "revokes the keys of gw0" in told
    assert (
        "gateways.revoked: cannot be read"
        in tidegate(
            "keys", "import-revoked", fleet / "device", fleet / "other" / "gateways.revoked"
        )[2]
    )
    for folder in ("device", "gateway"):
        told = tidegate("keys", "import-revoked", fleet / folder, path)[2]
        assert "the keys of gw0 are revoked" in told
        assert "newer one" in tidegate("keys", "import-revoked", fleet / folder, path)[2]
        assert "revoked gateways:" in tidegate("keys", "show", fleet / folder)[1]
    told = tidegate("keys", "import-revoked", fleet / "fleet", path)[2]
    assert "neither a gateway nor a device" in told
    assert "this gateway's key is revoked" in tidegate("keys", "show", fleet / "gateway")[1]
    rotate = ("keys", "rotate", "gateway", fleet / "gateway", "--fleet", fleet / "fleet")
    assert tidegate(*rotate)[0] == 0
    assert "this gateway's key is revoked" not in tidegate("keys", "show", fleet / "gateway")[1]


def test_prekeys_rotate_at_once_but_not_without_end(tidegate: Tidegate, fleet: Path) -> None:
    rotate = ("keys", "rotate", "prekeys", fleet / "gateway")
    told = [tidegate(*rotate) for _ in range(33)]
    assert told[0][0] == 0
    assert told[-1][0] == 1
    assert "prekeys have not ended yet" in told[-1][2]


def test_a_new_authority_signs_while_the_old_one_is_still_good(
    tidegate: Tidegate, fleet: Path
) -> None:
    _enrolled(tidegate, fleet, "early")
    rotate = ("keys", "rotate", "ca", fleet / "gateway", "--fleet", fleet / "fleet")
    assert tidegate(*rotate)[0] == 0
    _enrolled(tidegate, fleet, "late")
    bundle = split_bundle((fleet / "late" / "broker-ca.pem").read_bytes())
    assert len(bundle) == 2
    assert bundle[1] == (fleet / "early" / "broker-ca.pem").read_bytes()
    lists = (fleet / "gateway" / "revoked.pem").read_bytes()
    assert lists.count(b"BEGIN X509 CRL") == 2
    assert tidegate(*rotate, "--drop-old")[0] == 0
    left = split_bundle((fleet / "gateway" / "ca.pem").read_bytes())
    assert left == bundle[:1]
    assert "none to drop" in tidegate(*rotate, "--drop-old")[2]
    _enrolled(tidegate, fleet, "last")
    facts = read_facts((fleet / "gateway" / "broker-cert.pem").read_bytes())
    assert facts.common_name == "gw-gw0"


def test_devices_are_listed_and_revoked_by_their_handle(tidegate: Tidegate, fleet: Path) -> None:
    assert tidegate("keys", "devices", fleet / "gateway")[1] == ""
    one, two = (_enrolled(tidegate, fleet, name) for name in ("one", "two"))
    status, out, told = tidegate("keys", "revoke", fleet / "gateway", one)
    assert (status, out) == (0, "")
    assert "lists 1 certificates" in told
    listed = tidegate("keys", "devices", fleet / "gateway")[1].splitlines()
    states = {line.split()[0]: line.split()[1] for line in listed}
    assert states == {one: "revoked", two: "active"}
    assert "keys devices" in tidegate("keys", "revoke", fleet / "gateway", "nobody")[2]
    assert "with devices" in tidegate("keys", "revoke", fleet / "none", "nobody")[2]


def test_a_device_and_its_revocation_reach_another_gateway_by_a_list(
    tidegate: Tidegate, fleet: Path
) -> None:
    other = fleet / "other"
    assert tidegate("keys", "gateway", fleet / "fleet", other, "--name", "gw1")[0] == 0
    handle = _enrolled(tidegate, fleet)
    for state, told_of in (("active", "1 devices added, 0"), ("revoked", "0 devices added, 1")):
        assert tidegate("keys", "export", fleet / "gateway", fleet / "list")[0] == 0
        assert (fleet / "list").stat().st_mode & 0o077 == 0
        status, _, told = tidegate("keys", "import", other, fleet / "list")
        assert status == 0
        assert told_of in told
        (line,) = tidegate("keys", "devices", other)[1].splitlines()
        assert line.split()[:2] == [handle, state]
        tidegate("keys", "revoke", fleet / "gateway", handle)


def test_revoking_works_where_there_is_no_authority(tidegate: Tidegate, fleet: Path) -> None:
    handle = _enrolled(tidegate, fleet)
    (fleet / "gateway" / "ca.key").unlink()
    status, _, told = tidegate("keys", "revoke", fleet / "gateway", handle)
    assert status == 0
    assert "the broker is not told" in told


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--hours", "0"), "hours"),
        (("--hours", "25"), "hours"),
        (("--url", "ftp://x"), "http://HOST:PORT"),
        (("--url", "http://user:secret@x"), "without a user"),
    ],
)
def test_a_token_has_limits(
    tidegate: Tidegate, fleet: Path, arguments: tuple[str, ...], problem: str
) -> None:
    status, out, told = tidegate("keys", "token", fleet / "gateway", *arguments)
    assert (status, out) == (1, "")
    assert problem in told
    assert "secret" not in told


def test_a_token_finds_the_endpoint_and_says_the_root(tidegate: Tidegate, fleet: Path) -> None:
    _, out, told = tidegate("keys", "token", fleet / "gateway", "--url", "http://gw:8091/")
    token = Token.decode(out)
    assert token.url == "http://gw:8091/enrol"
    assert "root " in told
    assert out.strip() not in told


def test_a_wrong_token_is_one_line_that_does_not_repeat_it(tidegate: Tidegate, fleet: Path) -> None:
    out = tidegate("keys", "token", fleet / "gateway")[1].strip()
    for word in (out[:-1] + ("A" if out[-2] != "A" else "B") + "x", "tgt1_", "hello"):
        status, _, told = tidegate("enroll", word, "--keys", fleet / "device")
        assert status == 1
        assert told.count("\n") == 1
        assert word not in told or word == "tgt1_"
    told = tidegate("enroll", out, "--keys", fleet / "device")[2]
    assert "enrols by files" in told


def test_an_endpoint_that_is_not_there_is_named(tidegate: Tidegate, fleet: Path) -> None:
    url = "http://127.0.0.1:9"
    token = tidegate("keys", "token", fleet / "gateway", "--url", url)[1]
    status, _, told = tidegate("enroll", token, "--keys", fleet / "device")
    assert status == 1
    assert "http://127.0.0.1:9/enrol" in told


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("testclient", "testclient"),
    ],
)
def test_a_source_is_a_machine_whatever_address_it_takes(host: str, network: str) -> None:
    assert network_of(host) == network


def test_the_endpoint_answers_and_refuses_by_status(tmp_path: Path) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")
    enrolment = Enrolment(tmp_path / "gateway")
    token = enrolment.make_token()
    request = begin(tmp_path / "new", token)

    async def main() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=endpoint(enrolment))
        async with httpx.AsyncClient(transport=transport, base_url="http://gw") as client:
            told = [
                await client.post("/enrol", content=request),
                await client.post("/enrol", content=begin(tmp_path / "late", token)),
                await client.post("/enrol", content=b"x" * (MOST_MESSAGE_BYTES + 1)),
                await client.get("/enrol"),
            ]
            many = [await client.post("/enrol", content=b"junk") for _ in range(30)]
            return told + many

    good, used, large, wrong, *many = asyncio.run(main())
    assert finish(tmp_path / "new", token, good.content, now_s=time.time()).group == "home"
    assert (used.status_code, large.status_code, wrong.status_code) == (403, 413, 405)
    assert used.json()["error"] == {
        "code": "identity_error",
        "message": "token: was used already; make another one",
    }
    assert many[0].status_code == 403
    assert many[-1].status_code == 429
    assert 0 < int(many[-1].headers["retry-after"]) <= 60
    enrolment.close()
