"""`tidegate profile calibrate`: runs a bundle as the daemon would, fits its costs, keeps them."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tidegate.cli.board import add_profile, describe, served
from tidegate.cli.trust import add_trust, read_trust

if TYPE_CHECKING:
    from tidegate.edge.energy.calibrate import Calibrated
    from tidegate.edge.energy.calibrate_fit import Checked, Fit
    from tidegate.edge.energy.profile import FittedCosts, Profile
    from tidegate.edge.executors.choice import ExecutorSettings
    from tidegate.model.bundle import Bundle

_BUSY: Final = 1.0
"""Spread of decoding steps from which other programs were too busy for numbers to be good."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    add_profile(parser, "how to run where no flag does, and which sensors there are")
    parser.set_defaults(profile="auto", memory_mib=None)
    parser.add_argument("--executor", choices=("auto", "onnx", "openvino"), help="what runs it")
    parser.add_argument("--context", type=int, help="prompt plus answer, in tokens")
    parser.add_argument("--rows", type=int, help="requests that run at once (default 4)")
    parser.add_argument("--threads", type=int, help="threads (default: the runtime's choice)")
    parser.add_argument("--providers", metavar="NAMES", help="of ONNX Runtime, with commas")
    parser.add_argument(
        "--kv-precision", choices=("u8", "u4", "f16", "f32"), help="of keys and values"
    )
    parser.add_argument("--kv-mib", type=int, help="most that keys and values take")
    parser.add_argument("--max-model-mib", type=int, help="most that weights take")
    parser.add_argument(
        "--native", choices=("auto", "on", "off"), default="auto", help="the compiled layer"
    )
    parser.add_argument("--modes", metavar="NAMES", help="power modes, with commas (default: all)")
    parser.add_argument(
        "--power-switching",
        choices=("auto", "all", "off"),
        default="auto",
        help="auto: modes up to the one that is there; all: also faster ones; off: only that one",
    )
    parser.add_argument(
        "--power-helper", type=Path, metavar="SOCKET", help="of tidegate-power-helper"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=2.0,
        help="to measure for (default 2); too few for five rounds are refused, if these take more"
        " than a minute",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="to keep the costs in (default: --calibration)"
    )
    parser.add_argument(
        "--replace", action="store_true", help="good costs by those of a bad measurement, too"
    )
    add_trust(parser)


def run(args: argparse.Namespace) -> None:
    """Measure, fit, keep and print.

    Raises:
        TidegateError: see `tidegate.edge.energy.calibrate.Calibration.run`; or the file cannot be
            written, or is another device's, which is known before anything runs.
    """
    from tidegate.cli.interrupts import interrupted_between_steps
    from tidegate.cli.progress import progress_bars
    from tidegate.edge.energy.calibrate_file import (
        check_no_worse,
        check_writable,
        read_table,
        write_table,
    )
    from tidegate.edge.energy.fitted_costs import this_device
    from tidegate.edge.energy.profile_files import CALIBRATION, read_fitted
    from tidegate.edge.machine import read_machine
    from tidegate.errors import ConfigError
    from tidegate.model.bundle import Bundle

    if not 0 < args.minutes <= 24 * 60:
        raise ConfigError("minutes", args.minutes, "more than 0, and at most a day")
    profile = _profile(args)
    device = this_device()
    output = args.output or args.calibration or CALIBRATION
    check_writable(output)
    read_table(output, profile_id=profile.id, device=device)
    bundle = Bundle.open(args.bundle, trusted=read_trust(args.trust), every_target=False)
    settings = _settings(args, profile, read_machine().memory_bytes)
    with (
        progress_bars(quiet=args.json and not sys.stderr.isatty()) as bars,
        interrupted_between_steps(bars) as report,
    ):
        found, load_s = _measured(args, profile, bundle, settings, report)
    costs = _costs(found, bundle, settings, load_s)
    if not args.replace:
        check_no_worse(read_fitted(output, profile.id), costs)
    table = _table(output, profile, costs, found, device)
    write_table(output, table)
    told = {
        "file": str(output),
        "profile": profile.id,
        "device": device,
        **_told(found),
        "cost": asdict(costs),
    }
    if args.json:
        print(json.dumps(told, indent=2))
    else:
        for line in _lines(found, costs):
            print(line)
        print(f"kept in {output}")
    if found.spread > _BUSY:
        print(
            f"tidegate profile: steps differed by {found.spread:.0%}: other programs were busy;"
            " calibrate again when they are not",
            file=sys.stderr,
        )


