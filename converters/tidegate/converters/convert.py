"""Checkpoint in, bundle out: run the recipe, lower to each target, write the manifest.

Nothing is visible at the destination before everything is written and flushed. What is finished
on the way lies in a work folder, so a conversion that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from tidegate.converters.driver.pipeline import Job, Packed, compress, looks_at_data
from tidegate.converters.driver.store import StoreWeights
from tidegate.converters.driver.work import WorkFolder, conversion_key
from tidegate.converters.lora import Lora
from tidegate.converters.onnx.variant_names import Variant
from tidegate.converters.packed import export_packed
from tidegate.converters.passes.base import CalibrationText, Model, Progress
from tidegate.converters.recipe_file import check_patterns
from tidegate.errors import BundleError, ConfigError, ConversionError
from tidegate.model.bundle import MANIFEST_FILE, Bundle, BundleWriter
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.manifest import Calibration, Manifest, MemoryNeed, Target
from tidegate.model.packed_target import FORMAT
from tidegate.model.recipe import PassSpec, Recipe
from tidegate.model.registry import AnyArchitecture
from tidegate.model.text_files import write_text_files
from tidegate.model.walk import Weights

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionPlan:
    """What to make of a checkpoint."""

    model_id: str
    targets: tuple[Target, ...]
    recipe: Recipe
    context_tokens: int | None = None
    """Longest prompt plus answer to serve; the checkpoint's own limit when None."""
    text: Path | None = None
    """Calibration text for passes that look at data; one that comes along when None."""
    sees_errors: bool = True
    """See `tidegate.converters.driver.pipeline.Job`."""
    lora: Path | None = None
    """A PEFT adapter folder that is added to the weights first."""
    graphs: tuple[Variant, ...] = ()
    """Further ONNX graphs over the same weights."""
    restart: bool = False
    """Drop what an interrupted conversion to the same place has finished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion(Bundle):
    """A bundle, and what its making could not do."""

    notes: Mapping[str, str]
    """What passes had to leave and why, by role."""


def convert(
    folder: Path, out: Path, plan: ConversionPlan, progress: Progress | None = None
) -> Conversion:
    """Convert a Hugging Face checkpoint folder to a bundle at `out`.

    An existing bundle at `out` is replaced and its version number continued. If the process is
    killed or the disk is full, the same call goes on where it stopped.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or of an unknown kind.
        ConfigError: the recipe does not fit the model.
        ConversionError: a pass fails, a target cannot express the model, or the disk is full.
        BundleError: `out` cannot be written or is something else than a bundle.
    """
    if not out.name:
        raise BundleError(f"{out}: must be a folder of its own")
    report = progress or _silent
    with (
        _naming_a_full_disk(out),
        Checkpoint.open(folder, context=plan.context_tokens) as checkpoint,
        BundleWriter(out) as writer,
        nullcontext() if plan.lora is None else Lora.open(plan.lora) as lora,
    ):
        check_patterns(plan.recipe, checkpoint.architecture)
        _check_graphs(plan, checkpoint.architecture)
        write_text_files(checkpoint, writer.folder)
        text = _calibration_text(checkpoint, writer.folder, plan)
        settings = {
            "sees_errors": plan.sees_errors,
            "lora": None if lora is None else lora.sha256,
            "graphs": plan.graphs,
        }
        key = conversion_key(checkpoint, plan.recipe, text, settings)
        work = WorkFolder(out, key, restart=plan.restart)
        with work:
            return _convert(checkpoint, lora, writer, plan, text, work, report)


@contextmanager
def _naming_a_full_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ConversionError(
            f"{out.parent.resolve()}: the disk is full, or a limit on file sizes is reached: what "
            "is finished is kept; make room and run the same command again"
        ) from error


def _convert(
    checkpoint: Checkpoint,
    lora: Lora | None,
    writer: BundleWriter,
    plan: ConversionPlan,
    text: CalibrationText | None,
    work: WorkFolder,
    progress: Progress,
) -> Conversion:
    weights: Weights = checkpoint.weights()
    if lora is not None:
        weights = lora.merged(weights, checkpoint.sources)
    packed = compress(
        Job(
            recipe=plan.recipe,
            model=Model(arch=checkpoint.architecture, weights=weights),
            text=text,
            folder=work.path,
            progress=progress,
            sees_errors=plan.sees_errors,
        )
    )
    work.keep_when_refused = bool(plan.recipe.passes)
    toolchain: dict[str, str] = {target: _written_by(target) for target in plan.targets}
    for target in plan.targets:
        finished = work.path / f"{target}-{toolchain[target]}"
        if not finished.is_dir():
            with _appearing(finished) as partial:
                _export(target, packed, partial, progress)
                if target == "onnx" and plan.graphs:
                    assert text is not None, "read for what is measured on it"
                    _add_graphs(plan.graphs, packed, text, partial, progress)
        _link_tree(finished, writer.folder / target)
    bits, nbytes = StoreWeights(packed.store).bits_and_bytes()
    manifest = Manifest(
        model_id=plan.model_id,
        version=_next_version(writer.out),
        architecture=packed.arch,
        context_tokens=packed.arch.context,
        recipe=_as_done(plan, lora),
        calibration=_calibration(text),
        tensor_bits=bits,
        targets=plan.targets,
        toolchain=toolchain,
        memory=MemoryNeed(weight_bytes=nbytes, kv_values_per_token=_kv_values(packed.arch)),
        files=writer.entries(),
    )
    bundle = writer.finish(manifest)
    return Conversion(folder=bundle.folder, manifest=bundle.manifest, notes=packed.notes)


def _as_done(plan: ConversionPlan, lora: Lora | None) -> Recipe:
    """The recipe as the manifest tells it: the adapter came first, further graphs last."""
    passes = [*plan.recipe.passes, *(PassSpec(kind=one, options={}) for one in plan.graphs)]
    if lora is not None:
        merge = {"folder": lora.folder.name, "sha256": lora.sha256}
        passes.insert(0, PassSpec(kind="lora", options=merge))
    return replace(plan.recipe, passes=tuple(passes))


@contextmanager
def _appearing(finished: Path) -> Iterator[Path]:
    """A folder to write to, which appears as `finished` when all of it is on the disk."""
    folder = finished.with_name(f"{finished.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    folder.rename(finished)


def _written_by(target: Target) -> str:
    """The version of the library that writes a target; our own format has its number."""
    return str(FORMAT) if target == "packed" else importlib.metadata.version(target)


def _export(target: Target, packed: Packed, folder: Path, progress: Progress) -> None:
    """Lower to one target."""
    if target == "packed":
        export_packed(packed.store, folder, lambda *one: progress(f"packed: {one[0]}", *one[1:]))
        return
    weights = StoreWeights(packed.store)
    try:
        _lower(target, packed.arch, weights, folder, progress)
    finally:
        weights.close()


def _check_graphs(plan: ConversionPlan, arch: AnyArchitecture) -> None:
    if plan.graphs and "onnx" not in plan.targets:
        raise ConfigError("graphs", ",".join(plan.graphs), "left out without the onnx target")
    if plan.graphs and isinstance(arch, EncoderArchitecture):
        raise ConfigError("graphs", ",".join(plan.graphs), f"left out: {arch.model_type} has no KV")


def _add_graphs(
    graphs: tuple[Variant, ...],
    packed: Packed,
    text: CalibrationText,
    folder: Path,
    progress: Progress,
) -> None:
    """Write further graphs of a finished ONNX target, by what the text shows of its activations."""
    from tidegate.converters.onnx.ranges import measure_ranges
    from tidegate.converters.onnx.variants import write_variants

    assert not isinstance(packed.arch, EncoderArchitecture), "refused before"
    weights = StoreWeights(packed.store)
    try:
        ranges = measure_ranges(packed.arch, weights, text, folder, progress)
    finally:
        weights.close()
    write_variants(folder, packed.arch, graphs, ranges)


def _lower(
    target: Target, arch: AnyArchitecture, weights: Weights, folder: Path, progress: Progress
) -> None:
    """Imported here, so that one target needs not the other's library."""

    def report(what: str, done: int, total: int) -> None:
        progress(f"{target}: {what}", done, total)

    if isinstance(arch, EncoderArchitecture):
        if target == "onnx":
            from tidegate.converters.onnx.encoder_ops import export_onnx_encoder

            export_onnx_encoder(arch, weights, folder, progress=report)
        else:
            from tidegate.converters.openvino.encoder_ops import export_openvino_encoder

            export_openvino_encoder(arch, weights, folder, progress=report)
    elif target == "onnx":
        from tidegate.converters.onnx.ops import export_onnx

        export_onnx(arch, weights, folder, progress=report)
    else:
        from tidegate.converters.openvino.ops import export_openvino

        export_openvino(arch, weights, folder, progress=report)


