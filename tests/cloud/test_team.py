"""Two processes that run a model together give what one does; see `teamwork` for the models."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from teamwork import SETTINGS, WORLD, all_logits, fed_tokens, idle_member, member, models

from tidegate.cloud.gpu_executor import GpuExecutor


def run_team(target: Callable[..., None], meeting: Path, *arguments: object) -> None:
    """Run every process of a team to its end, which must be a good one."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=target, args=(rank, meeting, *arguments)) for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * WORLD


@pytest.mark.system
def test_two_processes_give_the_logits_of_one(tmp_path: Path) -> None:
    run_team(member, tmp_path / "meeting", tmp_path)
    for name, arch, weights in models():
        alone = GpuExecutor(arch, weights, SETTINGS)
        together = np.load(tmp_path / f"{name.replace('/', ' ')}.npy")
        assert np.allclose(all_logits(alone, arch.vocab), together, atol=2e-5), name
        fed = np.load(tmp_path / f"{name.replace('/', ' ')} fed.npy")
        assert np.array_equal(fed_tokens(alone, arch.vocab), fed), name


@pytest.mark.system
def test_a_team_waits_longer_for_a_step_than_for_an_exchange(tmp_path: Path) -> None:
    run_team(idle_member, tmp_path / "meeting")