def _profile(args: argparse.Namespace) -> Profile:
    """The board, without an earlier calibration, which is about to be replaced."""
    from tidegate.edge.energy.profile_detect import detect, read_board
    from tidegate.edge.energy.profile_files import OVERLAYS, read_library

    library = read_library(args.overlays or OVERLAYS, None)
    if args.profile != "auto":
        return library.profile(args.profile)
    return detect(read_board(), library.every()).profile


def _settings(args: argparse.Namespace, profile: Profile, memory_bytes: int) -> ExecutorSettings:
    from tidegate.edge.executors.choice import ExecutorSettings

    taken = served(args, profile, memory_bytes)
    print(f"tidegate profile: {describe(profile, taken)}", file=sys.stderr)
    return ExecutorSettings(
        choice=taken.executor,
        context_tokens=args.context,
        rows=taken.rows,
        threads=taken.threads,
        kv_precision=taken.kv_precision,
        native=args.native,
        providers=taken.providers,
        kv_mib=taken.kv_mib,
    )


def _measured(
    args: argparse.Namespace,
    profile: Profile,
    bundle: Bundle,
    settings: ExecutorSettings,
    report: Any,
) -> tuple[Calibrated, float | None]:
    """What was fitted, and how long the model took to load; leaves the board as it was."""
    from tidegate.edge.energy.board_costs import estimated_costs
    from tidegate.edge.energy.calibrate import Calibration
    from tidegate.edge.energy.calibrate_bench import open_bench
    from tidegate.edge.energy.own_modes import own_modes
    from tidegate.edge.energy.sensors.panel import open_panel
    from tidegate.edge.energy.switches import open_switch
    from tidegate.edge.executors.choice import open_executor
    from tidegate.engine.facts import Described
    from tidegate.engine.text import TextModel

    root = Path("/")
    with closing(open_executor(bundle, settings)) as executor:
        switch = open_switch(
            profile,
            switching=args.power_switching,
            helper=args.power_helper,
            sysroot=root,
            own=own_modes(executor),
        )
        with closing(switch):
            names = switch.modes if args.modes is None else _named(args.modes)
            weights = bundle.manifest.memory.weight_bytes
            guessed = estimated_costs(
                profile, weights, modes=switch.modes, rows=executor.limits.step_rows
            )
            panel = open_panel(profile, sysroot=root, clock=time.monotonic, costs=guessed.costs)
            text = TextModel.load(bundle.folder, context_tokens=executor.limits.context_tokens)

            async def measure() -> Calibrated:
                async with open_bench(executor, text) as bench:
                    calibration = Calibration(
                        bench=bench,
                        switch=switch,
                        panel=panel if panel.sample().kind == "measured" else None,
                        modes=names,
                        minutes=args.minutes,
                        report=report,
                    )
                    return await calibration.run()

            found = asyncio.run(measure())
        load_s = executor.facts.load_s if isinstance(executor, Described) else None
    return found, load_s


def _named(modes: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in modes.split(",") if name.strip()))


def _costs(
    found: Calibrated, bundle: Bundle, settings: ExecutorSettings, load_s: float | None
) -> FittedCosts:
    from tidegate.edge.energy.calibrate_file import SOURCE
    from tidegate.edge.energy.fitted_costs import fitted_modes, setup_of
    from tidegate.edge.energy.profile import FittedCosts
    from tidegate.edge.executors.choice import choose_target
    from tidegate.edge.executors.kv_size import kv_size

    target = choose_target(bundle, settings.runtime)
    setup = setup_of(bundle.manifest, target, settings)
    costs = FittedCosts(
        model=bundle.manifest.model_id,
        weights=setup.weights,
        executor=target,
        device=setup.device,
        rows=kv_size(bundle.manifest, target, settings).rows,
        threads=setup.threads,
        kv_precision=setup.kv_precision,
        native=setup.native,
        providers=setup.providers,
        date=_today(),
        scope=found.scope,
        load_s=load_s,
        switch_s=found.switch_s,
        mode=found.fitted_modes(SOURCE),
        src={"*": SOURCE},
    )
    fitted_modes(costs)  # refuses what no daemon could read
    return costs


