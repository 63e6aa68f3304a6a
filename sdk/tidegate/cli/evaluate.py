"""Measure what compression cost: a bundle against the checkpoint it was made from.

Example:
  tidegate evaluate assistant --reference examples/assistant/edge --text notes.txt
  tidegate evaluate assistant --reference examples/assistant/edge --text tasks.jsonl --record
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidegate.cli.evaluating import EvaluationSettings
    from tidegate.converters.evaluation.page import LayerError
    from tidegate.converters.passes.base import Progress
    from tidegate.model.bundle import Bundle
    from tidegate.model.checkpoint import Checkpoint
    from tidegate.model.quality import EmbeddingQuality, Quality


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument(
        "--reference", type=Path, required=True, help="folder of the checkpoint it was made from"
    )
    parser.add_argument(
        "--text",
        type=Path,
        required=True,
        help='plain text, or .jsonl with "text", or "messages" and the right "answer"',
    )
    parser.add_argument(
        "--executor", choices=("auto", "onnx", "openvino"), default="auto", help="what runs it"
    )
    parser.add_argument("--exact", action="store_true", help="float activations: weights alone")
    parser.add_argument(
        "--tokens", type=int, default=20_000, help="of the text at most (default 20000)"
    )
    parser.add_argument(
        "--record", action="store_true", help="write the result into the bundle's manifest"
    )
    parser.add_argument("--plot", type=Path, help="write a page with the pictures, .html")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Measure, print, and record if asked to."""
    from tidegate.cli.evaluating import EvaluationSettings
    from tidegate.cli.plots import check_plot
    from tidegate.cli.progress import progress_bars
    from tidegate.errors import ConfigError
    from tidegate.model.bundle import Bundle, replace_manifest
    from tidegate.model.checkpoint import Checkpoint

    if args.tokens < 2:
        raise ConfigError("tokens", args.tokens, "at least 2")
    check_plot(args.plot)
    bundle = Bundle.open(args.bundle)
    settings = EvaluationSettings(executor=args.executor, exact=args.exact, tokens=args.tokens)
    with (
        Checkpoint.open(args.reference, context=bundle.manifest.context_tokens) as checkpoint,
        progress_bars(quiet=args.quiet or args.json) as report,
    ):
        quality = measure(bundle, checkpoint, args.text, settings, report)
    if args.record:
        was_signed = bundle.manifest.signature is not None
        replace_manifest(bundle, replace(bundle.manifest, quality=quality, signature=None))
        if was_signed:
            print("the bundle's signature is void: sign it again", file=sys.stderr)
    size = {"weight_bytes": bundle.manifest.memory.weight_bytes, "bits_per_weight": _bits(bundle)}
    layers = _layer_errors(args, bundle) if args.plot is not None else []
    if args.json:
        errors = {"layer_errors": {one.layer: one.error for one in layers}} if layers else {}
        print(json.dumps(asdict(quality) | size | errors, indent=2))
    else:
        print(
            f"{'size':<14} {size['weight_bytes'] / 1e6:.2f} MB of weights,"
            f" {size['bits_per_weight']:.3f} bits per weight in all"
        )
        print_quality(quality)
    if any(one.kind == "lora" for one in bundle.manifest.recipe.passes):
        note = "the bundle has a LoRA merged; the checkpoint it is held against has not"
        print(f"note: {note}", file=sys.stderr)
    if args.plot is not None:
        _write_page(args.plot, bundle, quality, layers)
    return 0


def _bits(bundle: Bundle) -> float:
    manifest = bundle.manifest
    return round(manifest.memory.weight_bytes * 8 / manifest.architecture.parameters, 3)


def measure(
    bundle: Bundle,
    checkpoint: Checkpoint,
    text: Path,
    settings: EvaluationSettings,
    report: Progress,
) -> Quality | EmbeddingQuality:
    """Measure what the bundle makes: text or embeddings."""
    from tidegate.model.encoder import EncoderArchitecture

    if isinstance(bundle.manifest.architecture, EncoderArchitecture):
        from tidegate.cli.evaluating_encoder import evaluate_encoder

        return evaluate_encoder(bundle, checkpoint, text, settings, report)
    from tidegate.cli.evaluating import evaluate

    return evaluate(bundle, checkpoint, text, settings, report)


