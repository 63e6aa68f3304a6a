"""The driver: runs a recipe's passes over a model block by block and packs what comes out.

Passes that work on blocks and follow each other make one sweep: a block is read, goes through all
of them, and is on disk before the next is read. A pass that takes the whole model runs between
sweeps. The last sweep packs; with calibration text, the next block then sees what the packed one
gives, so that later layers can make up for what earlier ones lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tidegate.converters.driver.store import BlockStore, Pending, StoreWeights
from tidegate.converters.driver.work import write_whole
from tidegate.converters.passes import find_pass, is_block_pass, is_model_pass, make_pass
from tidegate.converters.passes.base import (
    Block,
    BlockPass,
    CalibrationText,
    Model,
    ModelPass,
    PassError,
    Progress,
    needs_data,
)
from tidegate.converters.rounding.packing import pack, pack_from
from tidegate.errors import ConversionError, TidegateError
from tidegate.model.blocks import block_names, block_roles, layer_of, linear_roles
from tidegate.model.packed import DenseLinear, LowRankLinear, PackedLinear
from tidegate.model.recipe import Format, PassSpec, Recipe, format_of, matches
from tidegate.model.registry import AnyArchitecture
from tidegate.model.strict_json import read
from tidegate.model.walk import Weights

if TYPE_CHECKING:
    from tidegate.converters.driver.calibrated import Calibrated

AS_IT_IS = Format(bits=32, group_size=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What to do to a model."""

    recipe: Recipe
    model: Model
    text: CalibrationText | None
    """None when no pass looks at data."""
    folder: Path
    """Where finished blocks are kept; a job that continues finds them there."""
    progress: Progress
    sees_errors: bool = True
    """Layers are calibrated on what the packed layers before them give, not on what the
    unpacked would."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """A model that is ready to be lowered."""

    arch: AnyArchitecture
    store: BlockStore
    notes: Mapping[str, str]
    """What passes could not do and why, by role."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sweep:
    passes: tuple[tuple[PassSpec, BlockPass], ...]
    last: bool
    early: bool = False
    """Nothing is packed in it nor was before: formats are measured later."""

    @property
    def label(self) -> str:
        return ", ".join(dict.fromkeys(spec.kind for spec, _ in self.passes)) or "pack"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Whole:
    spec: PassSpec
    made: ModelPass


def looks_at_data(recipe: Recipe) -> bool:
    """Whether a recipe needs calibration text."""
    return recipe.target_bpw is not None or any(map(_needs_data, recipe.passes))


def compress(job: Job) -> Packed:
    """Run a recipe, and pack.

    Raises:
        PassError: a pass cannot be applied; names it, the tensor and the passes before it.
        ConversionError: a weight is not finite; names the role.
        OSError: the folder cannot be written.
    """
    model, notes = job.model, dict[str, str]()
    done: list[str] = []
    for number, stage in enumerate(_stages(job.recipe)):
        folder = job.folder / f"stage-{number}"
        folder.mkdir(exist_ok=True)
        if isinstance(stage, _Sweep):
            store = _Sweeper(job, stage, model, folder, tuple(done)).run()
            done += [spec.kind for spec, _ in stage.passes]
        else:
            store = _whole(job, stage, model, folder, tuple(done))
            done.append(stage.spec.kind)
        notes |= store.notes()
        model = Model(arch=store.arch, weights=StoreWeights(store), reference=job.model)
    return Packed(arch=store.arch, store=store, notes=notes)


def _stages(recipe: Recipe) -> list[_Sweep | _Whole]:
    """The passes in order, those over blocks put together; the last stage is a sweep."""
    stages: list[_Sweep | _Whole] = []
    for spec in recipe.passes:
        made = make_pass(spec.kind, spec.options, spec.match)
        if is_model_pass(made):
            stages.append(_Whole(spec=spec, made=made))
            continue
        assert is_block_pass(made)
        if stages and isinstance(stages[-1], _Sweep):
            passes = (*stages[-1].passes, (spec, made))
            stages[-1] = replace(stages[-1], passes=passes)
        else:
            stages.append(_Sweep(passes=((spec, made),), last=False))
    if not stages or not isinstance(stages[-1], _Sweep):
        stages.append(_Sweep(passes=(), last=False))
    last = stages[-1]
    assert isinstance(last, _Sweep)
    stages[-1] = replace(last, last=True)
    packing = next((n for n, stage in enumerate(stages) if _packs(stage)), len(stages) - 1)
    return [
        replace(stage, early=number < packing) if isinstance(stage, _Sweep) else stage
        for number, stage in enumerate(stages)
    ]


