"""The command line: what goes wrong is one line that names it, exit 1; wrong usage is exit 2."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from services import free_port
from wordmodel import write_word_checkpoint

from tidegate.cli.convert import print_notes
from tidegate.cli.listen import parse_listen, parse_suites, read_hashes
from tidegate.cli.main import COMMANDS, main
from tidegate.errors import ConfigError
from tidegate.link.fleet import pair


@dataclass(frozen=True)
class Failing:
    """Runs a command in this process and wants one error line of it."""

    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object) -> str:
        """The message, without `tidegate: `."""
        assert main([str(one) for one in arguments]) == 1
        told = self.capsys.readouterr()
        assert told.out == ""
        assert told.err.endswith("\n")
        assert told.err.count("\n") == 1, told.err
        prefix, _, message = told.err.strip().partition("tidegate: ")
        assert prefix == ""
        return message


@pytest.fixture
def failing(capsys: pytest.CaptureFixture[str]) -> Failing:
    return Failing(capsys)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_word_checkpoint(tmp_path_factory.mktemp("cli") / "model", context=256)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "bundle"
    assert main(["convert", str(checkpoint), "--out", str(out), "--quiet"]) == 0
    return out


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


# Usage


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sail"],
        ["convert"],
        ["convert", "x", "--out"],
        ["convert", "x", "--out", "y", "--bits", "four"],
        ["serve", "x", "--executor", "abacus"],
        ["serve", "x", "--context", "long"],
        ["serve", "x", "--context-policy", "cut"],
        ["keys"],
        ["chat", "hi", "--privacy", "none"],
        ["demo", "--models"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("usage: tidegate")


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_every_command_explains_itself(
    command: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"] if command is None else [command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: tidegate")
    if command is None:
        assert all(one in shown for one in COMMANDS)
    else:
        assert "Example:" in shown


# Convert


def damage_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "oracle"}))


def shorten_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def damage_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def outgrow_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["beyond"] = 9999
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def ask_for_another_width(folder: Path) -> None:
    change_config(folder, intermediate_size=224)


def ask_for_an_unknown_rotation(folder: Path) -> None:
    change_config(folder, rope_scaling={"rope_type": "spiral", "factor": 2.0})


def weights_of(folder: Path) -> tuple[Path, bytearray, int]:
    """The file with weights, its bytes, and where its header ends."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    return path, data, 8 + int.from_bytes(data[:8], "little")


def hold_nothing_finite(folder: Path) -> None:
    path, data, header = weights_of(folder)
    data[header:] = b"\xff" * (len(data) - header)  # NaN in any of the float types
    path.write_bytes(data)


