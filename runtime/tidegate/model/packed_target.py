"""The `packed` target of a bundle: weights by role, for who runs the walk itself.

One safetensors file per block (`packed/embed.safetensors`, `packed/layers.0.safetensors`, ...,
`packed/final.safetensors`), with tensors as `linear_file` names them: scales in float16 and dense
weights in bfloat16 or float16 wherever that loses nothing, zero-points of 4 bits two to a byte.
The tensor `:forms` holds, as JSON, the format's number and the `PackedForm` of each packed weight.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tidegate.errors import BundleError, CheckpointError
from tidegate.model.blocks import block_names, block_of, block_roles
from tidegate.model.cuts import WHOLE, Cut
from tidegate.model.linear_file import PackedForm, is_low_rank, keeps_groups, read_linear
from tidegate.model.packed import Array, DenseLinear, Linear, LowRankLinear, PackedLinear
from tidegate.model.registry import AnyArchitecture
from tidegate.model.roles import Role
from tidegate.model.safetensors_file import FileIdentity, SafetensorsFile
from tidegate.model.stored import StoredLinear, is_finite, read_stored
from tidegate.model.strict_json import read

TARGET: Final = "packed"
FORMAT: Final = 1
FORMS: Final = ":forms"
"""The tensor with what a file says about itself."""
_DENSE: Final = ("F32", "F16", "BF16")
_GROUP_SIZES: Final = range(8, 1 << 20)
_MOST_FORMS_BYTES: Final = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class FileForms:
    """What a file says about itself."""

    format: int
    forms: Mapping[str, PackedForm]
    """Of each packed weight, by its name."""


class PackedWeights:
    """`tidegate.model.walk.Weights` over the target's files.

    All of them stay open, one per block: a name may mean another file later, which nobody verified.
    """

    def __init__(self, folder: Path, arch: AnyArchitecture) -> None:
        """Check that the files hold every role of `arch` in its shape, and nothing else.

        Args:
            folder: of the target, verified; see `Bundle.target_folder`.
            arch: of the bundle's manifest.

        Raises:
            BundleError: a file is missing or damaged, of another format, or holds something else
                than the architecture asks for; the message names the file and the role.
        """
        self._files: dict[str, tuple[SafetensorsFile, FileForms]] = {}
        blocks = block_names(arch)
        known = {f"{block}.safetensors" for block in blocks}
        for path in sorted(folder.iterdir()):
            if path.name not in known:
                raise BundleError(f"{TARGET}/{path.name}: is no block of the architecture")
        with ExitStack() as opened:
            for block in blocks:
                with _naming_the_target():
                    path = folder / f"{block}.safetensors"
                    file = opened.enter_context(SafetensorsFile(path))
                    forms = _read_forms(file)
                    _check_block(file, forms, block_roles(arch, block))
                    self._files[block] = file, forms
            self._close = weakref.finalize(self, opened.pop_all().close)

    @property
    def identities(self) -> Mapping[str, FileIdentity]:
        """Of the open files, by name."""
        return {file.path.name: file.identity for file, _ in self._files.values()}

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`.

        Raises:
            BundleError: the file cannot be read any more, or a number is not finite.
        """
        return self._linear(role, WHOLE)

    def part(self, role: str, cut: Cut) -> Linear | None:
        """See `CutWeights`; None for a cut within a group."""
        with _naming_the_target():
            _, forms = self._block(role)
        return self._linear(role, cut) if keeps_groups(role, forms.forms, cut) else None

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        with _naming_the_target():
            file, _ = self._block(role)
            values = file.read(role)
        return _finite(role, values)

    def stored(self, role: str, cut: Cut = WHOLE) -> StoredLinear | None:
        """See `HasStored`."""
        with _naming_the_target():
            file, _ = self._block(role)
            name = f"{role}:weight"
            entry = file.entries.get(name)
            if entry is None or entry.dtype == "F32":
                return None
            bias = None
            if f"{role}:bias" in file.entries:
                bias = file.read(f"{role}:bias", cut.rows)
            return read_stored(file, name, (0, entry.shape[0]), cut, bias)

    def close(self) -> None:
        """Close the files; they are closed too when nobody uses this object any more."""
        self._close()

    def _linear(self, role: str, cut: Cut) -> Linear:
        with _naming_the_target():
            file, forms = self._block(role)
            found = read_linear(file, role, forms.forms, cut)
        _check_finite(role, found)
        return found

    def _block(self, role: str) -> tuple[SafetensorsFile, FileForms]:
        return self._files[block_of(role)]