def _packs(stage: _Sweep | _Whole) -> bool:
    """Whether a pass of the stage makes packed weights."""
    if not isinstance(stage, _Sweep):
        return False
    return any(getattr(find_pass(spec.kind), "PACKS", False) for spec, _ in stage.passes)


class _Sweeper:
    """One sweep over the blocks of a model."""

    def __init__(
        self, job: Job, sweep: _Sweep, model: Model, folder: Path, before: tuple[str, ...]
    ) -> None:
        self._job, self._sweep, self._model = job, sweep, model
        self._folder, self._before = folder, before
        self._store = BlockStore(folder, model.arch)
        self._finished: Weights = StoreWeights(self._store) if job.sees_errors else model.weights
        self._formats = self._plan()
        self._calibrated = self._calibrate()

    def run(self) -> BlockStore:
        """Finish every block that is not finished yet."""
        names = block_names(self._model.arch)
        if all(map(self._store.has, names)):
            return self._store
        for done, name in enumerate(names):
            self._job.progress(self._sweep.label, done, len(names))
            if not self._store.has(name):
                self._finish(name)
            if self._calibrated is not None and done + 1 < len(names):
                self._calibrated.advance(name, self._finished)
        if self._calibrated is not None:
            self._calibrated.close()
        self._job.progress(self._sweep.label, len(names), len(names))
        return self._store

    def _plan(self) -> Mapping[str, Format]:
        """How every linear layer will be stored."""
        recipe, arch = self._job.recipe, self._model.arch
        if recipe.target_bpw is None or self._sweep.early:
            return {role: format_of(recipe, role) for role in linear_roles(arch)}
        path = self._job.folder / "formats.json"
        if path.is_file():
            return self._planned(path)
        from tidegate.converters.rounding.mixed_precision import plan

        formats = plan(self._model, recipe, self._job.text, self._job.progress)
        body = {role: asdict(one) for role, one in formats.items()}
        write_whole(path, json.dumps(body, sort_keys=True).encode())
        return formats

    def _planned(self, path: Path) -> Mapping[str, Format]:
        """The formats that an earlier stage, or this one in an earlier run, has measured."""
        formats = {
            role: read(Format, one, f"{path.name}: {role}", ConversionError)
            for role, one in json.loads(path.read_bytes()).items()
        }
        if set(formats) != set(linear_roles(self._model.arch)):
            raise ConversionError(
                f"target_bpw = {self._job.recipe.target_bpw}: a pass changes which layers there "
                "are after others were packed: put it before them"
            )
        return formats

    def _calibrate(self) -> Calibrated | None:
        if not any(_needs_data(spec) for spec, _ in self._sweep.passes):
            return None
        from tidegate.converters.driver.calibrated import Calibrated

        assert self._job.text is not None
        return Calibrated(self._model.arch, self._job.text, self._folder, self._finished)

    def _finish(self, name: str) -> None:
        passes = [
            (spec, one)
            for spec, one in self._sweep.passes
            if any(matches(role, spec.match) for role in block_roles(self._model.arch, name))
        ]
        if all(spec.kind == "rtn" for spec, _ in passes) and (self._sweep.last or not passes):
            self._pack_from_source(name, [spec for spec, _ in passes])
            return
        block = self._load(name)
        ran = list(self._before)
        notes: dict[str, list[str]] = {}
        for spec, one in passes:
            block.notes.clear()
            self._apply(spec, one, block, ran)
            ran.append(spec.kind)
            for role, note in block.notes.items():
                notes.setdefault(role, []).append(f"{spec.kind}: {note}")
        linears = {
            role: pack(role, linear, self._format(role)) for role, linear in block.linears.items()
        }
        joined = {role: "; ".join(of) for role, of in notes.items()}
        self._store.write(name, linears, block.vectors, joined)

    def _pack_from_source(self, name: str, specs: list[PassSpec]) -> None:
        """Pack a block that no other pass touches, straight from where it lies."""
        weights = self._model.weights
        linears: dict[str, Pending] = {}
        vectors = {}
        for role, what in block_roles(self._model.arch, name).items():
            if not what.is_linear:
                vectors[role] = weights.vector(role)
                continue
            rounding = next((spec for spec in specs if matches(role, spec.match)), None)
            clip = rounding is not None and bool(rounding.options["clip"])
            linears[role] = pack_from(weights, role, what.shape, self._format(role), clip=clip)
        self._store.write(name, linears, vectors, {})

    def _format(self, role: str) -> Format:
        return self._formats[role] if self._sweep.last else AS_IT_IS

    def _load(self, name: str) -> Block:
        of = block_roles(self._model.arch, name)
        weights = self._model.weights
        return Block(
            name=name,
            layer=layer_of(name),
            linears={role: weights.linear(role) for role, one in of.items() if one.is_linear},
            vectors={role: weights.vector(role) for role, one in of.items() if not one.is_linear},
            formats=self._formats,
        )

    def _apply(self, spec: PassSpec, one: BlockPass, block: Block, ran: list[str]) -> None:
        data = None
        if self._calibrated is not None and _needs_data(spec):
            data = self._calibrated.data(block)
        old: dict[str, object] = {**block.linears, **block.vectors}
        with _naming(spec.kind, block.name, ran):
            one.apply(block, self._model.arch, data)
            now: dict[str, object] = {**block.linears, **block.vectors}
            for role, weight in now.items():
                if weight is not old.get(role) and not _is_finite(weight):
                    raise PassError(f"{role}: became infinite or not a number")


