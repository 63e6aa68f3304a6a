"""What a model will take, from its config alone, against what its executor then allocates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from tinymodel import RandomWeights, tiny_architecture

from tidegate.cloud.executor_choice import ExecutorSettings
from tidegate.cloud.host_memory import available_bytes
from tidegate.cloud.language_model import LanguageModels, version_of
from tidegate.cloud.model_memory import torch_memory, weight_values
from tidegate.cloud.model_settings import ModelSettings
from tidegate.cloud.torch_executor import TorchExecutor, TorchSettings
from tidegate.errors import ConfigError

TORCH = ExecutorSettings(choice="torch", rows=3, context_tokens=64, step_tokens=32)


@pytest.mark.parametrize("tied_head", [True, False])
def test_weights_and_kv_are_those_that_the_executor_allocates(tied_head: bool) -> None:
    arch = tiny_architecture(tied_head=tied_head)
    settings = TorchSettings(slots=3, context_tokens=64, step_tokens=32)
    executor = TorchExecutor(arch, RandomWeights(arch), settings)
    held = [tensor for _, *pair in executor._tensors._tensors.values() for tensor in pair]
    linear = sum(one.nbytes for one in held if isinstance(one, torch.Tensor))
    norms = sum(vector.nbytes for vector in executor._weights._vectors.values())
    kv = sum(one.nbytes for one in (*executor._kv.keys, *executor._kv.values))
    assert weight_values(arch) * 4 == linear + norms
    found = torch_memory(arch, TORCH).parts
    assert [part.nbytes for part in found[:2]] == [linear + norms, kv]
    assert found[1].name == "KV, 3 x 64 tokens, float32"
    executor.close()
    assert not executor._tensors._tensors
    assert not executor._weights._linears


def test_scratch_grows_with_what_a_step_may_hold() -> None:
    arch = tiny_architecture()
    small = torch_memory(arch, TORCH).parts[-1].nbytes
    wide = ExecutorSettings(choice="torch", rows=3, context_tokens=64, step_tokens=64)
    assert torch_memory(arch, wide).parts[-1].nbytes > small


def test_a_checkpoint_is_described_without_reading_its_weights(tmp_path: Path) -> None:
    arch = tiny_architecture()
    folder = write_checkpoint(tmp_path / "m", arch, RandomWeights(arch))
    settings = ModelSettings(name="m", path=folder, executor=TORCH)
    facts = LanguageModels().describe(settings)
    assert (facts.context_tokens, facts.place) == (64, "host")
    assert facts.memory == torch_memory(arch, TORCH)
    assert LanguageModels().describe(settings) == facts
    (folder / "config.json").touch()
    assert LanguageModels().describe(settings).version != facts.version
    long = ModelSettings(name="m", path=folder, executor=ExecutorSettings(context_tokens=512))
    with pytest.raises(ConfigError, match="context_tokens = 512: must be at most 256"):
        LanguageModels().describe(long)


def test_a_version_changes_with_settings_and_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    first = version_of(tmp_path, 1)
    assert version_of(tmp_path, 1) == first != version_of(tmp_path, 2)
    (tmp_path / "b").write_text("x")
    assert version_of(tmp_path, 1) != first


def test_available_memory_is_the_machines_or_the_groups_whichever_is_less(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2000 kB\n")
    assert available_bytes(tmp_path) == 2000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000\n")
    (group / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) == 2000 * 1024
    (group / "memory.max").write_text("50000\n")
    assert available_bytes(tmp_path) == 49000
