"""`[[cost]]` of a calibration file: which model it is of, and the cost model it makes.

A model is known by the files that an executor runs, so that a bundle that was evaluated or signed
since stays the one that was measured, and one that was converted anew does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from tidegate.edge.energy.cost import CostModel, ModeCost
from tidegate.edge.energy.profile import FittedCosts, FittedMode
from tidegate.model.manifest import DeviceTarget, Manifest


def weights_digest(manifest: Manifest, executor: DeviceTarget) -> str:
    """16 hexadecimal digits of all files that `executor` runs."""
    files = sorted(manifest.files.items())
    lines = [f"{name} {one.sha256}" for name, one in files if name.startswith(f"{executor}/")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def find_fitted(
    fitted: Sequence[FittedCosts],
    *,
    weights: str,
    modes: Sequence[str],
    rows: int,
    threads: int | None,
) -> FittedCosts | None:
    """The first that is of these weights, threads and modes, with at least so many rows."""
    for one in fitted:
        named = {mode.name for mode in one.mode}
        same = (one.weights, one.threads) == (weights, threads)
        if same and one.rows >= rows and named.issuperset(modes):
            return one
    return None


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
