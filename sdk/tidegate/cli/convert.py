"""Turn a Hugging Face checkpoint into a bundle.

A recipe says what is done to the weights: one that comes along (fast, balanced, quality, tiny) or a
TOML file of your own, see docs/recipes.md. Without one, weights are rounded to nearest at --bits.
A conversion that was interrupted goes on where it stopped when it is run again.

Example:
  tidegate convert examples/assistant/edge --out assistant --bits 4 --group-size 64
  tidegate convert examples/assistant/edge --out assistant --recipe fast
  tidegate convert examples/assistant/edge --out tried --compare fast,tiny --measure notes.txt
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.cli.board import add_profile, check_fits, check_weights, read_profile
from tidegate.errors import ConfigError
from tidegate.model.bundle import Bundle
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.manifest import TARGETS, Target
from tidegate.model.quality import EmbeddingQuality, Quality
from tidegate.model.registry import AnyArchitecture

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tidegate.converters.convert import Conversion, ConversionPlan
    from tidegate.converters.passes.base import Progress
    from tidegate.model.recipe import Recipe

_BITS, _ENCODER_BITS, _GROUP_SIZE = 4, 8, 64
_SHOWN = 3
"""Weights that a note is shown with; all of them are in the JSON."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "checkpoint", help="folder with config.json and safetensors, or an id such as org/name"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the bundle to")
    parser.add_argument(
        "--target",
        default="onnx,openvino",
        help="onnx and openvino for devices, packed for the cloud; several with commas (default:"
        " onnx,openvino)",
    )
    parser.add_argument("--recipe", help="name of a recipe, or a TOML file (docs/recipes.md)")
    add_profile(parser, "the recipe and graphs of a decoder, and how large a model may be")
    parser.add_argument(
        "--bits", type=int, help="bits per weight: 4 or 8 (default 4; 8 for encoders)"
    )
    parser.add_argument(
        "--group-size", type=int, help="inputs per scale: 32, 64 or 128 (default 64)"
    )
    parser.add_argument("--symmetric", action="store_true", help="no zero-points")
    parser.add_argument(
        "--target-bpw", type=float, help="bits per weight to meet by mixing formats"
    )
    parser.add_argument(
        "--text", type=Path, help="calibration text: a text file, or chats as .jsonl"
    )
    parser.add_argument("--lora", type=Path, help="PEFT adapter folder to add to the weights")
    parser.add_argument(
        "--graphs",
        help="further ONNX graphs over the same weights: int8kv (8-bit KV), fp16 (for GPUs) or "
        "both with a comma",
    )
    parser.add_argument("--context", type=int, help="longest prompt plus answer, in tokens")
    parser.add_argument("--name", help="model id to serve it under (default: the folder's name)")
    parser.add_argument(
        "--restart", action="store_true", help="begin anew, not where a conversion was interrupted"
    )
    parser.add_argument(
        "--compare",
        metavar="RECIPES",
        help="convert by each of these (names or TOML files, with commas) to OUT/NAME, and print "
        "quality beside size; needs --measure",
    )
    parser.add_argument(
        "--measure",
        type=Path,
        metavar="TEXT",
        help="evaluate the result on this text, as `tidegate evaluate`, and record what it cost",
    )
    parser.add_argument("--plot", type=Path, help="write the comparison as a page, .html")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Convert, and print what came out."""
    from tidegate.cli.interrupts import interrupted_between_steps
    from tidegate.cli.progress import progress_bars
    from tidegate.converters.convert import ConversionPlan, convert
    from tidegate.converters.hub import find_checkpoint, model_name
    from tidegate.converters.onnx.variant_names import parse_variants

    _check_flags(args)
    board = None if args.profile is None else read_profile(args.profile).runtime
    targets, recipe = parse_targets(args.target), _recipe(args, _BITS)
    checkpoint = find_checkpoint(args.checkpoint)
    if board is not None and not _is_encoder(checkpoint):
        args.recipe = board.recipe
        recipe = _recipe(args, _BITS)
        if args.graphs is None and "onnx" in targets and board.graphs:
            args.graphs = ",".join(board.graphs)
    if args.recipe is None and args.bits is None and _is_encoder(checkpoint):
        recipe = _recipe(args, _ENCODER_BITS)
    if board is not None:
        check_fits(checkpoint, recipe, board)
    plan = ConversionPlan(
        model_id=args.name or model_name(args.checkpoint, checkpoint),
        targets=targets,
        recipe=recipe,
        context_tokens=args.context,
        text=args.text,
        lora=args.lora,
        graphs=() if args.graphs is None else parse_variants(args.graphs),
        restart=args.restart,
    )
    try:
        if args.compare is not None:
            return _compare(args, checkpoint, plan)
        with (
            progress_bars(quiet=args.quiet or args.json) as bars,
            interrupted_between_steps(bars) as report,
        ):
            made = convert(checkpoint, args.out, plan, report)
            if board is not None:
                check_weights(made.manifest.memory.weight_bytes, board)
            if args.measure is not None:
                made = _measured(made, checkpoint, args.measure, report)
    except KeyboardInterrupt:
        again = "what is finished is kept, and the same command goes on from there"
        print(f"tidegate: interrupted: {again}", file=sys.stderr)
        raise
    if args.json:
        notes = {"notes": dict(made.notes)} if made.notes else {}
        print(json.dumps(summary(made) | notes, indent=2))
    else:
        print_summary(made)
        print_notes(made.notes)
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that would have no effect beside, or without, `--compare`."""
    from tidegate.cli.plots import check_plot

    if args.measure is not None and not args.measure.is_file():
        raise ConfigError("measure", str(args.measure), "a text file")
    if args.profile is not None:
        said = {"recipe": args.recipe, "compare": args.compare, "bits": args.bits}
        said |= {"group-size": args.group_size, "symmetric": args.symmetric or None}
        for flag, value in said.items():
            if value is not None:
                raise ConfigError(flag, value, "left out with --profile, which names the recipe")
    if args.measure is not None and args.lora is not None:
        allowed = "left out with --measure, which holds it against the checkpoint without it"
        raise ConfigError("lora", str(args.lora), allowed)
    if args.compare is None:
        if args.plot is not None:
            raise ConfigError("plot", str(args.plot), "left out without --compare")
        return
    if args.measure is None:
        raise ConfigError("compare", args.compare, "given with --measure, the text to compare on")
    flags = {
        "recipe": args.recipe,
        "bits": args.bits,
        "group-size": args.group_size,
        "symmetric": args.symmetric,
        "target-bpw": args.target_bpw,
    }
    for flag, value in flags.items():
        if value not in (None, False):
            raise ConfigError(flag, value, "left out with --compare, whose recipes say it")
    check_plot(args.plot)


