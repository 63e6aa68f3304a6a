"""`explained_costs`: what a model costs on a board, fitted here, scaled from runs, or guessed.

Decoding reads every weight once, so seconds go with the bytes of the weights; a prompt's products
do so too. What is in neither file nor profile is assumed, and `Estimate.why` says so. Where nobody
measured watts they stay unknown (scope `unknown`, all 0): then only time decides, and no request
claims joules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tidegate.edge.energy.board_runs import UNKNOWN, ModeWatts, point_bytes, runs_for, watts_of
from tidegate.edge.energy.cost import CostModel, ModeCost, Source
from tidegate.edge.energy.fitted_costs import (
    TRUSTED,
    Setup,
    find_fitted,
    mode_cost,
    setup_of,
    worst_error,
)
from tidegate.edge.energy.own_modes import threads_of
from tidegate.edge.energy.profile import FittedCosts, Point, Profile
from tidegate.edge.energy.profile_files import read_fitted
from tidegate.edge.executors.choice import ExecutorSettings, choose_target
from tidegate.model.bundle import Bundle

_PREFILL_RATIO: Final = 10.0
"""Prompt tokens a second over generated ones, where a run does not say. Assumed."""
_ROW_SHARE: Final = 0.12
_CONTEXT_SHARE: Final = 0.08
"""Of a step: what a further row adds, and a context of 1 024 tokens. Assumed, as in simulations."""
_LEAST_STEP_S: Final = 5e-4
"""Of the smallest model on two cores of a server (benchmarks/results/energy-calibration.json)."""
_GUESSED_BYTES_S: Final = 5e9
"""Weights read in a second, where nobody measured anything: about what a small board does."""
_SWITCH_S: Final = {"nvpmodel": 0.2, "cpufreq": 0.05, "none": 0.0}
"""That the tool takes to change the mode. Assumed."""
_TYPICAL: Final = (256, 128)
"""Tokens of prompt and answer by which modes are compared."""
_CLOCKS: Final = {"0.6": (0.6, 0.85), "0.8": (0.8, 0.95)}
"""Speed of prompts and answers at shares of the highest clock. Assumed, as in simulations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Costs, and how they were obtained: a line for each part."""

    costs: CostModel
    why: tuple[str, ...]


def explained_costs(
    profile: Profile,
    bundle: Bundle,
    runs: ExecutorSettings,
    *,
    modes: Sequence[str],
    rows: int,
    calibration: Path | None,
) -> Estimate:
    """The best that is known of what `bundle` costs.

    Args:
        profile: of the board; costs that it holds itself, from the library's calibration, count.
        bundle: of a decoder.
        runs: how it runs.
        modes: that can be taken, slowest first. Those that a calibration found to be no faster
            than one before them are left out.
        rows: requests that share steps at most.
        calibration: a file that counts before the profile's own; it need not exist.

    Raises:
        ProfileError: the file is wrong, or of another board.
        BundleError, ConfigError: `runs` names an executor that cannot run the bundle.
    """
    manifest = bundle.manifest
    target = choose_target(bundle, runs.runtime)
    setup = setup_of(manifest, target, runs)
    own = () if calibration is None else read_fitted(calibration, profile.id)
    found = find_fitted((*own, *profile.cost), setup, modes=modes, rows=rows)
    if found is not None and worst_error(found) <= TRUSTED:
        return _calibrated(found, profile, modes, rows)
    estimate = estimated_costs(profile, manifest.memory.weight_bytes, modes=modes, rows=rows)
    if found is not None:
        why = (
            f"costs of {manifest.model_id} fitted on {found.date} are not used: they were"
            f" {worst_error(found):.0%} off what was measured then"
        )
    else:
        why = f"{manifest.model_id} was not calibrated {_told(setup, modes, rows)}"
    return replace(estimate, why=(why, *estimate.why))


def _told(setup: Setup, modes: Sequence[str], rows: int) -> str:
    runs = f"{setup.threads or 'any'} threads, keys and values {setup.kv_precision or 'as usual'}"
    layers = f"native {setup.native}, providers {', '.join(setup.providers)}"
    where = f"on {setup.executor} of this device ({setup.device})"
    return f"{where}, {rows} rows, {runs}, {layers}, in {', '.join(modes)}"


def estimated_costs(
    profile: Profile, weight_bytes: int, *, modes: Sequence[str], rows: int
) -> Estimate:
    """Costs of weights of so many bytes, from the profile's runs or from none."""
    runs = runs_for(profile, weight_bytes, modes)
    costs = list[ModeCost]()
    assumed = [f"{_ROW_SHARE:.0%} of a step for a row, {_CONTEXT_SHARE:.0%} for 1024 tokens"]
    for name, run, measured in zip(modes, runs.points, runs.measured, strict=True):
        one = _guessed(name, weight_bytes) if run is None else _scaled(name, run, weight_bytes)
        prompts, answers = (1.0, 1.0) if measured else _speed_in(name, modes)
        if answers < 1:
            assumed.append(f"{name}: prompts at {prompts:.2g} and answers at {answers:.2g} of full")
        one = _mode(name, one.step_s / answers, one.prefill_token_s / prompts)
        costs.append(_no_slower(one, costs[-1]) if costs else one)
    watts = watts_of(profile, runs, modes)
    if None in runs.points:
        assumed.append(f"{_GUESSED_BYTES_S / 1e9:g} GB of weights read in a second")
    if not all(run is not None and run.prefill_tok_s for run in runs.points):
        assumed.append(f"prompts {_PREFILL_RATIO:g} times as fast as answers")
    return Estimate(
        costs=_model(profile, costs, watts, rows=rows),
        why=(*runs.why, *watts.why, *(f"assumed: {one}" for one in assumed)),
    )