def hold_whole_numbers(folder: Path) -> None:
    path, data, header = weights_of(folder)
    told = bytes(data[8:header])
    for kind, same_size in ((b'"BF16"', b' "I16"'), (b'"F16"', b'"I16"'), (b'"F32"', b'"I32"')):
        told = told.replace(kind, same_size)
    data[8:header] = told
    path.write_bytes(data)


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (remove_config, "config.json"),
        (damage_config, "model_type = 'oracle'"),
        (remove_weights, "model.safetensors"),
        (shorten_weights, "model.safetensors: is truncated"),
        (empty_weights, "model.safetensors"),
        (remove_tokenizer, "tokenizer.json"),
        (damage_tokenizer, "tokenizer.json: is not JSON"),
        (outgrow_tokenizer, "tokenizer.json: token id 9999"),
        (ask_for_another_width, "_proj.weight: shape"),
        (ask_for_an_unknown_rotation, "rope_type = 'spiral': must be one of"),
        (hold_nothing_finite, "holds numbers that are not finite"),
        (hold_whole_numbers, ".weight: dtype 'I"),
        (lose_a_shard, "model-00001-of-00002.safetensors: cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_nothing_is_written(
    failing: Failing,
    checkpoint: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    named: str,
) -> None:
    damaged = copy(checkpoint, tmp_path / "in" / "model")
    damage(damaged)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "bundle"
    assert named in failing("convert", damaged, "--out", out, "--quiet")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_no_checkpoint_folder_is_named(failing: Failing, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    assert "nowhere" in failing("convert", tmp_path / "nowhere", "--out", out)
    (tmp_path / "empty").mkdir()
    assert "config.json" in failing("convert", tmp_path / "empty", "--out", out)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["empty"]


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("--bits", "3", "bits = 3: must be 4 or 8"),
        ("--group-size", "48", "group-size = 48: must be one of"),
        ("--target", "tflite", "target = 'tflite': must be one of onnx, openvino"),
        ("--target", "", "target = '': must be one of onnx, openvino"),
        ("--context", "0", "context = 0: must be from 1"),
        ("--recipe", "best", "recipe = 'best': must be one of balanced, fast, "),
        ("--recipe=fast", "--bits=4", "bits = 4: must be left out with --recipe"),
        ("--recipe=fast", "--symmetric", "symmetric = True: must be left out with --recipe"),
        ("--target-bpw", "2", "target-bpw = 2.0: must be bits per weight above 4"),
        ("--text", "notes.txt", "text = 'notes.txt': must be left out: no pass of recipe 'rtn'"),
        ("--context", "257", "must be from 1 to the model's 256"),
        ("--measure", "notes.txt", "measure = 'notes.txt': must be a text file"),
        ("--plot", "page.html", "plot = 'page.html': must be left out without --compare"),
        ("--compare", "fast,tiny", "compare = 'fast,tiny': must be given with --measure"),
        ("--lora", "nowhere", "nowhere: is not a folder with an adapter"),
    ],
)
def test_a_wrong_setting_of_a_conversion_is_named(
    failing: Failing, checkpoint: Path, tmp_path: Path, flag: str, value: str, named: str
) -> None:
    out = tmp_path / "bundle"
    assert named in failing("convert", checkpoint, "--out", out, flag, value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bundle_is_never_overwritten(
    failing: Failing, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "sea.jpg").write_bytes(b"sea")
    (tmp_path / "file").write_bytes(b"file")
    for name in ("photos", "file"):
        message = failing("convert", checkpoint, "--out", tmp_path / name)
        assert message.endswith("exists and is not a bundle: it is not overwritten")
    assert (tmp_path / "photos" / "sea.jpg").read_bytes() == b"sea"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "photos"]


def test_a_place_that_cannot_be_written_is_named(
    failing: Failing, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"file")
    message = failing("convert", checkpoint, "--out", tmp_path / "file" / "bundle")
    assert "file: cannot be written" in message
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    try:
        (locked / "probe").mkdir()
        (locked / "probe").rmdir()
    except PermissionError:  # root may write anyway
        assert "locked: cannot be written" in failing(
            "convert", checkpoint, "--out", locked / "bundle"
        )
    assert list(locked.iterdir()) == []