def _compare(args: argparse.Namespace, checkpoint: Path, plan: ConversionPlan) -> int:
    """Convert by several recipes and print the table."""
    from tidegate.cli.comparing import compare, plans_of, print_comparison
    from tidegate.cli.progress import progress_bars

    plans = plans_of(args.compare, plan)
    with progress_bars(quiet=args.quiet or args.json) as report:
        candidates = compare(checkpoint, args.out, plans, args.measure, report)
    title = f"{plan.model_id}: recipes compared"
    print_comparison(candidates, title=title, plot=args.plot, as_json=args.json)
    return 0


def _measured(made: Conversion, checkpoint: Path, text: Path, report: Progress) -> Conversion:
    """Evaluate a new bundle, and put what it cost into its manifest."""
    from tidegate.cli.evaluate import measure
    from tidegate.cli.evaluating import EvaluationSettings
    from tidegate.model.bundle import replace_manifest
    from tidegate.model.checkpoint import Checkpoint

    with Checkpoint.open(checkpoint, context=made.manifest.context_tokens) as opened:
        quality = measure(made, opened, text, EvaluationSettings(), report)
    manifest = replace(made.manifest, quality=quality)
    return replace(made, manifest=replace_manifest(made, manifest).manifest)


def _is_encoder(checkpoint: Path) -> bool:
    """Whether a checkpoint is an encoder's: those lose more by 4 bits, and are small."""
    from tidegate.model.checkpoint import read_json_object
    from tidegate.model.encoder import EncoderArchitecture
    from tidegate.model.registry import describe

    return isinstance(describe(read_json_object(checkpoint / "config.json")), EncoderArchitecture)


def _recipe(args: argparse.Namespace, bits: int) -> Recipe:
    """The recipe that the flags name or make, of `bits` unless they say how many."""
    from tidegate.converters.recipe import make_recipe
    from tidegate.converters.recipe_file import load_recipe, with_target

    if args.recipe is None:
        recipe = make_recipe(
            bits=bits if args.bits is None else args.bits,
            group_size=_GROUP_SIZE if args.group_size is None else args.group_size,
            symmetric=args.symmetric,
        )
    else:
        flags = {"bits": args.bits, "group-size": args.group_size, "symmetric": args.symmetric}
        for flag, value in flags.items():
            if value not in (None, False):
                raise ConfigError(flag, value, "left out with --recipe, which says it")
        recipe = load_recipe(args.recipe)
    return recipe if args.target_bpw is None else with_target(recipe, args.target_bpw)


def print_notes(notes: Mapping[str, str]) -> None:
    """What passes could not do: every note once, with the weights that it is about."""
    roles: dict[str, list[str]] = {}
    for role, note in notes.items():
        roles.setdefault(note, []).append(role)
    for number, (note, about) in enumerate(roles.items()):
        more = f" and {len(about) - _SHOWN} more" if len(about) > _SHOWN else ""
        heading = "notes" if number == 0 else ""
        sys.stdout.write(f"  {heading:<11} {', '.join(about[:_SHOWN])}{more}: {note}\n")


