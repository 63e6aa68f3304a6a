"""Bundles: exact bytes, verified before use, written whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinymodel import tiny_architecture

from tidegate.errors import BundleError
from tidegate.model.architecture import LayerKind
from tidegate.model.bundle import Bundle, BundleWriter
from tidegate.model.manifest import FileEntry, Manifest, MemoryNeed
from tidegate.model.recipe import Format, FormatRule, PassSpec, Recipe
from tidegate.model.rope import Rope

RECIPE = Recipe(
    name="fast",
    formats=(FormatRule(match=("*",), format=Format(bits=4)),),
    passes=(PassSpec(kind="clip", options={"grid": 20}),),
)


def manifest_of(files: dict[str, FileEntry], version: int = 1) -> Manifest:
    return Manifest(
        model_id="assistant",
        version=version,
        architecture=tiny_architecture(),
        context_tokens=256,
        recipe=RECIPE,
        tensor_bits={"embed": 8, "layers.0.q": 4},
        targets=("onnx",),
        toolchain={"onnx": "1.0"},
        memory=MemoryNeed(weight_bytes=1000, kv_values_per_token=256),
        files=files,
    )


def write_bundle(out: Path, content: bytes = b"weights") -> Bundle:
    with BundleWriter(out) as writer:
        (writer.folder / "onnx").mkdir()
        (writer.folder / "onnx" / "model.onnx").write_bytes(content)
        (writer.folder / "tokenizer.json").write_bytes(b"{}")
        return writer.finish(manifest_of(dict(writer.entries())))


def test_a_written_bundle_opens_with_the_same_manifest(tmp_path: Path) -> None:
    written = write_bundle(tmp_path / "b")
    opened = Bundle.open(tmp_path / "b")
    assert opened == written
    assert opened.target_folder("onnx").joinpath("model.onnx").read_bytes() == b"weights"


def test_the_manifest_has_exactly_these_bytes() -> None:
    entry = FileEntry(sha256="00", size_bytes=7)
    kinds = (LayerKind(rope=Rope(frequencies=(1.0, 0.5))),)
    manifest = replace(
        manifest_of({"onnx/model.onnx": entry}),
        architecture=replace(tiny_architecture(), kinds=kinds),
    )
    assert manifest.to_bytes() == (
        b'{"architecture":{"activation":"silu","attention_scale":0.1767766952966369,'
        b'"attention_softcap":null,"context":256,"embed_scale":1.0,"head_scale":1.0,'
        b'"head_size":32,"head_softcap":null,"heads":4,"inner":192,"kinds":[{"experts":null,'
        b'"rope":{"frequencies":[1.0,0.5],"magnitude":1.0},"window":null}],"kv_heads":2,'
        b'"layers":2,"mlp_bias":false,"model_type":"llama","norm_after":false,'
        b'"norm_before":true,"norm_eps":1e-05,"o_bias":false,"pattern":[],"qk_norm":"none",'
        b'"qkv_bias":false,"qkv_clip":null,"residual_scale":1.0,"tied_head":true,"vocab":203,'
        b'"width":128},"calibration":null,"context_tokens":256,'
        b'"files":{"onnx/model.onnx":{"sha256":"00","size_bytes":7}},'
        b'"memory":{"kv_values_per_token":256,"weight_bytes":1000},"model_id":"assistant",'
        b'"quality":null,"recipe":{"formats":[{"format":{"bits":4,"group_size":64,'
        b'"symmetric":false},"match":["*"]}],"name":"fast","passes":[{"kind":"clip",'
        b'"match":["*"],"options":{"grid":20}}],"target_bpw":null},"schema_version":2,'
        b'"signature":null,"targets":["onnx"],"tensor_bits":{"embed":8,"layers.0.q":4},'
        b'"toolchain":{"onnx":"1.0"},"version":1}'
    )


@pytest.mark.parametrize("position", [0, 3, 6])
def test_one_changed_byte_is_noticed_and_named(tmp_path: Path, position: int) -> None:
    write_bundle(tmp_path / "b")
    path = tmp_path / "b" / "onnx" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"onnx/model\.onnx: was changed"):
        Bundle.open(tmp_path / "b")


def test_files_of_a_target_may_wait_until_it_is_asked_for(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    file = tmp_path / "b" / "onnx" / "model.onnx"
    file.write_bytes(b"Weights")
    with pytest.raises(BundleError, match=r"onnx/model\.onnx: was changed"):
        Bundle.open(tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b", every_target=False)
    with pytest.raises(BundleError, match=r"onnx/model\.onnx: was changed"):
        bundle.target_folder("onnx")
    file.write_bytes(b"weights")
    assert bundle.target_folder("onnx") == file.parent
    file.unlink()
    with pytest.raises(BundleError, match=r"onnx/model\.onnx: is missing"):
        bundle.target_folder("onnx")


@pytest.mark.parametrize("name", ["tokenizer.json", "onnx/model.onnx"])
def test_sizes_and_the_files_of_no_target_are_checked_at_once(tmp_path: Path, name: str) -> None:
    write_bundle(tmp_path / "b")
    file = tmp_path / "b" / name
    file.write_bytes(b"[]" if name == "tokenizer.json" else b"longer weights")
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        Bundle.open(tmp_path / "b", every_target=False)


def test_a_missing_a_longer_and_a_linked_file_are_named(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    path = tmp_path / "b" / "onnx" / "model.onnx"
    path.write_bytes(b"weights and more")
    with pytest.raises(BundleError, match="16 bytes: the manifest says 7"):
        Bundle.open(tmp_path / "b")
    path.unlink()
    with pytest.raises(BundleError, match=r"model\.onnx: is missing"):
        Bundle.open(tmp_path / "b")
    (tmp_path / "elsewhere").write_bytes(b"weights")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link"):
        Bundle.open(tmp_path / "b")


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../b", "a//b", "a\\b", "", ".", "./a"])
def test_paths_cannot_leave_the_bundle(path: str) -> None:
    data = manifest_of({path: FileEntry(sha256="00", size_bytes=1)}).to_bytes()
    with pytest.raises(BundleError, match="not a path inside"):
        Manifest.from_bytes(data)


def test_a_newer_schema_is_refused_with_both_numbers() -> None:
    body = json.loads(manifest_of({}).to_bytes()) | {"schema_version": 9}
    with pytest.raises(BundleError, match="schema_version = 9: this release reads 2"):
        Manifest.from_bytes(json.dumps(body).encode())


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_manifest_with_anything_in_it_is_read_or_refused(data: st.DataObject) -> None:
    body = json.loads(manifest_of({"a": FileEntry(sha256="00", size_bytes=1)}).to_bytes())
    at = body
    key = data.draw(st.sampled_from(sorted(at)))
    if isinstance(at[key], dict) and at[key] and data.draw(st.booleans()):
        at = at[key]
        key = data.draw(st.sampled_from(sorted(at)))
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    at[key] = data.draw(
        scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(), scalars)
    )
    with suppress(BundleError):
        Manifest.from_bytes(json.dumps(body).encode())


def test_a_failed_write_leaves_nothing_and_keeps_the_old_bundle(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")

    def fail() -> None:
        with BundleWriter(tmp_path / "b") as writer:
            (writer.folder / "half").write_bytes(b"x")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert Bundle.open(tmp_path / "b").manifest.version == 1


def test_finishing_replaces_the_old_bundle_as_a_whole(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", b"old")
    write_bundle(tmp_path / "b", b"newer")
    assert (tmp_path / "b" / "onnx" / "model.onnx").read_bytes() == b"newer"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_folder_that_is_no_bundle_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(BundleError, match="not a bundle: it is not overwritten"):
        BundleWriter(tmp_path / "home")


def test_a_target_that_was_not_converted_is_named(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    with pytest.raises(BundleError, match="target 'openvino': the bundle holds onnx"):
        bundle.target_folder("openvino")
    assert replace(bundle.manifest, version=2).to_bytes() != bundle.manifest.to_bytes()


def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ 'mine now' }}")
    with pytest.raises(BundleError, match=r"chat_template\.jinja: is not listed"):
        Bundle.open(tmp_path / "b")


def test_a_manifest_must_vouch_for_its_targets_and_its_tokenizer(tmp_path: Path) -> None:
    written = write_bundle(tmp_path / "b")
    files = dict(written.manifest.files)
    for name, problem in (("onnx/model.onnx", "target 'onnx'"), ("tokenizer.json", "tokenizer")):
        (tmp_path / "b" / name).rename(tmp_path / "aside")
        rest = {path: entry for path, entry in files.items() if path != name}
        data = replace(written.manifest, files=rest).to_bytes()
        (tmp_path / "b" / "manifest.json").write_bytes(data)
        with pytest.raises(BundleError, match=problem):
            Bundle.open(tmp_path / "b")
        (tmp_path / "aside").rename(tmp_path / "b" / name)


def test_what_a_killed_writer_left_is_cleaned_up_and_the_old_bundle_put_back(
    tmp_path: Path,
) -> None:
    write_bundle(tmp_path / "b", b"old")
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / "b").rename(tmp_path / f".b.old-{dead.pid}")
    (tmp_path / f".b.partial-{dead.pid}" / "onnx").mkdir(parents=True)
    (tmp_path / f".b.partial-{os.getppid()}").mkdir()
    with BundleWriter(tmp_path / "b"):
        assert (tmp_path / "b" / "onnx" / "model.onnx").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"b", f".b.partial-{os.getppid()}"}


def test_a_failed_write_takes_the_folders_it_made_with_it(tmp_path: Path) -> None:
    def fail() -> None:
        with BundleWriter(tmp_path / "new" / "deep" / "b"):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())
    write_bundle(tmp_path / "new" / "deep" / "b")
    assert Bundle.open(tmp_path / "new" / "deep" / "b").manifest.version == 1


@pytest.mark.parametrize(
    ("keys", "value", "problem"),
    [
        (("architecture", "norm_eps"), 10**400, "norm_eps"),
        (("architecture", "pattern"), [0, 7], "pattern"),
        (("architecture", "kinds"), [], "pattern"),
        (("architecture", "layers"), 10**12, "layers"),
    ],
)
def test_an_architecture_that_no_model_has_is_refused(
    keys: tuple[str, str], value: object, problem: str
) -> None:
    body = json.loads(manifest_of({}).to_bytes())
    body[keys[0]][keys[1]] = value
    with pytest.raises(BundleError, match=problem):
        Manifest.from_bytes(json.dumps(body).encode())


def test_a_file_cannot_be_the_folder_of_another() -> None:
    entry = FileEntry(sha256="00", size_bytes=0)
    data = manifest_of({"onnx/a": entry, "onnx/a/b/c": entry}).to_bytes()
    with pytest.raises(BundleError, match="'onnx/a' is a folder of 'onnx/a/b/c'"):
        Manifest.from_bytes(data)


def test_a_name_that_no_disk_can_hold_is_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    entry = FileEntry(sha256="00", size_bytes=0)
    entries = {"tokenizer.json": entry, "onnx/model.onnx": entry, "a" * 300: entry}
    (tmp_path / "b" / "manifest.json").write_bytes(manifest_of(entries).to_bytes())
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / "b")
