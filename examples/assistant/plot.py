"""Draw the loss curves of both models: ``python -m assistant.plot`` from the `examples` folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

HERE: Final = Path(__file__).parent
COLOURS: Final = {"edge": "tab:orange", "cloud": "tab:blue"}


def main() -> None:
    """Read the training logs beside the checkpoints and write `loss.png`."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, colour in COLOURS.items():
        lines = (HERE / name / "training.jsonl").read_text().splitlines()
        points = {point["step"]: point for point in map(json.loads, lines)}
        millions = [point["tokens"] / 1e6 for point in points.values()]
        axes.plot(millions, [p["loss"] for p in points.values()], color=colour, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss on answer tokens (nats)")
    axes.set_title("Training loss, mean of 20 steps")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(HERE / "loss.png", dpi=120)


if __name__ == "__main__":
    main()
