"""One model over several devices, as a service starts it: this process leads, others follow.

Every process reads its own part of the weights from the same files. The first one has the engine,
plans and samples; the others run the steps that they are told.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import distributed

from tidegate.cloud.crew import Crew, Say
from tidegate.cloud.executor_choice import (
    ExecutorSettings,
    chosen,
    gpu_settings,
    only_without,
    torch_settings,
)
from tidegate.cloud.gpu_executor import GpuExecutor
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.cloud.model_source import Origin, open_again
from tidegate.cloud.sharding import SETTING, Part, shard
from tidegate.cloud.team import Team, abandon
from tidegate.engine.executor import Row
from tidegate.engine.sampling import Draw
from tidegate.errors import ConfigError, ExecutionError, TeamError
from tidegate.model.architecture import Architecture
from tidegate.model.walk import Weights

_log = logging.getLogger(__name__)


class LeadingExecutor(GpuExecutor):
    """The executor of a team's first process, which starts the others before and ends them after.

    A step that fails here leaves the others within it, so it is the end of the team.
    """

    def __init__(
        self, arch: Architecture, weights: Weights, settings: GpuSettings, team: Team, crew: Crew
    ) -> None:
        """Load this process's part, while the others load theirs."""
        self._crew, self._leading = crew, team
        super().__init__(arch, weights, settings, team=team)

    async def watch(self) -> None:
        """See `Watched`."""
        await self._crew.watch()

    @property
    def crew_pids(self) -> tuple[int, ...]:
        """Of the other processes."""
        return self._crew.pids

    def close(self) -> None:
        """See `Executor.close`."""
        if self._crew.failure is None:
            self._crew.dismissed()
            try:
                super().close()
                self._leading.leave()
            except RuntimeError as error:
                _log.warning("the processes of the model did not part orderly: %s", error)
        # Before the crew is closed: until then this process ends if leaving takes too long.
        abandon()
        self._crew.close()

    def _run(self, rows: Sequence[Row], draws: Sequence[Draw | None] | None) -> None:
        if self._crew.failure is not None:
            raise ExecutionError(str(self._crew.failure))
        try:
            super()._run(rows, draws)
        except Exception as error:
            # The death of another shows here first; who died says why.
            if self._crew.explain(error) is error:
                self._crew.fail(TeamError(f"a step in the first process failed: {error}"))
            raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Following:
    """What the other processes need to know."""

    origin: Origin
    settings: ExecutorSettings


def open_team(
    arch: Architecture, weights: Weights, settings: ExecutorSettings, origin: Origin
) -> LeadingExecutor:
    """Start the other processes and load the model into all of them.

    Raises:
        ConfigError: the model cannot be split so, or there are too few devices.
        TidegateError: another process could not load its part; what it said.
    """
    world = settings.tensor_parallel
    assert world is not None, "who wants no team needs none"
    if distributed.is_initialized():
        allowed = "absent while another model of this service is split: unload that one first"
        raise ConfigError(SETTING, world, allowed)
    if settings.deterministic and world > 2:
        # Two numbers have one sum; of more, the order follows the size of what is summed.
        raise ConfigError(SETTING, world, "at most 2 in deterministic mode")
    shard(arch, world)  # refuses what cannot be split before anything is started
    mine = member_settings(settings, arch, rank=0)
    crew = Crew(world, partial(follow, Following(origin=origin, settings=settings)))
    try:
        crew.wait(1)  # what is refused before they meet leaves nobody waiting
        team = _join(0, settings, crew.meeting, arch, mine)
        executor = LeadingExecutor(arch, weights, mine, team, crew)
        said = [_memory(0, executor), *crew.wait(2)]
    except BaseException as error:
        explained = error
        if isinstance(error, Exception) and not isinstance(error, ConfigError):
            explained = crew.explain(error)
        abandon()
        crew.close()
        if explained is error:
            raise
        raise explained from error
    for text in said:
        _log.info("%s", text)
    return executor


def follow(what: Following, rank: int, meeting: Path, say: Say) -> None:
    """Run as another process of the team, until the first one is done."""
    with open_again(what.origin) as source:
        mine = member_settings(what.settings, source.arch, rank=rank)
        say("opened")
        team = _join(rank, what.settings, meeting, source.arch, mine)
        executor = GpuExecutor(source.arch, source.weights, mine, team=team)
    say(_memory(rank, executor))
    executor.follow()
    executor.close()
    team.leave()


def member_settings(settings: ExecutorSettings, arch: Architecture, *, rank: int) -> GpuSettings:
    """What a process of the team runs its part with.

    On a machine without GPUs it is the paged executor on torch, in float32: for tests, and for
    models that are larger than one process may be.

    Raises:
        ConfigError: there are fewer GPUs than processes, or GPUs do not have a setting.
    """
    if chosen(settings.choice) == "gpu":
        found = torch.cuda.device_count()
        if found < (settings.tensor_parallel or 1):
            raise ConfigError(SETTING, settings.tensor_parallel, f"at most {found}, the GPUs here")
        only_without(settings, "gpu", ("threads",))
        return replace(gpu_settings(settings), device=f"cuda:{rank}")
    plain = torch_settings(settings, arch)
    return replace(
        gpu_settings(settings),
        rows=plain.slots,
        step_tokens=max(plain.step_tokens, plain.slots),
        kv_tokens=plain.slots * plain.context_tokens,
        activations=settings.activations or "fp32",
        graphs=False,
        device="cpu",
    )


def _join(
    rank: int, wanted: ExecutorSettings, meeting: Path, arch: Architecture, settings: GpuSettings
) -> Team:
    # Triton's default changes with 3.10, and 3.9 warns as long as nothing is said.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if wanted.threads is not None:
        torch.set_num_threads(wanted.threads)
    part = Part(rank=rank, world=wanted.tensor_parallel or 1)
    return Team(part, meeting, vocab=arch.vocab, device=torch.device(settings.device))


def _memory(rank: int, executor: GpuExecutor) -> str:
    """For people: where a process runs, and what it takes there."""
    return f"rank {rank} on {executor.settings.device} takes\n{executor.memory.lines()}"
