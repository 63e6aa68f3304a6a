"""The certificates a broker sees: who they name, what they may do, who refuses them."""

from __future__ import annotations

import base64
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.errors import ConfigError, IdentityError
from tidegate.link.certificate_facts import (
    check_issued,
    common_name,
    expires_s,
    read_facts,
    renewal_due_s,
    split_bundle,
)
from tidegate.link.certificates import (
    BACKDATED_S,
    CertifiedKey,
    check_request,
    issue_device,
    issue_gateway,
    issue_server,
    make_ca,
    make_request,
    revocation_list,
)

NOW_S = 1_790_000_000
HANDLE = "0f" * 16
REQUEST, _ = make_request(HANDLE)


@pytest.fixture(scope="module")
def ca() -> CertifiedKey:
    return make_ca("home", now_s=NOW_S)


def _device(ca: CertifiedKey, days: int = 60) -> CertifiedKey:
    csr, key = make_request(HANDLE)
    return CertifiedKey(
        certificate_pem=issue_device(ca, csr, HANDLE, days, now_s=NOW_S), key_pem=key
    )


def _usages(pem: bytes) -> list[x509.ObjectIdentifier]:
    extensions = x509.load_pem_x509_certificate(pem).extensions
    return list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def test_a_device_certificate_names_the_handle_and_nothing_else(ca: CertifiedKey) -> None:
    device = _device(ca)
    certificate = x509.load_pem_x509_certificate(device.certificate_pem)
    assert [str(one.value) for one in certificate.subject] == [HANDLE]
    assert common_name(device.certificate_pem) == HANDLE
    assert _usages(device.certificate_pem) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    with pytest.raises(x509.ExtensionNotFound):
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)


def test_what_a_device_asks_for_beyond_its_key_is_ignored(ca: CertifiedKey) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gw-gw0")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    csr = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    pem = issue_device(ca, csr, HANDLE, now_s=NOW_S)
    extensions = x509.load_pem_x509_certificate(pem).extensions
    assert common_name(pem) == HANDLE
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_certificate_starts_before_it_was_made_and_ends_on_the_day(ca: CertifiedKey) -> None:
    facts = read_facts(_device(ca, days=30).certificate_pem)
    assert facts.nbf_s == NOW_S - BACKDATED_S
    assert facts.naf_s == NOW_S + 30 * 86400
    pem = _device(ca, days=30).certificate_pem
    assert expires_s(pem) == facts.naf_s
    assert renewal_due_s(pem) == facts.nbf_s + (facts.naf_s - facts.nbf_s) * 2 / 3


def test_a_gateway_and_a_server_are_told_from_devices(ca: CertifiedKey) -> None:
    gateway = issue_gateway(ca, "gw0", now_s=NOW_S)
    server = issue_server(ca, ["broker.example", "192.0.2.7", "::1"], now_s=NOW_S)
    assert common_name(gateway.certificate_pem) == "gw-gw0"
    assert _usages(gateway.certificate_pem) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert _usages(server.certificate_pem) == [ExtendedKeyUsageOID.SERVER_AUTH]
    names = (
        x509.load_pem_x509_certificate(server.certificate_pem)
        .extensions.get_extension_for_class(x509.SubjectAlternativeName)
        .value
    )
    assert names.get_values_for_type(x509.DNSName) == ["broker.example"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "::1"]
    with pytest.raises(ConfigError, match="without 'gw-'"):
        issue_device(ca, make_request()[0], "gw-gw0")


@pytest.mark.parametrize("names", [[], ["a b"], ["-a"], ["a" * 254], ["ü.example"], [""]])
def test_a_server_needs_real_names(ca: CertifiedKey, names: list[str]) -> None:
    with pytest.raises(ConfigError, match="server name"):
        issue_server(ca, names)


def test_serial_numbers_are_random(ca: CertifiedKey) -> None:
    serials = {read_facts(_device(ca).certificate_pem).serial for _ in range(8)}
    assert len(serials) == 8
    assert min(serials).bit_length() > 100


@pytest.mark.parametrize("days", [0, -1, 3651])
def test_days_have_bounds(ca: CertifiedKey, days: int) -> None:
    with pytest.raises(ConfigError, match="days"):
        issue_device(ca, make_request()[0], HANDLE, days)


