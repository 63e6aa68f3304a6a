"""Checkpoint in, bundle out: quantise, lower to each target, write the manifest.

Nothing is visible at the destination before everything is written and flushed, and weights are
read, packed and written one layer at a time.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tidegate.converters.recipe import RecipeWeights
from tidegate.errors import ConversionError
from tidegate.model.architecture import Architecture
from tidegate.model.bundle import MANIFEST_FILE, Bundle, BundleWriter
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.manifest import Manifest, MemoryNeed, Target
from tidegate.model.recipe import Recipe
from tidegate.model.text_files import write_text_files
from tidegate.model.walk import Weights

Progress = Callable[[str, int, int], None]
"""Told (what, done, total) as the work goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionPlan:
    """What to make of a checkpoint."""

    model_id: str
    targets: tuple[Target, ...]
    recipe: Recipe
    context_tokens: int | None = None
    """Longest prompt plus answer to serve; the checkpoint's own limit when None."""


def convert(
    folder: Path, out: Path, plan: ConversionPlan, progress: Progress | None = None
) -> Bundle:
    """Convert a Hugging Face checkpoint folder to a bundle at `out`.

    An existing bundle at `out` is replaced and its version number continued.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or of an unknown kind.
        ConversionError: a target cannot express the model.
        BundleError: `out` cannot be written or is something else than a bundle.
    """
    with Checkpoint.open(folder) as checkpoint, BundleWriter(out) as writer:
        arch = checkpoint.decoder
        context = _context(arch, plan.context_tokens)
        write_text_files(checkpoint, writer.folder)
        weights = RecipeWeights(checkpoint.weights(), plan.recipe)
        for target in plan.targets:
            _export(target, arch, weights, writer.folder / target, progress)
        manifest = Manifest(
            model_id=plan.model_id,
            version=_next_version(out),
            architecture=arch,
            context_tokens=context,
            recipe=plan.recipe,
            tensor_bits=weights.tensor_bits,
            targets=plan.targets,
            toolchain=_toolchain(plan.targets),
            memory=MemoryNeed(
                weight_bytes=weights.nbytes, kv_values_per_token=arch.kv_values_per_token
            ),
            files=writer.entries(),
        )
        return writer.finish(manifest)


def _export(
    target: Target, arch: Architecture, weights: Weights, folder: Path, progress: Progress | None
) -> None:
    """Lower to one target. Imported here, so that one target needs not the other's library."""
    folder.mkdir()

    def report(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{target}: {what}", done, total)

    if target == "onnx":
        from tidegate.converters.onnx_ops import export_onnx

        export_onnx(arch, weights, folder, progress=report)
    else:
        from tidegate.converters.openvino_ops import export_openvino

        export_openvino(arch, weights, folder, progress=report)


def _context(arch: Architecture, wanted: int | None) -> int:
    if wanted is not None and not 1 <= wanted <= arch.context:
        raise ConversionError(f"context = {wanted}: must be from 1 to the model's {arch.context}")
    return wanted or arch.context


def _next_version(out: Path) -> int:
    if not (out / MANIFEST_FILE).is_file():
        return 1
    return Manifest.from_bytes((out / MANIFEST_FILE).read_bytes()).version + 1


def _toolchain(targets: tuple[Target, ...]) -> dict[str, str]:
    return {target: importlib.metadata.version(target) for target in targets}
