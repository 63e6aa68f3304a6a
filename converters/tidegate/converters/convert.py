"""Checkpoint in, bundle out: quantise, lower to each target, write the manifest.

Nothing is visible at the destination before everything is written and flushed, and weights are
read, packed and written one layer at a time.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tidegate.converters.recipe import RecipeWeights
from tidegate.errors import CheckpointError, ConversionError
from tidegate.model.architecture import Architecture
from tidegate.model.bundle import MANIFEST_FILE, Bundle, BundleWriter
from tidegate.model.checkpoint import TEXT_FILES, Checkpoint, read_json_object
from tidegate.model.manifest import Manifest, MemoryNeed, Recipe, Target
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
        arch = checkpoint.architecture
        context = _context(arch, plan.context_tokens)
        _copy_text_files(checkpoint, writer.folder)
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


def _copy_text_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy tokenizer, chat template and generation settings; only the tokenizer must exist."""
    tokenizer = read_json_object(checkpoint.folder / "tokenizer.json")
    _check_vocabulary(tokenizer, checkpoint.architecture)
    for name in TEXT_FILES:
        source = checkpoint.folder / name
        if source.is_file():
            (folder / name).write_bytes(source.read_bytes())
    if not (folder / "chat_template.jinja").exists():
        template = _template_of(checkpoint.folder / "tokenizer_config.json")
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if not (folder / "generation_config.json").exists():
        keys = ("bos_token_id", "eos_token_id")
        settings = {key: checkpoint.config[key] for key in keys if key in checkpoint.config}
        (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _check_vocabulary(tokenizer: dict[str, object], arch: Architecture) -> None:
    """A token that the embedding has no row for would read another's memory: refuse it here."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict | list):
        raise CheckpointError("tokenizer.json: has no model.vocab")
    added = tokenizer.get("added_tokens")
    listed = added if isinstance(added, list) else []
    ids = [token.get("id", 0) for token in listed if isinstance(token, dict)]
    if isinstance(vocabulary, dict):
        ids += [token for token in vocabulary.values() if isinstance(token, int)]
    highest = max([len(vocabulary) - 1, *ids])
    if highest >= arch.vocab:
        raise CheckpointError(
            f"tokenizer.json: token id {highest}: the embedding has {arch.vocab} rows"
        )


def _template_of(path: Path) -> str | None:
    if not path.is_file():
        return None
    template = read_json_object(path).get("chat_template")
    return template if isinstance(template, str) else None


def _next_version(out: Path) -> int:
    if not (out / MANIFEST_FILE).is_file():
        return 1
    return Manifest.from_bytes((out / MANIFEST_FILE).read_bytes()).version + 1


def _toolchain(targets: tuple[Target, ...]) -> dict[str, str]:
    return {target: importlib.metadata.version(target) for target in targets}