def _link_tree(source: Path, folder: Path) -> None:
    """The files of `source` under `folder` too, without a copy where the file system can."""
    folder.mkdir()
    for path in sorted(source.iterdir()):
        try:
            os.link(path, folder / path.name)
        except OSError:
            shutil.copyfile(path, folder / path.name)


def _calibration_text(
    checkpoint: Checkpoint, files: Path, plan: ConversionPlan
) -> CalibrationText | None:
    if not looks_at_data(plan.recipe) and not plan.graphs:
        if plan.text is not None:
            problem = f"left out: no pass of recipe {plan.recipe.name!r} looks at data"
            raise ConfigError("text", str(plan.text), problem)
        return None
    from tidegate.converters.calibration import read_calibration_text

    return read_calibration_text(files, checkpoint.architecture, plan.text)


def _calibration(text: CalibrationText | None) -> Calibration | None:
    if text is None:
        return None
    tokens = sum(len(sequence) for sequence in text.sequences)
    return Calibration(text=text.name, text_sha256=text.sha256, tokens=tokens)


def _kv_values(arch: AnyArchitecture) -> int:
    return 0 if isinstance(arch, EncoderArchitecture) else arch.kv_values_per_token


def _next_version(out: Path) -> int:
    if not (out / MANIFEST_FILE).is_file():
        return 1
    return Manifest.from_bytes((out / MANIFEST_FILE).read_bytes()).version + 1


def _silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""