def _table(
    output: Path, profile: Profile, costs: FittedCosts, found: Calibrated, device: str
) -> dict[str, Any]:
    from tidegate.edge.energy.calibrate_file import SOURCE, read_table, with_costs
    from tidegate.edge.energy.profile import Calibration

    record = Calibration(
        date=_today(),
        r2=min(min(one.prefill_r2, one.decode_r2) for one in found.fits),
        residual=max(max(one.prefill_error, one.decode_error) for one in found.fits),
        device=device,
        src={"*": SOURCE},
    )
    return with_costs(
        read_table(output, profile_id=profile.id, device=device),
        costs,
        record,
        profile_id=profile.id,
        note=f"tidegate profile calibrate on {device}, last on {_today()}",
    )


def _today() -> str:
    return datetime.now().astimezone().date().isoformat()


def _told(found: Calibrated) -> dict[str, Any]:
    """What is not in the file, for `--json`."""
    return {
        "rounds": found.rounds,
        "longest_prompt": found.longest_prompt,
        "spread": round(found.spread, 3),
        "watts": found.watts_why,
        "modes": [_mode_told(fit) for fit in found.fits],
    }


def _mode_told(fit: Fit) -> dict[str, Any]:
    return {
        "name": fit.cost.name,
        "prefill_r2": round(fit.prefill_r2, 4),
        "decode_r2": round(fit.decode_r2, 4),
        "prefill_error": round(fit.prefill_error, 4),
        "decode_error": round(fit.decode_error, 4),
        "whole_error": round(fit.whole_error, 4),
        "held_out_prefill": [_checked_told(one) for one in fit.prefill],
        "held_out_decode": [_checked_told(one) for one in fit.decode],
        "held_out_whole": [_checked_told(one) for one in fit.whole],
        "outliers": list(fit.outliers),
    }


def _checked_told(one: Checked) -> dict[str, Any]:
    return {
        "point": one.point,
        "predicted_s": round(one.predicted_s, 7),
        "measured_s": round(one.measured_s, 7),
        "error": round(one.error, 4),
    }


def _lines(found: Calibrated, costs: FittedCosts) -> list[str]:
    threads = (
        "threads as the runtime likes" if costs.threads is None else f"threads {costs.threads}"
    )
    lines = [
        f"{costs.model} on {costs.executor}, rows {costs.rows}, {threads}: {found.rounds} rounds,"
        f" prompts of up to {found.longest_prompt} tokens",
        found.watts_why,
    ]
    if found.longest_prompt < found.wanted_prompt:
        lines.append(
            f"longer prompts (the context has room for {found.wanted_prompt}) took more time than"
            " there was: give it more --minutes"
        )
    for fit in found.fits:
        lines += _mode_lines(fit)
    return lines


def _mode_lines(fit: Fit) -> list[str]:
    one = fit.cost
    lines = [
        f"{one.name}:",
        f"  prompt     {_ms(one.prefill_start_s)} + {_us(one.prefill_token_s)} a token"
        f" + {_us(512 * one.prefill_context_s)} for 512 before it   (R2 {fit.prefill_r2:.3f})",
        f"  step       {_ms(one.step_s)} + {_us(one.row_s)} a further row"
        f" + {_us(512 * one.context_token_s)} for 512 of context   (R2 {fit.decode_r2:.3f})",
        f"  held out   {'prompt + answer x rows':<26}{'predicted':>12}{'measured':>12}",
    ]
    for what, checked in (("prompt", fit.prefill), ("answer", fit.decode), ("both", fit.whole)):
        lines += [
            f"    {what:<9}{one.point:<26}{_ms(one.predicted_s):>12}{_ms(one.measured_s):>12}"
            f"{one.error:>+8.1%}"
            for one in checked
        ]
    lines.append(
        f"  median error at {len(fit.whole)} points, quiet time: prompts {fit.prefill_error:.1%},"
        f" answers {fit.decode_error:.1%}; both as they ran: {fit.whole_error:.1%}"
    )
    return lines + [f"  far off, though fitted: {one}" for one in fit.outliers]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.2f} us"
