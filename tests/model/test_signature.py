"""Signed manifests, and the bundle as one verified file."""

from __future__ import annotations

import io
import json
import tarfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tinymodel import tiny_architecture

from tidegate.errors import BundleError, ConfigError
from tidegate.model.archive import pack, unpack
from tidegate.model.bundle import MANIFEST_FILE, Bundle, BundleWriter, replace_manifest
from tidegate.model.manifest import Manifest, MemoryNeed
from tidegate.model.recipe import Format, FormatRule, Recipe
from tidegate.model.signature import SigningKey, read_public_key

KEY = SigningKey(bytes(range(32)))
FILES = {"onnx/model.onnx": b"graph" * 1000, "tokenizer.json": b"{}"}


def write_bundle(out: Path) -> Bundle:
    with BundleWriter(out) as writer:
        for name, content in FILES.items():
            (writer.folder / name).parent.mkdir(exist_ok=True)
            (writer.folder / name).write_bytes(content)
        rule = FormatRule(match=("*",), format=Format())
        return writer.finish(
            Manifest(
                model_id="assistant",
                version=1,
                architecture=tiny_architecture(),
                context_tokens=256,
                recipe=Recipe(name="fast", formats=(rule,), passes=()),
                tensor_bits={},
                targets=("onnx",),
                toolchain={},
                memory=MemoryNeed(weight_bytes=1, kv_values_per_token=1),
                files=writer.entries(),
            )
        )


def signed_bundle(out: Path) -> Bundle:
    bundle = write_bundle(out)
    return replace_manifest(bundle, KEY.sign(bundle.manifest))


def test_a_signed_bundle_opens_for_those_who_trust_its_key(tmp_path: Path) -> None:
    signed = signed_bundle(tmp_path / "b")
    assert Bundle.open(tmp_path / "b", trusted={KEY.public}) == signed
    assert Bundle.open(tmp_path / "b") == signed


def test_a_bundle_by_somebody_else_or_by_nobody_is_refused_when_trust_is_wanted(
    tmp_path: Path,
) -> None:
    signed_bundle(tmp_path / "b")
    with pytest.raises(BundleError, match="not trusted"):
        Bundle.open(tmp_path / "b", trusted={SigningKey.generate().public})
    write_bundle(tmp_path / "unsigned")
    with pytest.raises(BundleError, match="signature: is missing"):
        Bundle.open(tmp_path / "unsigned", trusted={KEY.public})


@pytest.mark.parametrize("trusted", [None, {KEY.public}])
def test_a_manifest_that_was_changed_after_signing_is_refused(
    tmp_path: Path, trusted: set[str] | None
) -> None:
    signed = signed_bundle(tmp_path / "b")
    replace_manifest(signed, replace(signed.manifest, version=2))
    with pytest.raises(BundleError, match="signature: is not one of this manifest"):
        Bundle.open(tmp_path / "b", trusted=trusted)


@pytest.mark.parametrize("damage", ["", "zz", "00", "00" * 64])
def test_a_malformed_signature_is_refused_and_does_not_crash(tmp_path: Path, damage: str) -> None:
    signed = signed_bundle(tmp_path / "b").manifest
    assert signed.signature is not None
    for key in ("public_key", "value"):
        body = json.loads(signed.to_bytes())
        body["signature"][key] = damage
        (tmp_path / "b" / MANIFEST_FILE).write_bytes(json.dumps(body).encode())
        with pytest.raises(BundleError, match="signature"):
            Bundle.open(tmp_path / "b")


def test_keys_are_kept_for_their_owner_only_and_never_shown(tmp_path: Path) -> None:
    KEY.write(tmp_path / "maker.key")
    assert (tmp_path / "maker.key").stat().st_mode & 0o777 == 0o600
    assert SigningKey.read(tmp_path / "maker.key").public == KEY.public
    assert bytes(range(32)).hex() not in repr(KEY)
    with pytest.raises(ConfigError, match="not replaced"):
        KEY.write(tmp_path / "maker.key")
    (tmp_path / "short.key").write_text("abcd")
    with pytest.raises(ConfigError, match="64 hex digits") as refused:
        SigningKey.read(tmp_path / "short.key")
    assert "abcd" not in str(refused.value)
    with pytest.raises(ConfigError, match="public key"):
        read_public_key(tmp_path / "nowhere.pub")


def test_a_packed_bundle_unpacks_to_the_same_files_and_packs_to_the_same_bytes(
    tmp_path: Path,
) -> None:
    signed = signed_bundle(tmp_path / "b")
    pack(signed, tmp_path / "one.tar.zst")
    pack(signed, tmp_path / "two.tar.zst")
    assert (tmp_path / "one.tar.zst").read_bytes() == (tmp_path / "two.tar.zst").read_bytes()
    unpack(tmp_path / "one.tar.zst", tmp_path / "c", trusted={KEY.public})
    opened = Bundle.open(tmp_path / "c", trusted={KEY.public})
    assert opened.manifest == signed.manifest
    assert {name: (tmp_path / "c" / name).read_bytes() for name in FILES} == FILES