def _calibrated(found: FittedCosts, profile: Profile, modes: Sequence[str], rows: int) -> Estimate:
    """Seconds as fitted; watts as measured with them, else of the profile's runs, else unknown."""
    by_name = {one.name: one for one in found.mode}
    fitted = [by_name[name] for name in modes]
    costs = [mode_cost(one) for one in fitted]
    if found.scope is not None and all(one.idle_w is not None for one in fitted):
        watts = ModeWatts(
            scope=found.scope,
            watts=tuple((one.prefill_w, one.decode_w, one.idle_w) for one in costs),
            why=(f"watts ({found.scope}) were measured with them",),
        )
        source: Source = "calibrated"
    else:
        watts = watts_of(profile, runs_for(profile, 0, modes), modes)
        # Joules are seconds times watts, and known no better than either.
        source = "calibrated" if watts.scope == UNKNOWN else "estimated"
    model = _model(profile, costs, watts, rows=rows)
    model, left_out = _faster_each(model)
    model = replace(
        model,
        source=source,
        load_s=found.load_s or 0.0,
        load_w=max(one.prefill_w for one in model.modes),
        switch_s=model.switch_s if found.switch_s is None else found.switch_s,
    )
    why = f"times of {found.model} were fitted on {found.device}, {found.date}"
    return Estimate(costs=model, why=(why, *watts.why, *left_out))


def _faster_each(costs: CostModel) -> tuple[CostModel, tuple[str, ...]]:
    """Without modes that are no faster than one before them, which are good for nothing.

    Modes come by what they take (threads, clocks, watts). Of a small model two threads may be
    slower than one, as they wait for each other.
    """
    kept, left_out = [0], list[str]()
    for mode in range(1, len(costs.modes)):
        name, before = costs.modes[mode].name, costs.modes[kept[-1]].name
        if costs.request_s(mode, *_TYPICAL) < costs.request_s(kept[-1], *_TYPICAL):
            kept.append(mode)
        else:
            left_out.append(f"{name} is left out: here it is no faster than {before}")
    return replace(costs, modes=tuple(costs.modes[mode] for mode in kept)), tuple(left_out)


def _model(
    profile: Profile, modes: Sequence[ModeCost], watts: ModeWatts, *, rows: int
) -> CostModel:
    """Seconds and watts together."""
    powered = tuple(
        replace(one, prefill_w=prefill_w, decode_w=decode_w, idle_w=idle_w)
        for one, (prefill_w, decode_w, idle_w) in zip(modes, watts.watts, strict=True)
    )
    return CostModel(
        modes=powered,
        rows=rows,
        scope=watts.scope,
        source="estimated",
        switch_s=_SWITCH_S[profile.power.tool] if len(powered) > 1 else 0.0,
    )


def _scaled(name: str, run: Point, weight_bytes: int) -> ModeCost:
    """A run's seconds by how many of its bytes this model has."""
    size = point_bytes(run)
    assert size, "as the run was chosen"
    assert run.decode_tok_s, "as the run was chosen"
    ratio = weight_bytes / size
    token_s = ratio / run.decode_tok_s
    prefill_s = ratio / run.prefill_tok_s if run.prefill_tok_s else token_s / _PREFILL_RATIO
    return _mode(name, token_s, prefill_s)


def _guessed(name: str, weight_bytes: int) -> ModeCost:
    token_s = weight_bytes / _GUESSED_BYTES_S
    return _mode(name, token_s, token_s / _PREFILL_RATIO)


def _speed_in(mode: str, modes: Sequence[str]) -> tuple[float, float]:
    """Of prompts and answers, in a mode that is only a clock or a number of threads, over the most.

    Answers wait for memory and lose less than prompts do.
    """
    if mode in _CLOCKS:
        return _CLOCKS[mode]
    threads, most = threads_of(mode), max([threads_of(one) or 1 for one in modes])
    return (1.0, 1.0) if threads is None else (threads / most, (threads / most) ** 0.5)


def _mode(name: str, token_s: float, prefill_token_s: float) -> ModeCost:
    step_s = max(token_s, _LEAST_STEP_S)
    return ModeCost(
        name=name,
        prefill_token_s=max(prefill_token_s, 1e-9),
        step_s=step_s,
        row_s=_ROW_SHARE * step_s,
        beside_s=_ROW_SHARE * step_s,
        context_token_s=_CONTEXT_SHARE * step_s / 1024,
        prefill_w=0.0,
        decode_w=0.0,
        idle_w=0.0,
    )


def _no_slower(one: ModeCost, slower: ModeCost) -> ModeCost:
    """A mode that is to be faster than the one before, at least as fast: runs scatter."""
    return _mode(
        one.name,
        min(one.step_s, slower.step_s),
        min(one.prefill_token_s, slower.prefill_token_s),
    )
