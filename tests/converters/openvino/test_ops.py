"""The graph that OpenVINO compiles: compressed, merged, fused, and written without loss.

What the graph computes is tested through its executor, tests/edge/test_openvino_executor.py.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import openvino as ov
import pytest
from openvinomodels import PACKINGS, Packing, export, kernels
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.openvino.ops import export_openvino, openvino_version
from tidegate.errors import ConversionError
from tidegate.model.packed import DenseLinear, Linear, PackedLinear

LAYERS = 2


def of_kind(found: Counter[tuple[str, str]], kind: str) -> dict[str, int]:
    return {precision: count for (name, precision), count in found.items() if name == kind}


@pytest.mark.parametrize("tied_head", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_every_weight_stays_compressed_in_the_compiled_graph(
    packing: Packing, tied_head: bool, tmp_path: Path
) -> None:
    arch = tiny_architecture(layers=LAYERS, tied_head=tied_head)
    export(arch, tmp_path, packing)
    found = kernels(tmp_path, arch)
    precision = "f32" if packing.bits is None else f"u{packing.bits}"
    # q, k and v are one product, gate and up another; then o, down and the head.
    assert of_kind(found, "FullyConnected") == {precision: 4 * LAYERS + 1}
    assert precision in of_kind(found, "Gather")
    assert not of_kind(found, "MatMul")


def test_norms_and_rotations_are_single_kernels(tmp_path: Path) -> None:
    arch = tiny_architecture(layers=LAYERS)
    export(arch, tmp_path, Packing())
    found = kernels(tmp_path, arch)
    assert of_kind(found, "RMS") == {"f32": 2 * LAYERS + 1}
    assert of_kind(found, "RoPE") == {"f32": 2 * LAYERS}
    assert of_kind(found, "PagedAttention") == {"f32": LAYERS}


def test_a_padded_input_does_not_decompress_the_weight(tmp_path: Path) -> None:
    arch = tiny_architecture(layers=LAYERS, width=160)
    export(arch, tmp_path, Packing(group_size=128))
    assert of_kind(kernels(tmp_path, arch), "FullyConnected") == {"u4": 4 * LAYERS + 1}


def test_a_layer_of_other_bits_is_not_merged(tmp_path: Path) -> None:
    def pack(role: str, linear: DenseLinear) -> Linear:
        return Packing(bits=8 if role.endswith(".v") else 4)(role, linear)

    arch = tiny_architecture(layers=LAYERS)
    export(arch, tmp_path, pack)
    found = of_kind(kernels(tmp_path, arch), "FullyConnected")
    assert found == {"u4": 4 * LAYERS + 1, "u8": LAYERS}


def test_a_tied_table_is_written_once_and_weights_as_they_are(tmp_path: Path) -> None:
    arch = tiny_architecture(layers=1)
    weights = export(arch, tmp_path, Packing(symmetric=False))
    roles = ["embed", *(f"layers.0.{name}" for name in ("q", "k", "v", "o", "gate", "up", "down"))]
    packed = [weights.linear(role) for role in roles]
    nbytes = sum(linear.nbytes for linear in packed if isinstance(linear, PackedLinear))
    # Norms, tables of angles and alignment are the rest.
    assert nbytes <= (tmp_path / "model.bin").stat().st_size <= nbytes + 40_000


def test_only_the_two_files_of_the_graph_are_left(tmp_path: Path) -> None:
    export(tiny_architecture(layers=1), tmp_path / "openvino", Packing())
    assert sorted(path.name for path in (tmp_path / "openvino").iterdir()) == [
        "model.bin",
        "model.xml",
    ]


def test_the_graph_says_which_version_wrote_it(tmp_path: Path) -> None:
    export(tiny_architecture(layers=1), tmp_path, Packing())
    core = ov.Core()
    core.get_versions("CPU")
    model = core.read_model(tmp_path / "model.xml")
    assert model.get_rt_info(["tidegate", "openvino"]).astype(str) == openvino_version()


def test_progress_is_told_layer_by_layer(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    arch = tiny_architecture(layers=3)
    export_openvino(arch, RandomWeights(arch), tmp_path, progress=lambda *what: told.append(what))
    assert told == [
        *(("layers", layer, 3) for layer in (1, 2, 3)),
        ("write", 0, 1),
        ("write", 1, 1),
    ]


def test_a_file_that_cannot_be_written_is_a_conversion_error(tmp_path: Path) -> None:
    (tmp_path / "model.bin").mkdir()
    arch = tiny_architecture(layers=1)
    with pytest.raises(ConversionError, match=r"model\.xml"):
        export_openvino(arch, RandomWeights(arch), tmp_path)
    assert not (tmp_path / "constants.scratch").exists()
