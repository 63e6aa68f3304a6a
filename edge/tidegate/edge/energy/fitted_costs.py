"""`[[cost]]` of a calibration file: which model it is of, and the cost model it makes.

A model is known by the files that an executor runs, so that a bundle that was evaluated or signed
since stays the one that was measured, and one that was converted anew does not. A file may be
copied with a whole disk: costs name the device and all settings that they are of, and count for no
other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tidegate.edge.energy.cost import CostModel, ModeCost
from tidegate.edge.energy.profile import FittedCosts, FittedMode
from tidegate.edge.machine import read_machine
from tidegate.model.manifest import DeviceTarget, Manifest

if TYPE_CHECKING:
    from tidegate.edge.executors.choice import ExecutorSettings

TRUSTED: Final = 0.3
"""Median relative error at points left out, up to which a calibration counts: what other programs
leave of one (benchmarks/results/energy-calibration.json has 5 % at most)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What costs are of besides rows and power modes."""

    weights: str
    executor: str
    device: str
    threads: int | None
    kv_precision: str | None
    native: str
    providers: tuple[str, ...]


def this_device() -> str:
    """Its processor, and the cores that this process may use."""
    machine = read_machine()
    return f"{machine.processor}, {machine.cores} cores"


def setup_of(manifest: Manifest, executor: DeviceTarget, runs: ExecutorSettings) -> Setup:
    """Of a model that runs on this device."""
    return Setup(
        weights=weights_digest(manifest, executor),
        executor=executor,
        device=this_device(),
        threads=runs.threads,
        kv_precision=runs.kv_precision,
        native=runs.native,
        providers=runs.providers,
    )


def weights_digest(manifest: Manifest, executor: DeviceTarget) -> str:
    """16 hexadecimal digits of all files that `executor` runs."""
    files = sorted(manifest.files.items())
    lines = [f"{name} {one.sha256}" for name, one in files if name.startswith(f"{executor}/")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def find_fitted(
    fitted: Sequence[FittedCosts], setup: Setup, *, modes: Sequence[str], rows: int
) -> FittedCosts | None:
    """The first that is of this setup and these modes, with at least so many rows."""
    for one in fitted:
        named = {mode.name for mode in one.mode}
        if is_of(one, setup) and one.rows >= rows and named.issuperset(modes):
            return one
    return None


def is_of(fitted: FittedCosts, setup: Setup) -> bool:
    """Whether the costs are of that setup."""
    return all(getattr(fitted, name) == getattr(setup, name) for name in Setup.__slots__)


def worst_error(fitted: FittedCosts) -> float:
    """The largest median error of a mode at points that were not fitted; 0 where none is said."""
    errors = [one for mode in fitted.mode for one in (mode.prefill_error, mode.decode_error)]
    return max([one for one in errors if one is not None], default=0.0)


def fitted_modes(fitted: FittedCosts) -> tuple[ModeCost, ...]:
    """All modes; watts that were not measured are 0.

    Raises:
        ConfigError: there is none, two have one name, or a coefficient is out of range.
    """
    modes = tuple(mode_cost(one) for one in fitted.mode)
    return CostModel(modes=modes, rows=1, scope="unknown", source="calibrated").modes


def mode_cost(mode: FittedMode) -> ModeCost:
    """One mode; watts that were not measured are 0."""
    return ModeCost(
        name=mode.name,
        prefill_token_s=mode.prefill_token_s,
        step_s=mode.step_s,
        prefill_start_s=mode.prefill_start_s,
        part_tokens=mode.part_tokens,
        prefill_context_s=mode.prefill_context_s,
        row_s=mode.row_s,
        beside_s=mode.beside_s,
        context_token_s=mode.context_token_s,
        prefill_w=mode.prefill_w or 0.0,
        decode_w=mode.decode_w or 0.0,
        idle_w=mode.idle_w or 0.0,
    )
