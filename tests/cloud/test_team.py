"""Two processes that run a model together give what one does; see `teamwork` for the models."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path

import numpy as np
import pytest
from teamwork import SETTINGS, WORLD, all_logits, member, models

from tidegate.cloud.gpu_executor import GpuExecutor


@pytest.mark.system
def test_two_processes_give_the_logits_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=member, args=(rank, port, tmp_path)) for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    for name, arch, weights in models():
        alone = all_logits(GpuExecutor(arch, weights, SETTINGS), arch.vocab)
        together = np.load(tmp_path / f"{name.replace('/', ' ')}.npy")
        assert np.allclose(alone, together, atol=2e-5), name
