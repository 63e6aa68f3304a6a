"""Enrolment from the token to the device's folder, and everything that must not get in."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tidegate.errors import CapacityError, IdentityError, SealError
from tidegate.link import certificates_store
from tidegate.link.certificate_facts import common_name
from tidegate.link.certificates import make_request
from tidegate.link.certificates_store import (
    check_facts,
    load_authority,
    new_authority,
    without_oldest,
    write_authority,
)
from tidegate.link.clock import CLOCK_SKEW_S
from tidegate.link.enrolment import (
    TOKEN_VALID_S,
    NewKeys,
    Token,
    open_answer,
    open_request,
    seal_request,
    secret_digest,
)
from tidegate.link.enrolment_device import begin, enrol, fingerprint, finish
from tidegate.link.enrolment_gateway import Enrolment
from tidegate.link.fleet import add_gateway, create_fleet, pair, read_fleet
from tidegate.link.identity import load_device
from tidegate.link.keyfiles import write_atomic
from tidegate.link.registry_tokens import MOST_FAILURES, AttemptLimit


class Clock:
    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


NOW_S = 1_800_000_000.0


@pytest.fixture
def clock() -> Clock:
    return Clock(NOW_S)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet and its gateway, certified for the whole time that these tests play in."""
    root = tmp_path_factory.mktemp("fleet")
    create_fleet(root / "fleet", now_s=NOW_S)
    add_gateway(root / "fleet", root / "gateway", "gw0", now_s=NOW_S)
    return root


@pytest.fixture
def gateway(fleet: Path, clock: Clock) -> Iterator[Enrolment]:
    opened = Enrolment(fleet / "gateway", wall_s=clock)
    yield opened
    opened.close()


def _keys() -> NewKeys:
    csr_pem, tls_key_pem = make_request()
    return NewKeys(
        key=Ed25519PrivateKey.generate(),
        answer_key=X25519PrivateKey.generate(),
        tls_key_pem=tls_key_pem,
        csr_pem=csr_pem,
    )


KEYS = _keys()


def _tokens() -> st.SearchStrategy[Token]:
    return st.builds(
        Token,
        root=st.binary(min_size=32, max_size=32),
        box=st.binary(min_size=32, max_size=32),
        secret=st.binary(min_size=16, max_size=16),
        group=st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
        url=st.text(max_size=60),
    )


@given(_tokens())
def test_a_token_is_read_as_it_was_written(token: Token) -> None:
    assert Token.decode(f"  {token.encode()}\n") == token


@given(_tokens(), st.data())
def test_a_mistyped_token_is_refused_without_repeating_it(
    token: Token, data: st.DataObject
) -> None:
    word = token.encode()
    place = data.draw(st.integers(0, len(word) - 1))
    sign = data.draw(st.sampled_from("abcXYZ019-_ !"))
    typed = word[:place] + sign + word[place + 1 :]
    try:
        read: Token | None = Token.decode(typed)
        said = ""
    except IdentityError as error:
        read, said = None, str(error)
    # Base64 has spare bits at its end; they change nothing.
    assert read in (None, token)
    assert typed[5:] not in said


@given(st.text(max_size=80))
def test_any_text_is_no_token(text: str) -> None:
    with pytest.raises(IdentityError, match="whole word"):
        Token.decode(text)


def test_a_device_enrols_and_is_what_the_registry_says(
    gateway: Enrolment, clock: Clock, tmp_path: Path
) -> None:
    token = Token.decode(gateway.make_token("http://127.0.0.1:1").encode())
    device = enrol(tmp_path / "device", token, gateway.enrol, now_s=clock)
    record = gateway.registry.find(device.device_id)
    assert record is not None
    assert record.handle == device.handle
    assert record.public_key == device.key.public_key().public_bytes_raw()
    assert (record.revoked, record.enrolled_s) == (False, NOW_S)
    assert record.expires_s == NOW_S + 60 * 86400
    assert device.root.public_bytes_raw() == token.root
    certificate = (tmp_path / "device" / "broker-cert.pem").read_bytes()
    assert common_name(certificate) == device.handle
    assert load_device(tmp_path / "device").handle == device.handle


