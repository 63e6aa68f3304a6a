"""The worked example of `docs/architectures.md`, followed to the letter."""

from __future__ import annotations

import filecmp
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from everylogit import reference_logits
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import make_recipe
from tidegate.errors import CheckpointError
from tidegate.model import architectures
from tidegate.model.architecture import Architecture
from tidegate.model.bundle import Bundle
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.registry import describe, known_model_types

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
PACKAGE = Path(architectures.__path__[0])
CONFIG: dict[str, object] = {
    "model_type": "kestrel",
    "vocab_size": 203,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "sliding_window": 6,
    "logit_divisor": 2.0,
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package of architectures, imported from in its stead, with the new file."""
    copy = tmp_path / "architectures"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (copy / "kestrel.py").write_text(example)
    monkeypatch.setattr(architectures, "__path__", [str(copy)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield copy
    sys.modules.pop("tidegate.model.architectures.kestrel", None)


@pytest.fixture
def checkpoint(tmp_path: Path, package: Path) -> Path:
    arch = describe(CONFIG)
    assert isinstance(arch, Architecture)
    folder = write_checkpoint(tmp_path / "checkpoint", arch, RandomWeights(arch))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_one_file_is_added_and_none_is_changed(package: Path) -> None:
    both = filecmp.dircmp(PACKAGE, package, ignore=["__pycache__"])
    assert both.right_only == ["kestrel.py"]
    assert both.left_only == both.diff_files == both.funny_files == []
    assert "kestrel" in known_model_types()


def test_the_example_says_how_it_differs_from_llama(package: Path) -> None:
    arch = describe(CONFIG)
    assert isinstance(arch, Architecture)
    assert [arch.attention(layer).window for layer in range(4)] == [None, 6, None, 6]
    assert (arch.qk_norm, arch.head_scale, arch.tied_head) == ("head", 0.5, True)
    with pytest.raises(CheckpointError, match="parallel_residual = True: must be false"):
        describe(CONFIG | {"parallel_residual": True})


def test_its_checkpoint_is_read_and_walked(checkpoint: Path) -> None:
    tokens = np.arange(5, 45, dtype=np.int64)
    with Checkpoint.open(checkpoint) as opened:
        arch = opened.decoder
        found = reference_logits(arch, opened.weights(), tokens)
    expected = reference_logits(arch, RandomWeights(arch), tokens)
    # Weights were rounded to bfloat16 on their way; a Llama of the same numbers is far off.
    assert np.abs(found - expected).mean() < 0.1 * expected.std()
    llama = tiny_architecture(layers=4)
    assert np.abs(reference_logits(llama, RandomWeights(llama), tokens) - expected).mean() > 1


def test_its_checkpoint_converts_for_both_runtimes(tmp_path: Path, checkpoint: Path) -> None:
    recipe = make_recipe(bits=4, group_size=32, symmetric=False)
    plan = ConversionPlan(
        model_id="kestrel", targets=("onnx", "openvino"), recipe=recipe, context_tokens=None
    )
    convert(checkpoint, tmp_path / "bundle", plan)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.architecture.model_type == "kestrel"
    assert manifest.targets == ("onnx", "openvino")
