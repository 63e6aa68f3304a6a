"""What the cloud opens: checkpoints and bundles, whose signatures and targets are looked at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import byte_tokenizer, write_checkpoint
from encodercheckpoints import EMBEDDING, write_encoder
from tinymodel import RandomWeights, tiny_architecture

from tidegate.cloud.gpu_executor import GpuExecutor
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.cloud.model_source import open_again, open_source
from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import RecipeWeights, make_recipe
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.errors import BundleError, CheckpointError, ConfigError
from tidegate.model.bundle import Bundle, replace_manifest
from tidegate.model.manifest import Target
from tidegate.model.packed import dense_weight
from tidegate.model.signature import SigningKey

RECIPE = make_recipe(bits=4, group_size=32, symmetric=False)
SETTINGS = GpuSettings(
    rows=2, context_tokens=64, step_tokens=64, kv_tokens=128, activations="fp32", device="cpu"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch = tiny_architecture()
    return write_checkpoint(tmp_path_factory.mktemp("m") / "in", arch, RandomWeights(arch))


def converted(checkpoint: Path, out: Path, *targets: Target) -> Bundle:
    return convert(checkpoint, out, ConversionPlan(model_id="m", targets=targets, recipe=RECIPE))


def test_a_bundle_runs_on_the_paged_executor_as_the_integers_it_holds(
    checkpoint: Path, tmp_path: Path
) -> None:
    converted(checkpoint, tmp_path / "b", "packed")
    row = Row(tokens=np.arange(9), past=0, blocks=np.arange(4, dtype=np.int32), logits=4)
    step, found = ExecutorStep(rows=(row,)), []
    with open_source(tmp_path / "b") as bundle, open_source(checkpoint) as source:
        assert bundle.arch == source.arch
        for weights in (bundle.weights, RecipeWeights(source.weights, RECIPE)):
            executor = GpuExecutor(bundle.arch, weights, SETTINGS)
            found.append(executor.execute(step).logits)
            executor.close()
        texts = [one.text(context_tokens=64) for one in (bundle, source)]
    assert np.array_equal(found[0], found[1])
    assert texts[0].encode_prompt("the pump is on") == texts[1].encode_prompt("the pump is on")


def test_a_bundle_for_devices_says_what_it_lacks(checkpoint: Path, tmp_path: Path) -> None:
    converted(checkpoint, tmp_path / "b", "onnx")
    problem = r"holds onnx, for devices: the cloud runs what `tidegate convert --target packed`"
    with pytest.raises(BundleError, match=problem), open_source(tmp_path / "b"):
        pass


def test_only_what_a_trusted_key_signed_is_opened(checkpoint: Path, tmp_path: Path) -> None:
    made = converted(checkpoint, tmp_path / "b", "packed")
    keys = [SigningKey.generate() for _ in range(2)]
    trusted = frozenset({keys[0].public})
    with pytest.raises(BundleError, match="signature"), open_source(made.folder, trusted=trusted):
        pass
    for key in reversed(keys):
        made = replace_manifest(made, key.sign(made.manifest))
        if key is keys[1]:
            with pytest.raises(BundleError), open_source(made.folder, trusted=trusted):
                pass
    with open_source(made.folder, trusted=trusted) as source:
        assert source.arch == tiny_architecture()
    with pytest.raises(ConfigError, match="trust = "), open_source(checkpoint, trusted=trusted):
        pass


def test_another_format_of_the_target_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    made = converted(checkpoint, tmp_path / "b", "packed")
    replace_manifest(made, replace(made.manifest, toolchain={"packed": "2"}))
    with pytest.raises(BundleError, match=r"toolchain\.packed = '2'"), open_source(made.folder):
        pass


def test_a_changed_byte_is_seen_before_anything_is_parsed(checkpoint: Path, tmp_path: Path) -> None:
    made = converted(checkpoint, tmp_path / "b", "packed")
    path = made.folder / "packed/layers.0.safetensors"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    problem = r"packed/layers\.0\.safetensors: was changed"
    with pytest.raises(BundleError, match=problem), open_source(made.folder):
        pass


def exchange(folder: Path, other: Path) -> None:
    """Put another model where one is, as an update does."""
    folder.rename(folder.with_name("before"))
    other.rename(folder)


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """A checkpoint with the same headers as the first one's and other numbers."""
    arch = tiny_architecture()
    return write_checkpoint(tmp_path / "others", arch, RandomWeights(arch, seed=9))


def test_another_process_opens_the_same_bundle_or_none(
    checkpoint: Path, others: Path, tmp_path: Path
) -> None:
    one, two = (
        converted(each, tmp_path / name, "packed").folder
        for name, each in (("b", checkpoint), ("c", others))
    )
    with open_source(one) as source:
        with open_again(source.origin) as again:
            assert again.arch == source.arch
        roles = ("embed", "layers.0.o", "layers.1.q")
        kept = [dense_weight(source.weights.linear(role)) for role in roles]
        exchange(one, two)
        # What is open goes on being read.
        for role, weight in zip(roles, kept, strict=True):
            assert np.array_equal(dense_weight(source.weights.linear(role)), weight)
        problem = r"model = '.*': must be left alone while it is loaded: it was exchanged"
        with pytest.raises(ConfigError, match=problem), open_again(source.origin):
            pass


def test_another_process_opens_the_same_checkpoint_or_none(others: Path, tmp_path: Path) -> None:
    arch = tiny_architecture()
    folder = write_checkpoint(tmp_path / "in", arch, RandomWeights(arch))
    with open_source(folder) as source:
        with open_again(source.origin):
            pass
        exchange(folder, others)
        with pytest.raises(ConfigError, match="it was exchanged"), open_again(source.origin):
            pass


def test_what_takes_the_place_of_verified_files_is_not_opened(
    checkpoint: Path, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = converted(checkpoint, tmp_path / "b", "packed").folder
    following = converted(others, tmp_path / "c", "packed").folder
    verified = Bundle.target_folder

    def exchanged(self: Bundle, target: str) -> Path:
        found = verified(self, target)
        exchange(folder, following)
        return found

    monkeypatch.setattr(Bundle, "target_folder", exchanged)
    problem = r"packed/.*\.safetensors: was exchanged while the bundle was opened"
    with pytest.raises(BundleError, match=problem), open_source(folder):
        pass


def test_an_encoder_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "in", "bert", EMBEDDING)
    byte_tokenizer(203).save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="is an encoder"), open_source(folder):
        pass
    converted(folder, tmp_path / "b", "packed")
    with pytest.raises(BundleError, match="is an encoder"), open_source(tmp_path / "b"):
        pass