def parse_targets(text: str) -> tuple[Target, ...]:
    """Read `onnx,openvino`; `ConfigError` names a word that is none of them."""
    found: list[Target] = []
    for word in text.split(","):
        target = next((one for one in TARGETS if one == word.strip()), None)
        if target is None:
            raise ConfigError("target", word, f"one of {', '.join(TARGETS)}")
        if target not in found:
            found.append(target)
    return tuple(found)


def summary(bundle: Bundle) -> dict[str, object]:
    """What a person or a script wants to know of a bundle."""
    manifest = bundle.manifest
    arch, memory = manifest.architecture, manifest.memory
    return {
        "bundle": str(bundle.folder),
        "model_id": manifest.model_id,
        "version": manifest.version,
        "model_type": arch.model_type,
        "parameters": arch.parameters,
        "context_tokens": manifest.context_tokens,
        "outputs": _outputs(arch),
        "recipe": asdict(manifest.recipe),
        "bits_per_weight": round(memory.weight_bytes * 8 / arch.parameters, 3),
        "weight_bytes": memory.weight_bytes,
        "kv_bytes_per_token": {
            "u8": memory.kv_values_per_token,
            "f16": 2 * memory.kv_values_per_token,
            "f32": 4 * memory.kv_values_per_token,
        },
        "targets": {
            target: sum(
                entry.size_bytes
                for name, entry in manifest.files.items()
                if name.startswith(f"{target}/")
            )
            for target in manifest.targets
        },
        "toolchain": dict(manifest.toolchain),
        "calibration": None if manifest.calibration is None else asdict(manifest.calibration),
        "quality": None if manifest.quality is None else asdict(manifest.quality),
        "signed_by": None if manifest.signature is None else manifest.signature.public_key,
        "files": {name: entry.size_bytes for name, entry in sorted(manifest.files.items())},
    }


def _outputs(arch: AnyArchitecture) -> dict[str, object]:
    """What a model gives, and how many numbers."""
    if not isinstance(arch, EncoderArchitecture):
        return {"kind": "text", "values": arch.vocab}
    if arch.labels:
        return {"kind": "classes", "values": arch.outputs, "labels": list(arch.labels)}
    return {"kind": "embeddings", "values": arch.outputs}


def _made_of_a_text(arch: AnyArchitecture) -> str:
    if not isinstance(arch, EncoderArchitecture):
        return "text"
    if arch.labels:
        return f"one of {len(arch.labels)} classes: {', '.join(arch.labels)}"
    return f"embeddings of {arch.outputs} values"


def print_summary(bundle: Bundle) -> None:
    """The same for people, on stdout."""
    from tidegate.converters.onnx.variant_names import FILES

    facts = summary(bundle)
    manifest = bundle.manifest
    kinds = [one.kind for one in manifest.recipe.passes if one.kind not in FILES]
    graphs = [name for name, file in FILES.items() if f"onnx/{file}" in manifest.files]
    passes = ", ".join(kinds) or "round to nearest"
    signature = manifest.signature
    lines = {
        "model": f"{manifest.model_id}, version {manifest.version} ({facts['model_type']})",
        "parameters": f"{manifest.architecture.parameters:,}",
        "context": f"{manifest.context_tokens} tokens",
        "weights": f"recipe {manifest.recipe.name}: {passes};"
        f" {facts['bits_per_weight']} bits per weight in all",
        "text": _calibration(bundle),
        "makes": _made_of_a_text(manifest.architecture),
        "quality": _quality(bundle),
        "memory": f"{manifest.memory.weight_bytes / 1e6:.2f} MB of weights,"
        f" {manifest.memory.kv_values_per_token} B of KV per token at 8 bits",
        "targets": ", ".join(
            f"{target} {manifest.toolchain[target]}" for target in manifest.targets
        )
        + "".join(f", {name} graph" for name in graphs),
        "verified": f"{len(manifest.files)} files,"
        f" {sum(entry.size_bytes for entry in manifest.files.values()) / 1e6:.2f} MB",
        "signed by": "nobody" if signature is None else signature.public_key,
    }
    sys.stdout.write(f"{bundle.folder}\n")
    for name, value in lines.items():
        if value:
            sys.stdout.write(f"  {name:<11} {value}\n")


def _calibration(bundle: Bundle) -> str:
    """The text that passes looked at; nothing when none did."""
    text = bundle.manifest.calibration
    return "" if text is None else f"{text.tokens:,} tokens of {text.text}, for calibration"


def _quality(bundle: Bundle) -> str:
    """The short of what an evaluation has recorded."""
    match bundle.manifest.quality:
        case None:
            return "not measured; see tidegate evaluate --record"
        case Quality() as found:
            return (
                f"mean KL divergence {found.kl_mean:.5f}, agreement {found.agreement:.2%},"
                f" on {found.text}"
            )
        case EmbeddingQuality() as found:
            return f"cosine {found.cosine_mean:.5f}, least {found.cosine_min:.5f}, on {found.text}"
