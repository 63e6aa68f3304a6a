"""What `tidegate profile calibrate` predicts on this machine, beside what it then measures.

The demo's bundle, converted anew, is calibrated on each executor, twice, each time in a process of
its own. Every calibration holds its predictions against runs that it did not fit; besides, the
second one's runs are held against the first one's costs. Prompts and answers are the quiet fifth of
their runs, `whole` requests are medians of runs as they were. On a machine that others use,
`--ahead` lets the measured process go before theirs (Linux, and root's right), as it would alone.

    python benchmarks/energy/calibration.py --keep benchmarks/results/energy-calibration.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from report import report  # noqa: E402

from tidegate.converters.convert import ConversionPlan, convert  # noqa: E402
from tidegate.converters.recipe import make_recipe  # noqa: E402
from tidegate.edge.energy.cost import ModeCost  # noqa: E402
from tidegate.edge.energy.fitted_costs import mode_cost  # noqa: E402
from tidegate.edge.energy.profile import FittedMode  # noqa: E402

CHECKPOINT = HERE.parents[1] / "examples" / "assistant" / "edge"
_POINT = re.compile(r"(\d+) \+ (\d+) x (\d+)")


def calibrate(bundle: Path, folder: Path, executor: str, args: argparse.Namespace) -> Any:
    """One calibration in a process of its own."""
    command = [sys.executable, "-P", "-m", "tidegate.cli", "profile", "calibrate", str(bundle)]
    command += ["--output", str(folder / f"{executor}.toml"), "--overlays", str(folder / "none")]
    command += ["--executor", executor, "--minutes", str(args.minutes), "--json"]
    if args.threads:
        command += ["--threads", str(args.threads)]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    if args.ahead:
        Path(f"/proc/{child.pid}/autogroup").write_text("-10", encoding="utf-8")
    out, _ = child.communicate()
    if child.returncode != 0:
        raise SystemExit(f"the calibration on {executor} ended with {child.returncode}")
    return json.loads(out)


def again(first: Any, second: Any) -> dict[str, dict[str, float]]:
    """Median relative errors of the first one's costs at the runs of the second, by mode."""
    found = {}
    for mode in first["cost"]["mode"]:
        cost = mode_cost(FittedMode(**mode))
        told = next(one for one in second["modes"] if one["name"] == cost.name)
        prompts = errors(cost, told["held_out_prefill"], answers=False)
        answers = errors(cost, told["held_out_decode"], answers=True)
        found[cost.name] = {
            "prefill": statistics.median(prompts),
            "prefill_points": len(prompts),
            "decode": statistics.median(answers),
            "decode_points": len(answers),
        }
    return found


def errors(cost: ModeCost, rows: list[Any], *, answers: bool) -> list[float]:
    """Of what `cost` predicts; prompts beside which nothing decodes, and all answers."""
    found = []
    for row in rows:
        named = _POINT.fullmatch(row["point"])
        assert named is not None, row["point"]
        prompt, output, beside = (int(one) for one in named.groups())
        if answers:
            context = beside * (prompt + output / 2)
            predicted_s = output * cost.batch_step_s(beside, context)
        elif beside > 1:
            continue
        else:
            predicted_s = cost.prefill_s(prompt)
        found.append(abs(predicted_s / row["measured_s"] - 1))
    return found


def show(executor: str, told: Any) -> None:
    """Predictions beside measurements, for people."""
    for mode in told["modes"]:
        print(f"{executor}, {mode['name']}: {told['rounds']} rounds, spread {told['spread']:.0%}")
        for what in ("prefill", "decode", "whole"):
            for row in mode[f"held_out_{what}"]:
                print(
                    f"  {what:<8}{row['point']:<16}{row['predicted_s'] * 1e3:>9.2f} ms predicted"
                    f"{row['measured_s'] * 1e3:>9.2f} ms measured{row['error']:>+8.1%}"
                )
            print(f"  {what:<8}median {mode[f'{what}_error']:.1%}")


def main() -> int:
    """Calibrate, print, and keep what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executors", nargs="+", default=["openvino", "onnx"])
    parser.add_argument("--minutes", type=float, default=1.0, help="of each calibration")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--ahead", action="store_true", help="of other programs")
    parser.add_argument("--keep", type=Path, help="write the result there")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="tidegate-calibration-") as name:
        folder = Path(name)
        plan = ConversionPlan(
            model_id="assistant",
            targets=("onnx", "openvino"),
            recipe=make_recipe(bits=4, group_size=64, symmetric=False),
        )
        bundle = convert(CHECKPOINT, folder / "bundle", plan).folder
        for executor in args.executors:
            load = os.getloadavg()[0]
            told = [calibrate(bundle, folder, executor, args) for _ in range(2)]
            for one in told:
                del one["file"]
                show(executor, one)
            later = again(*told)
            print(f"{executor}: the first one's costs at the second one's runs: {later}")
            results[executor] = {"calibrations": told, "again": later, "load_before": load}
    text = report("energy/calibration.py", ("numpy", "onnxruntime", "openvino"), results)
    if args.keep:
        args.keep.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