def _whole(
    job: Job, stage: _Whole, model: Model, folder: Path, before: tuple[str, ...]
) -> BlockStore:
    """Run a pass that takes the whole model, and store what it makes."""
    path = folder / "architecture.json"
    if path.is_file():
        kind = type(model.arch)
        arch = read(kind, json.loads(path.read_bytes()), path.name, ConversionError)
        return BlockStore(folder, arch)
    with _naming(stage.spec.kind, "model", before):
        made = stage.made.apply(_with_formats(model, job.recipe), job.text, job.progress)
    store = BlockStore(folder, made.arch)
    for name in block_names(made.arch):
        linears: dict[str, Pending] = {}
        vectors = {}
        for role, what in block_roles(made.arch, name).items():
            if what.is_linear:
                linears[role] = pack(role, made.weights.linear(role), AS_IT_IS)
            else:
                vectors[role] = made.weights.vector(role)
        with _naming(stage.spec.kind, name, before):
            store.write(name, linears, vectors, {})
    write_whole(path, json.dumps(asdict(made.arch), sort_keys=True).encode())
    return store


def _with_formats(model: Model, recipe: Recipe) -> Model:
    """Tell how its weights will be stored, unless that is measured later."""
    if recipe.target_bpw is not None:
        return model
    roles = linear_roles(model.arch)
    return replace(model, formats={role: format_of(recipe, role) for role in roles})


@contextmanager
def _naming(kind: str, where: str, before: Sequence[str]) -> Iterator[None]:
    """Say which pass failed, where and after which others."""
    context = f" (after {', '.join(before)})" if before else " (the first pass)"
    try:
        yield
    except TidegateError as error:
        raise PassError(f"pass {kind}: {where}: {error}{context}") from error
    except OSError:  # a full disk is not the pass's fault, and the work can go on after it
        raise
    except Exception as error:  # a pass is a border: whatever it trips over is reported as its own
        what = f"{type(error).__name__}: {error}"
        raise PassError(f"pass {kind}: {where}: {what}{context}") from error


def _needs_data(spec: PassSpec) -> bool:
    module = find_pass(spec.kind)
    assert module is not None, spec.kind
    return needs_data(module, module.Options(**spec.options))


def _is_finite(weight: object) -> bool:
    match weight:
        case np.ndarray():
            return bool(np.isfinite(weight).all())
        case DenseLinear():
            return _is_finite(weight.weight) and _is_finite(weight.bias)
        case LowRankLinear():
            return _is_finite(weight.first) and _is_finite(weight.second)
        case PackedLinear():
            return _is_finite(weight.scales) and _is_finite(weight.bias)
        case _:
            return True
