"""Costs are those fitted here, else scaled from known runs, and watts are never invented."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wordmodel import write_word_checkpoint

from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import make_recipe
from tidegate.edge.energy.board_costs import Estimate, estimated_costs, explained_costs
from tidegate.edge.energy.board_runs import point_bytes
from tidegate.edge.energy.fitted_costs import this_device, weights_digest
from tidegate.edge.energy.profile import Profile
from tidegate.edge.energy.profile_files import read_library
from tidegate.edge.executors.choice import ExecutorSettings
from tidegate.errors import ConfigError
from tidegate.model.bundle import Bundle

LIBRARY = read_library(Path("/nowhere"), Path("/nowhere"))
ORIN = LIBRARY.profile("jetson-orin-nano-8gb-super")
ORIN_MODES = ("7W", "15W", "25W", "MAXN_SUPER")
PLAIN = LIBRARY.profile("generic-x86-64")

FITTED = """
schema = 1
applies_to = "{board}"

[[cost]]
model = "tiny"
weights = "{weights}"
executor = "openvino"
rows = 4
date = "2026-11-22"
device = "{device}"
load_s = 0.5
src = "here"
{scope}

[[cost.mode]]
name = "as it is"
prefill_token_s = 2e-5
prefill_start_s = 1e-3
prefill_context_s = 3e-8
step_s = 1e-3
row_s = 2e-4
context_token_s = 1e-7
src = "here"
{watts}