def test_the_folder_one_stands_in_is_no_place_for_a_bundle(
    failing: Failing, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert failing("convert", checkpoint, "--out", ".", "--quiet")
    assert [one.name for one in tmp_path.rglob("*")] == ["here"]


def test_a_conversion_tells_people_on_one_stream_and_programs_on_the_other(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    arguments = ["convert", str(checkpoint), "--out", str(out), "--target", "openvino", "--json"]
    assert main(arguments) == 0
    told = capsys.readouterr()
    facts = json.loads(told.out)
    assert told.err == ""
    assert (facts["targets"].keys(), facts["version"]) == ({"openvino"}, 1)
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts
    assert main(["inspect", str(out)]) == 0
    assert "256 tokens" in capsys.readouterr().out
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["version"] == 2
    assert [one.name for one in tmp_path.iterdir()] == ["bundle"]


def test_what_passes_could_not_do_is_printed_once_with_the_weights_it_is_about(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_notes({f"layers.{layer}.q": "awq: is flat" for layer in range(5)})
    told = capsys.readouterr().out
    assert told == "  notes       layers.0.q, layers.1.q, layers.2.q and 2 more: awq: is flat\n"


# Bundles


def change_a_byte(folder: Path) -> None:
    model = folder / "openvino" / "model.bin"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)


def remove_a_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def link_a_file(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder.parent / "outside.json")
    (folder / "tokenizer.json").symlink_to("../outside.json")


def come_from_the_future(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("command", ["inspect", "serve"])
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (change_a_byte, "openvino/model.bin: was changed"),
        (remove_a_file, "tokenizer.json: is missing"),
        (link_a_file, "tokenizer.json: is a link"),
        (come_from_the_future, "manifest.json: schema_version = 99"),
        (lose_the_manifest, "is not a bundle: it has no manifest.json"),
    ],
)
def test_a_damaged_bundle_is_named(
    failing: Failing,
    bundle: Path,
    tmp_path: Path,
    command: str,
    damage: Callable[[Path], None],
    named: str,
) -> None:
    damaged = copy(bundle, tmp_path / "bundle")
    damage(damaged)
    assert named in failing(command, damaged)


# Services


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--listen", "nowhere"], "listen = 'nowhere': must be HOST:PORT"),
        (["--listen", "127.0.0.1:65536"], "listen = "),
        (["--listen", "192.0.2.7:0"], "listen = '192.0.2.7': must be"),
        (["--rows", "0"], "rows = 0: must be at least 1"),
        (["--queue", "0"], "queue_limit = 0: must be at least 1"),
        (["--context", "0"], "context_tokens = 0: must be at least 1"),
        (["--context", "-5"], "context_tokens = -5: must be at least 1"),
        (["--context", "257"], "context_tokens = 257: must be at most the bundle's 256"),
        (["--threads", "0"], "threads = 0: must be at least 1"),
        (["--link", "mqtt://secret:word@127.0.0.1:1"], "keys = None: must be"),
        (["--keys", "somewhere"], "link = None: must be"),
        (["--link", "mqtt://127.0.0.1:1", "--keys", "nowhere"], "nowhere/device.json: cannot"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_of_a_device_is_named(
    failing: Failing,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    message = failing("serve", bundle, "--executor", "onnx", *flags)
    assert list(tmp_path.iterdir()) == []
    assert named in message
    assert "word" not in message


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--rows", "0"], "slots = 0: must be at least 1"),
        (["--context", "0"], "context_tokens = 0: must be at least 1"),
        (["--context", "257"], "context_tokens = 257: must be at most 256"),
        (["--threads", "0"], "threads = 0: must be at least 1"),
        (["--executor", "torch", "--memory-mib", "9"], "memory_mib = 9: must be absent on"),
        (["--executor", "torch", "--kv-precision", "fp8"], "kv_precision = 'fp8': must be absent"),
        (["--tensor-parallel", "0"], "tensor_parallel = 0: must be at least 1, or absent"),
        (["--tensor-parallel", "3"], "tensor_parallel = 3: must be a divisor of the model's heads"),
        (["--tensor-parallel", "2", "--threads", "0"], "threads = 0: must be at least 1"),
        (["--trust", "/nowhere.pub"], "/nowhere.pub"),
        (["--api-key-file", "/nowhere"], "api-key-file = '/nowhere': must be"),
        (["--link", "mqtt://127.0.0.1:1"], "keys = None: must be"),
        (["--link", "mqtt://127.0.0.1:1", "--keys", "nowhere"], "nowhere/gateway.json: cannot"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_of_a_cloud_is_named(
    failing: Failing,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named in failing("cloud", checkpoint, "--listen", "127.0.0.1:0", *flags)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_without_the_wanted_executor_says_what_it_holds(
    failing: Failing, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert main(["convert", str(checkpoint), "--out", str(out), "--target", "openvino"]) == 0
    capsys.readouterr()
    message = failing("serve", out, "--executor", "onnx", "--listen", "127.0.0.1:0")
    assert "target 'onnx': the bundle holds openvino" in message


def test_nothing_that_listens_is_one_line(failing: Failing) -> None:
    port = free_port()
    message = failing("chat", "hello", "--wait", "0", "--url", f"http://127.0.0.1:{port}")
    assert "cannot be reached" in message
    assert "nonsense" in failing("chat", "hello", "--url", "nonsense")


def test_a_broker_never_announces_a_port_that_it_has_not(failing: Failing) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in failing("broker", "--listen", f"127.0.0.1:{port}")
    assert "loopback" in failing("broker", "--listen", "0.0.0.0:1883")


def test_a_demo_without_models_says_which_it_wants(failing: Failing, tmp_path: Path) -> None:
    assert "edge/config.json" in failing("demo", "--models", tmp_path)


# Keys and addresses


def test_a_pair_of_keys_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["keys", "pair", str(tmp_path / "device"), str(tmp_path / "gateway")]
    assert main(arguments) == 0
    made = {path: path.read_bytes() for path in tmp_path.rglob("*.key")}
    assert {path.name for path in made} >= {"device.key", "gateway.key", "root.key"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in made)
    assert main(arguments) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.key")} == made
    assert capsys.readouterr().out == ""


def test_keys_that_cannot_be_written_are_one_line(failing: Failing, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert str(tmp_path / "file") in failing(
        "keys", "pair", tmp_path / "file" / "device", tmp_path / "gateway"
    )


def test_an_api_key_is_shown_once_and_only_its_hash_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "api"]) == 0
    told = capsys.readouterr()
    key = told.err.split()[-1]
    assert key not in told.out
    (tmp_path / "keys.txt").write_text(f"# friends\n\n{told.out.strip()} of the phone\n")
    assert read_hashes(tmp_path / "keys.txt") == (told.out.strip(),)


@pytest.mark.parametrize("content", ["", "\n\n", "# none yet\n", "  # none yet\n"])
def test_a_key_file_without_a_key_does_not_open_the_cloud_to_all(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "keys.txt").write_text(content)
    with pytest.raises(ConfigError, match="at least one hash"):
        read_hashes(tmp_path / "keys.txt")


def test_addresses_are_read_as_people_write_them() -> None:
    assert parse_listen("127.0.0.1:8080") == ("127.0.0.1", 8080)
    assert parse_listen("[::1]:0") == ("::1", 0)
    assert parse_listen(":80") == ("127.0.0.1", 80)
    for wrong in ("", "8080", "host:", "host:x", "host:-1", "host:99999", "host:\u0661"):
        with pytest.raises(ConfigError, match="HOST:PORT"):
            parse_listen(wrong)


def test_suites_are_read_as_numbers_in_their_order() -> None:
    assert parse_suites("2,1") == (2, 1)
    assert parse_suites("1") == (1,)
    for wrong in ("", "3", "1,1", "x", "2;1", "-1", "\u0661"):
        with pytest.raises(ConfigError, match=r"link\.suites.*2 \(MLKEM768-X25519\)"):
            parse_suites(wrong)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1883", "mqtt+tls://me:word@127.0.0.1:8883", "a"])
def test_a_link_of_another_scheme_is_refused_instead_of_spoken_in_clear(
    failing: Failing, bundle: Path, tmp_path: Path, url: str
) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")
    message = failing("serve", bundle, "--link", url, "--keys", tmp_path / "device")
    assert "must be mqtt://host[:port] or mqtts://host[:port]" in message
    assert "word" not in message


def test_a_signed_and_packed_bundle_is_installed_only_where_its_key_is_trusted(
    bundle: Path, tmp_path: Path, failing: Failing, capsys: pytest.CaptureFixture[str]
) -> None:
    own, archive, maker = copy(bundle, tmp_path / "own"), tmp_path / "b.tar.zst", tmp_path / "maker"
    assert main(["keys", "signing", str(maker)]) == 0
    assert main(["keys", "signing", str(tmp_path / "other")]) == 0
    assert main(["bundle", "sign", str(own), "--key", f"{maker}.key"]) == 0
    assert main(["bundle", "pack", str(own), str(archive), "--quiet"]) == 0
    trusting = ["--trust", f"{maker}.pub"]
    assert main(["bundle", "unpack", str(archive), str(tmp_path / "in"), "--quiet", *trusting]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "in"), *trusting]) == 0
    assert f"signed by   {Path(f'{maker}.pub').read_text().strip()}" in capsys.readouterr().out
    assert main(["inspect", str(bundle)]) == 0
    assert "signed by   nobody" in capsys.readouterr().out
    other = ["--trust", f"{tmp_path / 'other'}.pub"]
    told = failing("bundle", "unpack", archive, tmp_path / "x", "--quiet", *other)
    assert "not trusted" in told
    assert "signature: is missing" in failing("inspect", bundle, *trusting)
    assert "a key is not replaced" in failing("keys", "signing", maker)
    Path(f"{maker}.key").unlink()
    assert "a key is not replaced" in failing("keys", "signing", maker)
    nowhere = tmp_path / "nowhere" / "b.tar.zst"
    assert "in a folder that exists" in failing("bundle", "pack", own, nowhere)