def _layer_errors(args: argparse.Namespace, bundle: Bundle) -> list[LayerError]:
    """How far each layer is off, through the ONNX graph; nothing where there is none."""
    from tidegate.cli.evaluating import EvaluationSettings, read_pieces
    from tidegate.cli.layer_errors import layer_errors
    from tidegate.model.architecture import Architecture
    from tidegate.model.checkpoint import Checkpoint

    arch = bundle.manifest.architecture
    if not isinstance(arch, Architecture) or "onnx" not in bundle.manifest.targets:
        return []
    text = read_pieces(bundle, args.text, EvaluationSettings(tokens=min(args.tokens, 4000)))
    with Checkpoint.open(args.reference, context=bundle.manifest.context_tokens) as opened:
        return layer_errors(
            opened.decoder,
            opened.weights(),
            bundle.target_folder("onnx"),
            text.sequences,
            exact=args.exact,
        )


def _write_page(
    path: Path, bundle: Bundle, quality: Quality | EmbeddingQuality, layers: Sequence[LayerError]
) -> None:
    """The page with the pictures."""
    from tidegate.converters.evaluation.page import page
    from tidegate.model.quality import EmbeddingQuality

    notes = list(quality_lines(quality))
    if isinstance(quality, EmbeddingQuality):
        notes.append("Errors per layer are shown for models that make text.")
    elif "onnx" not in bundle.manifest.targets:
        notes.append("Errors per layer need the target onnx, which this bundle does not hold.")
    title = f"{bundle.manifest.model_id}: what compression cost"
    confidence = () if isinstance(quality, EmbeddingQuality) else quality.confidence
    path.write_text(
        page(title, confidence=confidence, layers=layers, notes=notes), encoding="utf-8"
    )
    print(f"{path}: written", file=sys.stderr)


def quality_lines(quality: Quality | EmbeddingQuality) -> list[str]:
    """The measures, a line each."""
    from tidegate.model.quality import EmbeddingQuality

    if isinstance(quality, EmbeddingQuality):
        return [
            f"text           {quality.text}, {quality.sentences} sentences, through"
            f" {quality.backend}",
            f"cosine         mean {quality.cosine_mean:.5f}, least {quality.cosine_min:.5f}",
        ]
    lines = {
        "text": f"{quality.text}, {quality.positions:,} positions, through {quality.backend}",
        "perplexity": f"{quality.perplexity:.4f} (checkpoint {quality.reference_perplexity:.4f})",
        "KL divergence": f"mean {quality.kl_mean:.5f}, 99th percentile {quality.kl_p99:.4f} nats",
        "agreement": f"{quality.agreement:.2%} of the most likely tokens",
    }
    if quality.exact_match is not None and quality.reference_exact_match is not None:
        lines["exact match"] = (
            f"{quality.exact_match:.1%} of the answers"
            f" (checkpoint {quality.reference_exact_match:.1%})"
        )
    return [f"{name:<14} {value}" for name, value in lines.items()]


def print_quality(quality: Quality | EmbeddingQuality) -> None:
    """The measures for people, on stdout."""
    from tidegate.model.quality import EmbeddingQuality

    for line in quality_lines(quality):
        sys.stdout.write(f"{line}\n")
    if isinstance(quality, EmbeddingQuality):
        return
    sys.stdout.write("\nbest token is the checkpoint's best, by the gap to the second\n")
    sys.stdout.write("    gap of at least   positions   agreement\n")
    for one in quality.confidence:
        agreement = f"{one.agreement:.2%}" if one.share else "-"
        sys.stdout.write(f"    {one.margin:>15}   {one.share:>9.1%}   {agreement:>9}\n")