def test_what_enrolment_leaves_is_private_and_nothing_is_left_under_way(
    gateway: Enrolment, clock: Clock, tmp_path: Path
) -> None:
    enrol(tmp_path / "device", gateway.make_token(), gateway.enrol, now_s=clock)
    files = {path.name for path in (tmp_path / "device").iterdir()}
    assert files == {
        "broker-ca.pem",
        "broker-cert.pem",
        "broker-key.pem",
        "device.json",
        "device.key",
        "fleet.facts",
    }
    assert [one for one in (tmp_path / "device").iterdir() if one.stat().st_mode & 0o077] == []


def test_a_token_works_once(gateway: Enrolment, clock: Clock, tmp_path: Path) -> None:
    token = gateway.make_token()
    enrol(tmp_path / "one", token, gateway.enrol, now_s=clock)
    with pytest.raises(IdentityError, match="used already"):
        enrol(tmp_path / "two", token, gateway.enrol, now_s=clock)
    with pytest.raises(IdentityError, match="already has a device"):
        begin(tmp_path / "one", gateway.make_token())


def test_a_lost_answer_is_repeated_to_the_device_that_asked(
    gateway: Enrolment, clock: Clock, tmp_path: Path
) -> None:
    token = gateway.make_token()
    first = gateway.enrol(begin(tmp_path, token))
    again = gateway.enrol(begin(tmp_path, token))
    assert first == again
    clock.now_s += TOKEN_VALID_S + 1
    assert gateway.enrol(begin(tmp_path, token)) == first


def test_a_device_that_died_halfway_ends_as_the_same_device(
    gateway: Enrolment, clock: Clock, tmp_path: Path
) -> None:
    token = gateway.make_token()
    answer = gateway.enrol(begin(tmp_path, token))
    granted = finish(tmp_path, token, answer, now_s=NOW_S)
    with pytest.raises(IdentityError, match="no enrolment was begun"):
        finish(tmp_path, token, answer, now_s=NOW_S)
    assert load_device(tmp_path).device_id == granted.device_id


@pytest.mark.parametrize(("after_s", "taken"), [(TOKEN_VALID_S - 1, True), (TOKEN_VALID_S, False)])
def test_a_token_lasts_a_day(
    gateway: Enrolment, clock: Clock, tmp_path: Path, after_s: int, taken: bool
) -> None:
    token = gateway.make_token()
    request = begin(tmp_path, token)
    clock.now_s += after_s
    if taken:
        assert gateway.enrol(request)
        return
    with pytest.raises(IdentityError, match="expired 0 s ago"):
        gateway.enrol(request)


