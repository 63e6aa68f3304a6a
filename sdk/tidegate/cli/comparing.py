"""`tidegate convert --compare`: the same checkpoint by several recipes, quality beside size."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tidegate.cli.evaluating import EvaluationSettings, evaluate
from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.evaluation.page import Candidate, page, pareto
from tidegate.converters.passes.base import Progress
from tidegate.errors import ConfigError
from tidegate.model.bundle import Bundle, replace_manifest
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.quality import Quality


def compare(
    checkpoint: Path,
    out: Path,
    plans: Mapping[str, ConversionPlan],
    text: Path,
    progress: Progress,
) -> list[Candidate]:
    """Convert by each plan to a bundle of its own below `out`, and measure all on one text.

    Args:
        checkpoint: folder of the checkpoint.
        out: gets one bundle per plan, under the plan's name.
        plans: by name.
        text: see `tidegate evaluate --text`; the result goes into the manifests as well.
        progress: told (what, done, total).

    Raises:
        CheckpointError: it is an encoder, whose bundles `tidegate evaluate` measures.
    """
    with Checkpoint.open(checkpoint) as opened:
        _ = opened.decoder  # refused before hours of work and not after
    measured: list[tuple[str, Bundle, Quality]] = []
    for name, plan in plans.items():
        told = _Prefixed(name, progress)
        bundle: Bundle = convert(checkpoint, out / name, plan, told)
        with Checkpoint.open(checkpoint, context=bundle.manifest.context_tokens) as opened:
            quality = evaluate(bundle, opened, text, EvaluationSettings(), told)
        replace_manifest(bundle, replace(bundle.manifest, quality=quality))
        measured.append((name, bundle, quality))
    best = pareto(
        [bundle.manifest.memory.weight_bytes for _, bundle, _ in measured],
        [quality.kl_mean for _, _, quality in measured],
    )
    return [_candidate(*one, best=good) for one, good in zip(measured, best, strict=True)]


class _Prefixed:
    """Progress that says which recipe it is of."""

    def __init__(self, name: str, progress: Progress) -> None:
        self._name, self._progress = name, progress

    def __call__(self, what: str, done: int, total: int) -> None:
        """See `Progress`."""
        self._progress(f"{self._name}: {what}", done, total)


def _candidate(name: str, bundle: Bundle, quality: Quality, *, best: bool) -> Candidate:
    weight_bytes = bundle.manifest.memory.weight_bytes
    return Candidate(
        name=name,
        size_mb=weight_bytes / 1e6,
        bits_per_weight=weight_bytes * 8 / bundle.manifest.architecture.parameters,
        kl_mean=quality.kl_mean,
        kl_p99=quality.kl_p99,
        agreement=quality.agreement,
        perplexity=quality.perplexity,
        exact_match=quality.exact_match,
        best=best,
    )


def plans_of(names: str, plan: ConversionPlan) -> dict[str, ConversionPlan]:
    """One plan for each recipe in `names`, a list with commas of names and TOML files.

    The calibration text goes to those that look at one, of which there must be some.
    """
    from tidegate.converters.driver.pipeline import looks_at_data
    from tidegate.converters.recipe_file import load_recipe

    plans: dict[str, ConversionPlan] = {}
    for word in filter(None, (part.strip() for part in names.split(","))):
        recipe = load_recipe(word)
        if recipe.name in plans:
            raise ConfigError("compare", word, "recipes of different names")
        text = plan.text if looks_at_data(recipe) else None
        plans[recipe.name] = replace(plan, recipe=recipe, text=text)
    if not plans:
        raise ConfigError("compare", names, "names of recipes or TOML files, with commas between")
    if plan.text is not None and all(one.text is None for one in plans.values()):
        raise ConfigError("text", str(plan.text), "left out: none of the recipes looks at data")
    return plans


def print_comparison(
    candidates: Sequence[Candidate], *, title: str, plot: Path | None, as_json: bool
) -> None:
    """The Pareto table on stdout, and as a page if a file is given."""
    if as_json:
        print(json.dumps([asdict(one) for one in candidates], indent=2))
    else:
        _print_table(candidates)
    if plot is not None:
        plot.write_text(page(title, candidates=candidates), encoding="utf-8")
        print(f"{plot}: written", file=sys.stderr)


def _print_table(candidates: Sequence[Candidate]) -> None:
    width = max(len(one.name) for one in candidates) + 2
    sys.stdout.write(
        f"{'':{width}}{'MB':>8}{'bits':>7}{'mean KL':>10}{'99 % KL':>9}{'agree':>8}"
        f"{'perplexity':>12}{'exact':>8}\n"
    )
    for one in sorted(candidates, key=lambda one: one.size_mb):
        exact = "-" if one.exact_match is None else f"{one.exact_match:.1%}"
        mark = "*" if one.best else " "
        sys.stdout.write(
            f"{one.name + ' ' + mark:{width}}{one.size_mb:>8.2f}{one.bits_per_weight:>7.2f}"
            f"{one.kl_mean:>10.5f}{one.kl_p99:>9.4f}{one.agreement:>8.1%}"
            f"{one.perplexity:>12.3f}{exact:>8}\n"
        )
    sys.stdout.write("* no other is both smaller and closer to the checkpoint\n")
