"""What the cloud runs on, and which settings go with it."""

from __future__ import annotations

import pytest
import torch
from tinymodel import RandomWeights, tiny_architecture

from tidegate.cloud.executor_choice import ExecutorSettings, chosen, gpu_settings, open_executor
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.cloud.torch_executor import TorchExecutor
from tidegate.errors import ConfigError

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is at hand")


@without_gpu
def test_a_machine_without_a_gpu_runs_torch_and_refuses_to_pretend() -> None:
    assert chosen("auto") == chosen("torch") == "torch"
    with pytest.raises(ConfigError, match="executor = 'gpu': must be torch or auto where torch"):
        chosen("gpu")


def test_settings_of_the_other_executor_are_refused_by_name() -> None:
    arch = tiny_architecture()
    settings = ExecutorSettings(choice="torch", kv_precision="int8")
    with pytest.raises(ConfigError, match="kv_precision = 'int8': must be absent on executor"):
        open_executor(arch, RandomWeights(arch), settings)


def test_what_is_left_open_is_the_executors_own_default() -> None:
    assert gpu_settings(ExecutorSettings()) == GpuSettings()
    given = gpu_settings(ExecutorSettings(rows=3, step_tokens=64, kv_precision="fp8"))
    assert (given.rows, given.step_tokens, given.kv_precision) == (3, 64, "fp8")
    arch = tiny_architecture()
    executor = open_executor(arch, RandomWeights(arch), ExecutorSettings(choice="torch", rows=2))
    assert isinstance(executor, TorchExecutor)
    assert executor.limits.step_rows == 2
    assert executor.limits.context_tokens == arch.context