def _read_forms(file: SafetensorsFile) -> FileForms:
    entry = file.entries.get(FORMS)
    if entry is None or entry.dtype != "U8" or entry.stop - entry.start > _MOST_FORMS_BYTES:
        raise CheckpointError(f"{file.path.name}: has no tensor {FORMS!r} of bytes")
    try:
        body = json.loads(file.read_raw(FORMS).tobytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.path.name}: {FORMS}: is not JSON") from error
    found = read(FileForms, body, f"{file.path.name}: {FORMS}", CheckpointError)
    if found.format != FORMAT:
        raise CheckpointError(
            f"{file.path.name}: format = {found.format}: this release reads {FORMAT}"
        )
    return found


def _check_block(file: SafetensorsFile, forms: FileForms, known: Mapping[str, Role]) -> None:
    """Every role is there in its shape, and no other tensor."""
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for name, role in known.items():
        if role.is_linear:
            expected |= _expected(file, name, forms.forms, role.shape, bias=role.bias)
        else:
            expected[name] = (role.shape, ("F32",))
    for name, (shape, dtypes) in expected.items():
        entry = file.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{file.path.name}: has no tensor {name!r}")
        if entry.shape != shape or entry.dtype not in dtypes:
            raise CheckpointError(
                f"{file.path.name}: {name}: {entry.dtype} {entry.shape}: the architecture asks for "
                f"{' or '.join(dtypes)} {shape}"
            )
    for name in file.entries:
        if name not in expected and name != FORMS:
            raise CheckpointError(f"{file.path.name}: {name}: is no part of the architecture")


def _expected(
    file: SafetensorsFile,
    name: str,
    forms: Mapping[str, PackedForm],
    shape: tuple[int, ...],
    *,
    bias: bool,
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shapes and types of the tensors of a linear layer [out, in]."""
    outputs, inputs = shape
    if is_low_rank(name, file.entries, forms):
        rank = _rank(file, name, forms)
        first = _expected(file, f"{name}:first", forms, (rank, inputs), bias=False)
        return first | _expected(file, f"{name}:second", forms, (outputs, rank), bias=bias)
    # Converters may add a bias where the architecture has none; never leave one out.
    found: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    if bias or f"{name}:bias" in file.entries:
        found[f"{name}:bias"] = ((outputs,), ("F32",))
    if name not in forms:
        return found | {f"{name}:weight": (shape, _DENSE)}
    form = forms[name]
    fits = form.group_size * form.bits % 8 == 0 and form.group_size in _GROUP_SIZES
    if form.inputs != inputs or not fits:
        raise CheckpointError(
            f"{file.path.name}: {name}: {form.inputs} inputs in groups of {form.group_size}: the "
            f"architecture asks for {inputs}"
        )
    groups = (outputs, form.groups)
    found[f"{name}:values"] = ((*groups, form.group_bytes), ("U8",))
    found[f"{name}:scales"] = (groups, ("F16", "F32"))
    if f"{name}:zeros4" in file.entries and form.bits == 4:
        found[f"{name}:zeros4"] = ((outputs, -(-form.groups // 2)), ("U8",))
    elif f"{name}:zeros" in file.entries:
        found[f"{name}:zeros"] = (groups, ("U8",))
    return found


def _rank(file: SafetensorsFile, name: str, forms: Mapping[str, PackedForm]) -> int:
    """Outputs of the first factor, which its tensors are held against in turn."""
    part = "values" if f"{name}:first" in forms else "weight"
    entry = file.entries.get(f"{name}:first:{part}")
    if entry is None or not entry.shape:
        raise CheckpointError(f"{file.path.name}: has no tensor '{name}:first:{part}'")
    return entry.shape[0]


def _check_finite(role: str, linear: Linear) -> None:
    match linear:
        case LowRankLinear():
            _check_finite(role, linear.first)
            _check_finite(role, linear.second)
            return
        case PackedLinear():
            _finite(role, linear.scales)
        case DenseLinear():
            _finite(role, linear.weight)
    if linear.bias is not None:
        _finite(role, linear.bias)


def _finite(role: str, values: Array) -> Array:
    if not is_finite(values):
        raise BundleError(f"{TARGET}: {role}: holds numbers that are not finite")
    return values


@contextmanager
def _naming_the_target() -> Iterator[None]:
    """A damaged file of a bundle is the bundle's error."""
    try:
        yield
    except CheckpointError as error:
        raise BundleError(f"{TARGET}/{error}") from error