def archive_of(path: Path, members: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> Path:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.type = kind if name != MANIFEST_FILE else tarfile.REGTYPE
            entry.size = len(content) if entry.isreg() else 0
            tar.addfile(entry, io.BytesIO(content))
    path.write_bytes(zstandard.compress(body.getvalue()))
    return path


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"onnx/model.onnx": b"GRAPH" * 1000}, "model.onnx: was changed"),
        ({"onnx/model.onnx": b"short"}, "5 bytes: the manifest says 5000"),
        ({"onnx/model.onnx": None}, "is missing from the archive"),
        ({"../outside": b"x"}, "lies in its place"),
        ({"zz": b"x"}, "more than its manifest lists"),
    ],
)
def test_an_archive_that_is_not_what_its_manifest_says_leaves_nothing(
    tmp_path: Path, change: dict[str, bytes | None], problem: str
) -> None:
    manifest = signed_bundle(tmp_path / "b").manifest
    content = {name: data for name, data in (FILES | change).items() if data is not None}
    members = [(MANIFEST_FILE, manifest.to_bytes()), *sorted(content.items())]
    archive = archive_of(tmp_path / "a.tar.zst", members)
    with pytest.raises(BundleError, match=problem):
        unpack(archive, tmp_path / "out", trusted={KEY.public})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.zst", "b"]


def test_a_link_in_an_archive_is_refused(tmp_path: Path) -> None:
    manifest = signed_bundle(tmp_path / "b").manifest
    members = [(MANIFEST_FILE, manifest.to_bytes()), *sorted(FILES.items())]
    archive = archive_of(tmp_path / "a.tar.zst", members, kind=tarfile.SYMTYPE)
    with pytest.raises(BundleError, match="lies in its place"):
        unpack(archive, tmp_path / "out")


def test_an_untrusted_archive_is_refused_before_a_file_is_written(tmp_path: Path) -> None:
    pack(write_bundle(tmp_path / "b"), tmp_path / "a.tar.zst")
    with pytest.raises(BundleError, match="signature: is missing"):
        unpack(tmp_path / "a.tar.zst", tmp_path / "out", trusted={KEY.public})
    assert not (tmp_path / "out").exists()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_damaged_archive_is_refused_or_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    signed = signed_bundle(folder / "b")
    pack(signed, folder / "a.tar.zst")
    content = bytearray((folder / "a.tar.zst").read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:at]
    else:
        content[at] ^= data.draw(st.integers(1, 255))
    (folder / "a.tar.zst").write_bytes(content)
    with suppress(BundleError):
        unpack(folder / "a.tar.zst", folder / "out", trusted={KEY.public})
        assert Bundle.open(folder / "out").manifest == signed.manifest


def header(kind: bytes, claimed_bytes: int) -> bytes:
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = kind, claimed_bytes
    return entry.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_extended_headers_of_an_archive_are_bounded(tmp_path: Path, kind: bytes) -> None:
    """Of 5 MB one would be read whole; of 2000 each would be a call within the one before."""
    large = header(kind, 5_000_000) + bytes(5_000_320)
    block = b"12 comment=\n".ljust(512, b"\0")
    for body in (large, (header(kind, 12) + block) * 2000):
        (tmp_path / "a.tar.zst").write_bytes(zstandard.compress(body + bytes(1024)))
        with pytest.raises(BundleError, match="too long or too many"):
            unpack(tmp_path / "a.tar.zst", tmp_path / "out")


def test_a_sparse_file_in_an_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.zst").write_bytes(
        zstandard.compress(header(tarfile.GNUTYPE_SPARSE, 512) + bytes(1536))
    )
    with pytest.raises(BundleError, match="sparse"):
        unpack(tmp_path / "a.tar.zst", tmp_path / "out")


def test_a_long_path_survives_packing(tmp_path: Path) -> None:
    name = "onnx/" + "long" * 40
    with BundleWriter(tmp_path / "b") as writer:
        for path, content in {**FILES, name: b"x"}.items():
            (writer.folder / path).parent.mkdir(exist_ok=True)
            (writer.folder / path).write_bytes(content)
        plain = write_bundle(tmp_path / "plain").manifest
        bundle = writer.finish(replace(plain, files=writer.entries()))
    pack(bundle, tmp_path / "a.tar.zst")
    assert unpack(tmp_path / "a.tar.zst", tmp_path / "c").manifest == bundle.manifest


def test_a_signed_manifest_with_half_a_character_is_refused(tmp_path: Path) -> None:
    body = json.loads(signed_bundle(tmp_path / "b").manifest.to_bytes())
    body["model_id"] = "\ud800"
    (tmp_path / "b" / MANIFEST_FILE).write_text(json.dumps(body))
    with pytest.raises(BundleError, match="is not JSON"):
        Bundle.open(tmp_path / "b")


def test_an_older_version_replaces_a_newer_one_only_when_asked_to(tmp_path: Path) -> None:
    old = signed_bundle(tmp_path / "b")
    pack(old, tmp_path / "old.tar.zst")
    new = KEY.sign(replace(old.manifest, version=2))
    pack(replace_manifest(old, new), tmp_path / "new.tar.zst")
    unpack(tmp_path / "old.tar.zst", tmp_path / "c", trusted={KEY.public})
    unpack(tmp_path / "new.tar.zst", tmp_path / "c", trusted={KEY.public})
    with pytest.raises(BundleError, match="version = 1: must be at least 2"):
        unpack(tmp_path / "old.tar.zst", tmp_path / "c", trusted={KEY.public})
    assert Bundle.open(tmp_path / "c").manifest == new
    unpack(tmp_path / "old.tar.zst", tmp_path / "c", allow_older=True)
    assert Bundle.open(tmp_path / "c").manifest == old.manifest


def test_a_bundle_larger_than_the_disk_is_refused_before_it_fills_it(tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path / "b").manifest
    vast = replace(manifest.files["onnx/model.onnx"], size_bytes=1 << 60)
    huge = replace(manifest, files={**manifest.files, "onnx/model.onnx": vast})
    members = [(MANIFEST_FILE, huge.to_bytes()), *sorted(FILES.items())]
    archive = archive_of(tmp_path / "a.tar.zst", members)
    with pytest.raises(BundleError, match=f"needs {(1 << 60) + 2} bytes"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()