def test_of_many_racing_devices_exactly_one_wins(fleet: Path, clock: Clock, tmp_path: Path) -> None:
    made = Enrolment(fleet / "gateway", wall_s=clock)
    token = made.make_token()
    made.close()
    requests = [begin(tmp_path / str(number), token) for number in range(6)]
    barrier = threading.Barrier(len(requests))
    outcomes: list[str] = []

    def race(request: bytes) -> None:
        mine = Enrolment(fleet / "gateway", wall_s=clock)
        barrier.wait()
        try:
            mine.enrol(request)
            outcomes.append("in")
        except IdentityError as error:
            outcomes.append(str(error))
        finally:
            mine.close()

    threads = [threading.Thread(target=race, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["in", *["token: was used already; make another one"] * 5]


def test_a_used_tokens_secret_and_key_are_not_in_the_file(
    fleet: Path, gateway: Enrolment, clock: Clock, tmp_path: Path
) -> None:
    token = gateway.make_token()
    query = "SELECT secret_digest, private_key FROM tokens WHERE token_id = ?"
    ((digest, private),) = gateway.registry.read(query, token.token_id)
    assert digest == secret_digest(token.secret)
    enrol(tmp_path / "device", token, gateway.enrol, now_s=clock)
    ((_, after),) = gateway.registry.read(query, token.token_id)
    assert after == b""
    gateway.registry.read("PRAGMA wal_checkpoint(TRUNCATE)")
    for path in (fleet / "gateway").glob("devices.sqlite*"):
        assert token.secret not in path.read_bytes()
        assert private not in path.read_bytes()


def test_a_wrong_secret_is_refused_like_an_unknown_token_and_spends_it_in_the_end(
    gateway: Enrolment, clock: Clock, tmp_path: Path
) -> None:
    token = gateway.make_token()
    good = begin(tmp_path, token)
    wrong = dataclasses.replace(token, secret=bytes(16))
    forged = seal_request(wrong, KEYS)
    head = good[:20]
    unknown = seal_request(dataclasses.replace(token, secret=b"x" * 16), KEYS)
    for request in (forged, head + forged[20:], unknown, b"", b"TGE1", good[:-1], bytes(70_000)):
        with pytest.raises(IdentityError, match="refused: unknown token, or a damaged request"):
            gateway.enrol(request)
        clock.now_s += 10
    for _ in range(MOST_FAILURES):
        with pytest.raises(IdentityError, match="refused"):
            gateway.enrol(good[:-1])
        clock.now_s += 10
    with pytest.raises(IdentityError, match=r"spent by 1[0-9] failed attempts"):
        gateway.enrol(good)


def test_attempts_of_one_source_over_all_tokens_are_limited(fleet: Path, clock: Clock) -> None:
    gateway = Enrolment(fleet / "gateway", wall_s=clock, limit=AttemptLimit(most=3))
    for _ in range(3):
        with pytest.raises(IdentityError, match="refused"):
            gateway.enrol(b"junk")
    with pytest.raises(CapacityError, match="too many failed attempts") as full:
        gateway.enrol(b"junk")
    assert full.value.retry_after_s == 60
    with pytest.raises(IdentityError, match="refused"):
        gateway.enrol(b"junk", source="somebody else")
    clock.now_s += 60
    with pytest.raises(IdentityError, match="refused"):
        gateway.enrol(b"junk")
    gateway.close()


@given(
    st.lists(st.tuples(st.floats(0, 40), st.booleans()), max_size=60),
    st.integers(1, 5),
)
def test_a_limit_never_lets_more_than_its_number_fail_in_a_minute(
    steps: list[tuple[float, bool]], most: int
) -> None:
    limit, now_s = AttemptLimit(most=most), 0.0
    failed: list[float] = []
    for wait_s, fails in steps:
        now_s += wait_s
        try:
            limit.check(now_s)
        except CapacityError:
            assert sum(now_s - 60 < one for one in failed) >= most
            continue
        if fails:
            limit.failed(now_s)
            failed.append(now_s)
        assert sum(now_s - 60 < one <= now_s for one in failed) <= most


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_changed_byte_of_a_request_or_an_answer_gets_through(
    gateway: Enrolment, clock: Clock, data: st.DataObject
) -> None:
    token, private = _boxed(gateway)
    request = seal_request(token, KEYS)
    place = data.draw(st.integers(0, len(request) - 1))
    flip = data.draw(st.integers(1, 255))
    broken = request[:place] + bytes([request[place] ^ flip]) + request[place + 1 :]
    with pytest.raises(SealError):
        open_request(broken, private)
    with pytest.raises(SealError):
        open_request(request[:place], private)


def _boxed(gateway: Enrolment) -> tuple[Token, X25519PrivateKey]:
    """A token whose private half we have, too."""
    private = X25519PrivateKey.from_private_bytes(b"\7" * 32)
    made = Token(
        root=bytes(32),
        box=private.public_key().public_bytes_raw(),
        secret=b"s" * 16,
        group="home",
        url="",
    )
    assert gateway
    return made, private


def test_no_changed_byte_of_an_answer_is_believed(
    gateway: Enrolment, clock: Clock, tmp_path: Path
) -> None:
    token = gateway.make_token()
    request = seal_request(token, KEYS)
    answer = gateway.enrol(request)
    assert open_answer(token, KEYS, request, answer, now_s=NOW_S).group == "home"
    for place in range(0, len(answer), 7):
        broken = answer[:place] + bytes([answer[place] ^ 1]) + answer[place + 1 :]
        with pytest.raises(IdentityError, match="damaged"):
            open_answer(token, KEYS, request, broken, now_s=NOW_S)
    with pytest.raises(IdentityError, match="another request"):
        open_answer(token, KEYS, request + b"x", answer, now_s=NOW_S)
    with pytest.raises(IdentityError, match="another request"):
        open_answer(token, _keys(), request, answer, now_s=NOW_S)


def test_an_answer_of_another_fleet_is_not_believed(
    gateway: Enrolment, clock: Clock, tmp_path: Path
) -> None:
    token = gateway.make_token()
    request = seal_request(token, KEYS)
    answer = gateway.enrol(request)
    stranger = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    with pytest.raises(IdentityError, match="pinned key"):
        open_answer(dataclasses.replace(token, root=stranger), KEYS, request, answer, now_s=NOW_S)
    with pytest.raises(IdentityError, match="another gateway or group"):
        open_answer(dataclasses.replace(token, group="lab"), KEYS, request, answer, now_s=NOW_S)


@pytest.mark.parametrize("off_s", [-CLOCK_SKEW_S, 0, CLOCK_SKEW_S])
def test_a_clock_that_is_ten_minutes_off_enrols(
    gateway: Enrolment, tmp_path: Path, off_s: int
) -> None:
    enrol(tmp_path, gateway.make_token(), gateway.enrol, now_s=lambda: NOW_S + off_s)


def test_a_clock_that_is_far_off_is_told_so_by_the_gateways_signed_time(
    gateway: Enrolment, clock: Clock, tmp_path: Path
) -> None:
    token = gateway.make_token()
    for off_s, said in ((-7200, r"2 h behind the signed time"), (86400, r"1 d ahead of")):
        with pytest.raises(IdentityError, match=f"clock .* is {said}"):
            enrol(tmp_path, token, gateway.enrol, now_s=lambda off_s=off_s: NOW_S + off_s)  # type: ignore[misc]
    # Setting the clock is all it takes: what was begun goes on.
    enrol(tmp_path, token, gateway.enrol, now_s=clock)


def test_a_folder_whose_authority_the_root_does_not_know_makes_no_tokens(tmp_path: Path) -> None:
    create_fleet(tmp_path / "fleet", now_s=NOW_S)
    add_gateway(tmp_path / "fleet", tmp_path / "gateway", "gw0", now_s=NOW_S)
    stranger = Ed25519PrivateKey.generate()
    write_authority(tmp_path / "gateway", new_authority(stranger, "home", now_s=NOW_S))
    with pytest.raises(IdentityError, match="pinned key"):
        Enrolment(tmp_path / "gateway")
    root = stranger.public_key()
    known, other = (new_authority(stranger, "home", now_s=NOW_S) for _ in range(2))
    check_facts(root, known.facts, "home", known.bundle_pem)
    with pytest.raises(IdentityError, match="does not know"):
        check_facts(root, known.facts, "home", known.bundle_pem + other.bundle_pem)
    with pytest.raises(IdentityError, match="another group"):
        check_facts(root, known.facts, "lab", known.bundle_pem)


@pytest.mark.parametrize("dies_at", range(1, 6))
@pytest.mark.parametrize("dropping", [False, True])
def test_an_authority_that_is_half_written_still_enrols(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int, dropping: bool
) -> None:
    create_fleet(tmp_path / "fleet")
    gateway = tmp_path / "gateway"
    add_gateway(tmp_path / "fleet", gateway, "gw0")
    root, group = read_fleet(tmp_path / "fleet")
    one = load_authority(gateway)
    two = new_authority(root, group, before=one.keys)
    before, after = (two, without_oldest(two, root, group)) if dropping else (one, two)
    write_authority(gateway, before)
    writes = [0]

    def dying(path: Path, data: bytes, *, passphrase: bytes | None = None) -> None:
        writes[0] += 1
        if writes[0] == dies_at:
            raise KeyboardInterrupt
        write_atomic(path, data)

    monkeypatch.setattr(certificates_store, "write_atomic", dying)
    monkeypatch.setattr(certificates_store, "write_secret", dying)
    with suppress(KeyboardInterrupt):
        write_authority(gateway, after)
    monkeypatch.undo()
    enrolment = Enrolment(gateway)
    enrol(tmp_path / "device", enrolment.make_token(), enrolment.enrol, now_s=time.time)
    enrolment.close()


def test_an_answer_key_that_is_no_point_is_refused_before_the_token_is_used(
    gateway: Enrolment, clock: Clock, tmp_path: Path
) -> None:
    token, private = _boxed(gateway)
    hollow = dataclasses.replace(KEYS, answer_key=HollowKey())  # type: ignore[arg-type]
    with pytest.raises(SealError):
        open_request(seal_request(token, hollow), private)


class HollowKey:
    """A key whose public half is of low order."""

    def public_key(self) -> HollowKey:
        return self

    def public_bytes_raw(self) -> bytes:
        return bytes(32)


def test_a_gateway_without_an_authority_says_what_to_do(tmp_path: Path) -> None:
    create_fleet(tmp_path / "fleet")
    add_gateway(tmp_path / "fleet", tmp_path / "gateway", "gw0", enrols=False)
    with pytest.raises(IdentityError, match="tidegate keys init"):
        Enrolment(tmp_path / "gateway")


def test_a_pair_can_take_more_devices_by_token(tmp_path: Path) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")
    gateway = Enrolment(tmp_path / "gateway")
    request = begin(tmp_path / "more", gateway.make_token())
    assert gateway.enrol(request)
    gateway.close()


def test_a_renewal_keeps_the_handle_and_repeats_its_answer(
    gateway: Enrolment, clock: Clock, tmp_path: Path
) -> None:
    device = enrol(tmp_path, gateway.make_token(), gateway.enrol, now_s=clock)
    clock.now_s += 40 * 86400
    csr_pem, _ = make_request(device.handle)
    first = gateway.renew(device.device_id, csr_pem)
    again = gateway.renew(device.device_id, csr_pem)
    assert first == again
    assert common_name(first.certificate_pem) == device.handle
    record = gateway.registry.find(device.device_id)
    assert record is not None
    assert record.expires_s == NOW_S + 100 * 86400


def test_a_revoked_or_expired_device_renews_nothing(
    fleet: Path, gateway: Enrolment, clock: Clock, tmp_path: Path
) -> None:
    one = enrol(tmp_path / "one", gateway.make_token(), gateway.enrol, now_s=clock)
    two = enrol(tmp_path / "two", gateway.make_token(), gateway.enrol, now_s=clock)
    assert gateway.revoke(one.handle) >= 1
    assert b"BEGIN X509 CRL" in (fleet / "gateway" / "revoked.pem").read_bytes()
    csr_pem, _ = make_request()
    with pytest.raises(IdentityError, match="device_revoked"):
        gateway.renew(one.device_id, csr_pem)
    clock.now_s += 60 * 86400 + CLOCK_SKEW_S
    with pytest.raises(IdentityError, match="device_expired"):
        gateway.renew(two.device_id, csr_pem)
    with pytest.raises(IdentityError, match="no device here has it"):
        gateway.revoke("0" * 32)


def test_no_repr_shows_a_secret(gateway: Enrolment) -> None:
    token, private = _boxed(gateway)
    opened = open_request(seal_request(token, KEYS), private)
    shown = repr(token) + repr(KEYS) + repr(opened)
    for secret in (repr(token.secret), token.secret.hex(), "PRIVATE", repr(opened.answer_key)):
        assert secret not in shown


def test_a_root_is_compared_by_a_short_line() -> None:
    assert fingerprint(bytes(32)) == "6668 7aad f862 bd77 6c8f c18b 8e9f 8e20"


class TokenLife(RuleBasedStateMachine):
    """One token against devices that repeat, race, forge and wait, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.failures = 0
        self.winner: int | None = None

    @initialize()
    def start(self) -> None:
        self.clock = Clock(NOW_S)
        self.gateway = Enrolment(MACHINE_FLEET[0], wall_s=self.clock, limit=AttemptLimit(most=999))
        self.before = len(self.gateway.registry.devices())
        token = self.gateway.make_token()
        self.requests = [seal_request(token, KEYS) for _ in range(3)]

    @rule(number=st.integers(0, 2))
    def ask(self, number: int) -> None:
        alive = self.clock.now_s < NOW_S + TOKEN_VALID_S and self.failures < MOST_FAILURES
        expected = self.winner == number or (self.winner is None and alive)
        try:
            self.gateway.enrol(self.requests[number])
        except IdentityError:
            assert not expected
            self.failures += 1
        else:
            assert expected
            self.winner = number

    @rule(place=st.integers(4, 300))
    def forge(self, place: int) -> None:
        whole = self.requests[0]
        broken = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        with pytest.raises(IdentityError):
            self.gateway.enrol(broken)
        self.failures += place >= 20

    @rule(hours=st.integers(1, 20))
    def wait(self, hours: int) -> None:
        self.clock.now_s += hours * 3600

    @invariant()
    def at_most_one_device_is_in(self) -> None:
        if hasattr(self, "gateway"):
            count = len(self.gateway.registry.devices()) - self.before
            assert count == (self.winner is not None)

    def teardown(self) -> None:
        if hasattr(self, "gateway"):
            self.gateway.close()


MACHINE_FLEET: list[Path] = []


def test_a_token_lets_in_one_device_whatever_happens(tmp_path: Path) -> None:
    create_fleet(tmp_path / "fleet", now_s=NOW_S)
    add_gateway(tmp_path / "fleet", tmp_path / "gateway", "gw0", now_s=NOW_S)
    MACHINE_FLEET[:] = [tmp_path / "gateway"]
    TokenLife.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
    TokenLife.TestCase().runTest()