def test_a_request_with_a_broken_signature_or_another_key_is_refused() -> None:
    csr, _ = make_request(HANDLE)
    der = bytearray(x509.load_pem_x509_csr(csr).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    broken = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(IdentityError, match="signature"):
        check_request(broken)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    other = builder.sign(ed25519.Ed25519PrivateKey.generate(), None)
    with pytest.raises(IdentityError, match="P-256"):
        check_request(other.public_bytes(serialization.Encoding.PEM))
    for junk in (b"", b"-----BEGIN CERTIFICATE REQUEST-----", csr[:80]):
        with pytest.raises(IdentityError, match="cannot be read"):
            check_request(junk)


def test_a_certificate_of_another_fleet_or_another_key_is_refused(ca: CertifiedKey) -> None:
    device = _device(ca)
    older = make_ca("home", now_s=NOW_S)
    both = older.certificate_pem + ca.certificate_pem
    check_issued(device.certificate_pem, both, device.key_pem)
    assert len(split_bundle(both)) == 2
    with pytest.raises(IdentityError, match="not signed by"):
        check_issued(device.certificate_pem, older.certificate_pem, None)
    with pytest.raises(IdentityError, match="another key"):
        check_issued(device.certificate_pem, both, _device(ca).key_pem)


def test_a_revocation_list_holds_exactly_the_serials(ca: CertifiedKey) -> None:
    pem = revocation_list(ca, [7, 5, 7], now_s=NOW_S)
    listed = x509.load_pem_x509_crl(pem)
    authority = x509.load_pem_x509_certificate(ca.certificate_pem).public_key()
    assert isinstance(authority, ec.EllipticCurvePublicKey)
    assert listed.is_signature_valid(authority)
    assert [one.serial_number for one in listed] == [5, 7]


def test_no_repr_shows_a_key(ca: CertifiedKey) -> None:
    assert "PRIVATE" not in repr(ca)
    with pytest.raises(IdentityError) as refused:
        issue_gateway(CertifiedKey(certificate_pem=ca.certificate_pem, key_pem=b"secret"), "gw0")
    assert "secret" not in str(refused.value)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_openssl_agrees_on_purpose_and_revocation(ca: CertifiedKey, tmp_path: Path) -> None:
    device, server = _device(ca), issue_server(ca, ["localhost"], now_s=NOW_S)
    serial = read_facts(device.certificate_pem).serial
    files = {
        "ca.pem": ca.certificate_pem,
        "device.pem": device.certificate_pem,
        "server.pem": server.certificate_pem,
        "none.crl": revocation_list(ca, [], now_s=NOW_S),
        "one.crl": revocation_list(ca, [serial], now_s=NOW_S),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)

    def verify(purpose: str, crl: str, name: str) -> str:
        flags = ["-CAfile", "ca.pem", "-crl_check", "-CRLfile", crl, "-purpose", purpose]
        command = ["openssl", "verify", "-x509_strict", "-attime", str(NOW_S), *flags, name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    assert "device.pem: OK" in verify("sslclient", "none.crl", "device.pem")
    assert "server.pem: OK" in verify("sslserver", "none.crl", "server.pem")
    assert "purpose" in verify("sslserver", "none.crl", "device.pem")
    assert "purpose" in verify("sslclient", "none.crl", "server.pem")
    assert "revoked" in verify("sslclient", "one.crl", "device.pem")


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damaged_certificates_and_requests_are_an_identity_error_or_still_read(
    ca: CertifiedKey, data: st.DataObject
) -> None:
    certificate = x509.load_pem_x509_certificate(ca.certificate_pem)
    request = x509.load_pem_x509_csr(REQUEST)
    for name, whole, read in (
        ("CERTIFICATE", certificate.public_bytes(serialization.Encoding.DER), read_facts),
        ("CERTIFICATE REQUEST", request.public_bytes(serialization.Encoding.DER), check_request),
    ):
        der = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 3))):
            der[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))
        body = base64.encodebytes(bytes(der)).decode()
        with suppress(IdentityError):
            read(f"-----BEGIN {name}-----\n{body}-----END {name}-----\n".encode())


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_a_certificate_whose_serial_number_is_negative_is_refused(ca: CertifiedKey) -> None:
    certificate = x509.load_pem_x509_certificate(ca.certificate_pem)
    der = bytearray(certificate.public_bytes(serialization.Encoding.DER))
    number = certificate.serial_number
    at = der.index(number.to_bytes((number.bit_length() + 8) // 8, "big"))
    der[at] |= 0x80
    body = base64.encodebytes(bytes(der)).decode()
    with pytest.raises(IdentityError, match="serial number must be positive"):
        read_facts(f"-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n".encode())


def test_a_request_of_an_unknown_version_is_refused() -> None:
    request = x509.load_pem_x509_csr(make_request(HANDLE)[0])
    der = request.public_bytes(serialization.Encoding.DER)
    odd = der.replace(b"\x02\x01\x00", b"\x02\x01\x07", 1)
    assert odd != der
    body = base64.encodebytes(odd).decode()
    name = "CERTIFICATE REQUEST"
    with pytest.raises(IdentityError, match="cannot be read"):
        check_request(f"-----BEGIN {name}-----\n{body}-----END {name}-----\n".encode())