[sources.here]
kind = "calibrated"
note = "a test"
"""
WATTS = "prefill_w = 9.0\ndecode_w = 7.5\nidle_w = 3.0\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("costs")
    checkpoint = write_word_checkpoint(folder / "model", context=64)
    recipe = make_recipe(bits=4, group_size=64, symmetric=False)
    plan = ConversionPlan(model_id="tiny", targets=("openvino",), recipe=recipe)
    return convert(checkpoint, folder / "bundle", plan)


def written(
    folder: Path, bundle: Bundle, *, board: str = "generic-x86-64", watts: bool = False
) -> Path:
    """A calibration file of the bundle."""
    file = folder / "calibration.toml"
    text = FITTED.format(
        board=board,
        device=this_device(),
        weights=weights_digest(bundle.manifest, "openvino"),
        watts=WATTS if watts else "",
        scope='scope = "package"' if watts else "",
    )
    file.write_text(text, encoding="utf-8")
    return file


def asked(
    bundle: Bundle,
    calibration: Path | None,
    *,
    profile: Profile = PLAIN,
    rows: int = 4,
    threads: int | None = None,
    modes: tuple[str, ...] = ("as it is",),
    runs: ExecutorSettings | None = None,
) -> Estimate:
    """Costs of the bundle."""
    runs = runs or ExecutorSettings(threads=threads)
    return explained_costs(profile, bundle, runs, modes=modes, rows=rows, calibration=calibration)


def test_what_was_fitted_here_counts_and_unknown_watts_stay_unknown(
    bundle: Bundle, tmp_path: Path
) -> None:
    file = written(tmp_path, bundle)
    found = asked(bundle, file)
    (one,) = found.costs.modes
    assert (found.costs.source, found.costs.scope) == ("calibrated", "unknown")
    assert one.prefill_s(100) == pytest.approx(1e-3 + 100 * 2e-5 + 5000 * 3e-8)
    assert one.batch_step_s(3, 200) == pytest.approx(1e-3 + 2 * 2e-4 + 200 * 1e-7)
    assert (one.prefill_w, one.decode_w, one.idle_w) == (0, 0, 0)
    assert found.costs.load_s == 0.5
    assert f"fitted on {this_device()}, 2026-11-22" in found.why[0]
    assert any("watts are unknown" in line for line in found.why)


def test_watts_that_were_measured_with_it_have_their_scope(bundle: Bundle, tmp_path: Path) -> None:
    costs = asked(bundle, written(tmp_path, bundle, watts=True)).costs
    (one,) = costs.modes
    assert costs.scope == "package"
    assert (one.prefill_w, one.decode_w, one.idle_w) == (9.0, 7.5, 3.0)


def test_watts_of_the_profile_beside_fitted_times_are_still_estimated(
    bundle: Bundle, tmp_path: Path
) -> None:
    file = written(tmp_path, bundle, board="jetson-orin-nano-8gb-super")
    text = file.read_text(encoding="utf-8").replace('"as it is"', '"25W"')
    file.write_text(text, encoding="utf-8")
    costs = asked(bundle, file, profile=ORIN, modes=("25W",)).costs
    assert (costs.source, costs.scope) == ("estimated", "module")
    assert costs.modes[0].step_s == 1e-3
    assert costs.modes[0].decode_w > costs.idle_w > 0


def test_a_profile_that_was_read_with_its_calibration_brings_the_costs(
    bundle: Bundle, tmp_path: Path
) -> None:
    file = written(tmp_path, bundle)
    profile = read_library(tmp_path / "none", file).profile("generic-x86-64")
    assert asked(bundle, None, profile=profile) == asked(bundle, file)
    costs = asked(bundle, None, profile=profile, rows=2).costs
    assert (costs.source, costs.rows) == ("calibrated", 2)


@pytest.mark.parametrize(
    ("rows", "threads", "modes"),
    [(8, None, ("as it is",)), (4, 2, ("as it is",)), (4, None, ("as it is", "fast"))],
)
def test_other_settings_than_those_measured_are_estimated_and_the_reason_is_given(
    bundle: Bundle, tmp_path: Path, rows: int, threads: int | None, modes: tuple[str, ...]
) -> None:
    file = written(tmp_path, bundle)
    found = asked(bundle, file, rows=rows, threads=threads, modes=modes)
    assert found.costs.source == "estimated"
    assert "tiny was not calibrated on openvino" in found.why[0]


@pytest.mark.parametrize(
    "runs",
    [
        ExecutorSettings(kv_precision="u8"),
        ExecutorSettings(native="off"),
        ExecutorSettings(choice="openvino", threads=1),
    ],
    ids=["keys and values", "native layer", "threads"],
)
def test_costs_count_for_the_settings_that_they_were_measured_with(
    bundle: Bundle, tmp_path: Path, runs: ExecutorSettings
) -> None:
    file = written(tmp_path, bundle)
    assert (
        asked(bundle, file, runs=ExecutorSettings(choice="openvino")).costs.source == "calibrated"
    )
    found = asked(bundle, file, runs=runs)
    assert found.costs.source == "estimated"
    assert f"native {runs.native}" in found.why[0]


@pytest.mark.parametrize("device", ['"Intel J1900, 4 cores"', None], ids=["another", "unsaid"])
def test_a_file_that_was_copied_to_another_device_does_not_count_there(
    bundle: Bundle, tmp_path: Path, device: str | None
) -> None:
    file = written(tmp_path, bundle)
    line = f'device = "{this_device()}"\n'
    text = file.read_text(encoding="utf-8")
    other = "" if device is None else f"device = {device}\n"
    file.write_text(text.replace(line, other), encoding="utf-8")
    found = asked(bundle, file)
    assert found.costs.source == "estimated"
    assert f"was not calibrated on openvino of this device ({this_device()})" in found.why[0]


def test_costs_that_were_far_off_when_they_were_fitted_are_not_used(
    bundle: Bundle, tmp_path: Path
) -> None:
    file = written(tmp_path, bundle)
    text = file.read_text(encoding="utf-8")
    for error, source in ((0.29, "calibrated"), (0.54, "estimated")):
        told = f"step_s = 1e-3\nprefill_error = {error}\n"
        file.write_text(text.replace("step_s = 1e-3\n", told), encoding="utf-8")
        found = asked(bundle, file)
        assert found.costs.source == source
    assert "fitted on 2026-11-22 are not used: they were 54% off" in found.why[0]


def test_modes_that_are_no_faster_than_one_before_them_are_left_out(
    bundle: Bundle, tmp_path: Path
) -> None:
    file = written(tmp_path, bundle)
    text = file.read_text(encoding="utf-8")
    head, rest = text.split("[[cost.mode]]")
    one, sources = rest.split("[sources.here]")
    modes = [
        one.replace('"as it is"', f'"{name}"').replace("step_s = 1e-3", f"step_s = {step_s}")
        for name, step_s in (("1 thread", 6e-4), ("2 threads", 7e-4), ("4 threads", 5e-4))
    ]
    parts = (head, *modes)
    file.write_text("[[cost.mode]]".join(parts) + "[sources.here]" + sources, encoding="utf-8")
    names = ("1 thread", "2 threads", "4 threads")
    found = asked(bundle, file, modes=names)
    assert [one.name for one in found.costs.modes] == ["1 thread", "4 threads"]
    assert found.costs.modes[found.costs.fastest].step_s == 5e-4
    assert found.costs.knee == found.costs.fastest
    assert found.why[-1] == "2 threads is left out: here it is no faster than 1 thread"
    two = asked(bundle, file, modes=names[:2]).costs
    assert [one.name for one in two.modes] == ["1 thread"]


def test_other_weights_are_not_the_model_that_was_measured(bundle: Bundle, tmp_path: Path) -> None:
    file = written(tmp_path, bundle)
    text = file.read_text(encoding="utf-8")
    weights = weights_digest(bundle.manifest, "openvino")
    file.write_text(text.replace(weights, "0" * 16), encoding="utf-8")
    assert asked(bundle, file).costs.source == "estimated"


def test_a_calibration_of_another_board_is_refused_and_a_missing_one_is_none(
    bundle: Bundle, tmp_path: Path
) -> None:
    assert asked(bundle, tmp_path / "missing.toml").costs.source == "estimated"
    file = written(tmp_path, bundle, board="raspberry-pi-5")
    with pytest.raises(ConfigError, match=r"applies_to = 'raspberry-pi-5': must be 'generic-x86"):
        asked(bundle, file)


@given(factor=st.floats(0.3, 3.0))
def test_seconds_of_a_run_are_scaled_by_bytes_and_watts_are_kept(factor: float) -> None:
    run = next(one for one in ORIN.energy.point if one.model == "llama-3.2-1b")
    size = point_bytes(run)
    assert size is not None
    one = next(p for p in ORIN.energy.point if (p.model, p.mode) == (run.model, "25W"))
    profile = replace(
        ORIN,
        energy=replace(
            ORIN.energy, point=tuple(p for p in ORIN.energy.point if p.model == run.model)
        ),
    )
    costs = estimated_costs(profile, int(size * factor), modes=ORIN_MODES, rows=4).costs
    mode = costs.modes[2]
    assert one.decode_tok_s is not None
    assert one.prefill_tok_s is not None
    assert one.active_w is not None
    assert mode.step_s == pytest.approx(factor / one.decode_tok_s, rel=1e-6)
    assert mode.prefill_token_s == pytest.approx(factor / one.prefill_tok_s, rel=1e-6)
    assert costs.scope == "module"
    assert mode.decode_w == pytest.approx(3.14 + 1.912 * one.active_w)
    assert costs.source == "estimated"


@pytest.mark.parametrize("board", LIBRARY.ids())
@pytest.mark.parametrize("megabytes", [1.7, 800.0, 4000.0])
def test_every_board_has_costs_of_every_model_in_order_and_says_why(
    board: str, megabytes: float
) -> None:
    profile = LIBRARY.profile(board)
    modes = tuple(mode.name for mode in profile.power.mode) or ("as it is",)
    found = estimated_costs(profile, int(megabytes * 1e6), modes=modes, rows=4)
    steps_s = [mode.step_s for mode in found.costs.modes]
    assert steps_s == sorted(steps_s, reverse=True)
    assert all(0 < mode.prefill_token_s < math.inf for mode in found.costs.modes)
    if found.costs.scope == "unknown":
        assert {mode.decode_w for mode in found.costs.modes} == {0.0}
        assert any("watts are unknown" in line for line in found.why)
        assert found.costs.knee == found.costs.fastest
    else:
        assert all(mode.decode_w > mode.idle_w > 0 for mode in found.costs.modes)


@pytest.mark.parametrize("modes", [("0.6", "0.8", "full"), ("1 thread", "2 threads", "4 threads")])
@pytest.mark.parametrize("board", ["generic-x86-64", "intel-n100-class"])
def test_modes_that_are_only_clocks_or_threads_are_slower_by_what_is_said(
    board: str, modes: tuple[str, ...]
) -> None:
    found = estimated_costs(LIBRARY.profile(board), 10**9, modes=modes, rows=4)
    slow, middle, fast = found.costs.modes
    assert slow.step_s > middle.step_s > fast.step_s
    assert slow.prefill_token_s / fast.prefill_token_s > slow.step_s / fast.step_s
    assert any(line.startswith(f"assumed: {modes[0]}: prompts at") for line in found.why)


def test_a_model_that_is_far_from_any_run_is_called_so() -> None:
    why = estimated_costs(ORIN, 1_700_000, modes=ORIN_MODES, rows=4).why
    assert any("and this one 1.7: far" in line for line in why)
    assert any("idle watts of 7W are those of MAXN_SUPER" in line for line in why)


def test_a_board_without_an_idle_measurement_has_no_watts() -> None:
    pi = LIBRARY.profile("raspberry-pi-5")
    found = estimated_costs(pi, 10**9, modes=("as it is",), rows=2)
    assert found.costs.scope == "unknown"
    assert any("nobody measured the idle board (wall)" in line for line in found.why)
