"""A team as a service opens it: again after it was closed, one at a time, and with its refusals."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from services import until
from tinymodel import RandomWeights, tiny_architecture

from tidegate.cloud import crew
from tidegate.cloud.executor_choice import ExecutorSettings, Watched, open_executor
from tidegate.cloud.model_source import Origin, open_source
from tidegate.cloud.tensor_parallel import LeadingExecutor, member_settings
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.errors import ConfigError, ExecutionError, TeamError, UnavailableError

SETTINGS = ExecutorSettings(
    choice="torch", tensor_parallel=2, rows=2, context_tokens=64, step_tokens=64, threads=1
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch = tiny_architecture()
    return write_checkpoint(tmp_path_factory.mktemp("m") / "in", arch, RandomWeights(arch))


def opened(folder: Path, origin: Origin | None = None) -> LeadingExecutor:
    with open_source(folder) as source:
        executor = open_executor(
            source.arch, source.weights, SETTINGS, origin=origin or source.origin
        )
    assert isinstance(executor, LeadingExecutor)
    assert isinstance(executor, Watched)
    return executor


def gone(pids: tuple[int, ...]) -> bool:
    return not any(Path(f"/proc/{pid}/exe").exists() for pid in pids)


STEP = ExecutorStep(
    rows=(Row(tokens=np.arange(9), past=0, blocks=np.arange(4, dtype=np.int32), logits=2),)
)


@pytest.mark.system
def test_a_team_can_be_made_again_but_not_beside_another(checkpoint: Path) -> None:
    found = []
    for _ in range(2):
        executor = opened(checkpoint)
        with pytest.raises(ConfigError, match="while another model of this service is split"):
            opened(checkpoint)
        found.append(executor.execute(STEP).logits)
        pids = executor.crew_pids
        executor.close()
        assert gone(pids)
    assert np.array_equal(found[0], found[1])


@pytest.mark.system
def test_what_another_process_cannot_open_is_told_before_anybody_waits(checkpoint: Path) -> None:
    problem = r"rank 1 of the 2 processes .*nowhere: is not a folder with a checkpoint"
    with pytest.raises(UnavailableError, match=problem):
        opened(checkpoint, Origin(folder=Path("nowhere"), digest=""))
    opened(checkpoint).close()


@pytest.mark.system
def test_a_step_that_fails_in_the_first_process_ends_the_team(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "LAST_WORDS_S", 600.0)  # this process goes on
    executor = opened(checkpoint)
    pids = executor.crew_pids
    (row,) = STEP.rows
    # More logits than there is room for: found out within the step, by whoever comes to it first.
    with pytest.raises(ExecutionError):
        executor.execute(ExecutorStep(rows=(replace(row, logits=9),)))
    until(lambda: gone(pids), "the others end")
    problem = r"(rank 1 .*|a step in the first process) failed: .*needs"
    with pytest.raises(ExecutionError, match=problem):
        executor.execute(STEP)
    with pytest.raises(TeamError) as raised:
        asyncio.run(executor.watch())
    assert raised.value.exit_status == 70
    executor.close()


def test_what_cannot_be_read_by_others_cannot_be_split(checkpoint: Path) -> None:
    arch = tiny_architecture()
    with pytest.raises(ConfigError, match=r"tensor_parallel = 2: must be absent where"):
        open_executor(arch, RandomWeights(arch), SETTINGS)


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = tiny_architecture()
    mine = member_settings(SETTINGS, arch, rank=1)
    assert (mine.device, mine.activations, mine.kv_tokens, mine.graphs) == (
        "cpu",
        "fp32",
        128,
        False,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    on_gpu = replace(SETTINGS, choice="gpu", threads=None)
    assert [member_settings(on_gpu, arch, rank=rank).device for rank in (0, 1)] == [
        "cuda:0",
        "cuda:1",
    ]
    with pytest.raises(ConfigError, match="tensor_parallel = 4: must be at most 2, the GPUs here"):
        member_settings(replace(on_gpu, tensor_parallel=4), arch, rank=0)


def test_more_than_two_sum_in_no_fixed_order(checkpoint: Path) -> None:
    four = replace(SETTINGS, tensor_parallel=4, deterministic=True)
    with (
        open_source(checkpoint) as source,
        pytest.raises(ConfigError, match="tensor_parallel = 4: must be at most 2 in deterministic"),
    ):
        open_executor(source.arch, source.weights, four, origin=source.origin)


@pytest.mark.gpu
def test_two_gpus_choose_what_one_chooses(checkpoint: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    found = []
    for world in (1, 2):
        settings = ExecutorSettings(
            choice="gpu",
            tensor_parallel=world,
            rows=2,
            context_tokens=64,
            step_tokens=64,
            memory_mib=2048,
            activations="fp32",
        )
        with open_source(checkpoint) as source:
            executor = open_executor(source.arch, source.weights, settings, origin=source.origin)
        past, logits = 9, [executor.execute(STEP).logits]
        for _ in range(3):  # met plainly, recorded, replayed
            row = replace(STEP.rows[0], tokens=np.array([past]), past=past, logits=1)
            logits.append(executor.execute(ExecutorStep(rows=(row,))).logits)
            past += 1
        executor.close()
        found.append(np.concatenate(logits))
    assert np.allclose(found[0], found[1], atol=1e-3)


def test_threads_are_no_setting_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="threads = 1: must be absent on executor gpu"):
        member_settings(replace(SETTINGS, choice="gpu"), tiny_architecture(), rank=0)
