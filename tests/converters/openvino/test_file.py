"""An OpenVINO graph whose constants were streamed: same values, same bytes, little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
import openvino.opset13 as op
import pytest
from openvinomodels import Packing, export
from tinymodel import tiny_architecture

from tidegate.converters.openvino.file import ALIGNMENT_BYTES
from tidegate.converters.openvino.weights import ConstantFile


def saved(folder: Path, constants: ConstantFile, nodes: list[Any]) -> dict[str, Any]:
    """Save a graph that returns the nodes and read it back: its constants by name."""
    results = [op.result(node) for node in nodes]
    constants.save(ov.Model(results, [], "x"), folder / "model.xml")
    model = ov.Core().read_model(folder / "model.xml")
    ops = model.get_ops()
    return {node.get_friendly_name(): node for node in ops if node.get_type_name() == "Constant"}


def test_constants_come_back_with_their_values_whoever_holds_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    floats = rng.standard_normal((5, 7), np.float32)
    given: dict[str, tuple[npt.NDArray[np.generic], Any]] = {
        "floats": (floats, ov.Type.f32),
        "halves": (floats.astype(np.float16), ov.Type.f16),
        "bytes": (rng.integers(0, 256, (3, 1), np.uint8), ov.Type.u8),
        "turned": (floats.T, ov.Type.f32),
        "big endian": (floats.astype(">f4"), ov.Type.f32),
        "nothing": (np.zeros((0, 4), np.float32), ov.Type.f32),
        "rank 0": (np.array(7, np.int64), ov.Type.i64),
        "zeros": (np.zeros((5, 7), np.float32), ov.Type.f32),
    }
    with ConstantFile(tmp_path / "scratch") as constants:
        nodes = []
        for name, (values, kind) in given.items():
            nodes.append(constants.constant(values, kind, values.shape))
            nodes[-1].set_friendly_name(name)
        own = np.array([3, 1, 4], np.int64)
        nodes += [op.constant(own, name=name) for name in ("held", "held again")]
        found = saved(tmp_path, constants, nodes)
    assert set(found) == {*given, "held", "held again"}
    for name, (values, _) in given.items():
        assert found[name].data.shape == values.shape
        assert np.array_equal(found[name].data, values), name
    for name in ("held", "held again"):
        assert found[name].data.tolist() == [3, 1, 4]


def test_parts_are_one_constant_and_nibbles_stay_packed(tmp_path: Path) -> None:
    packed = np.arange(24, dtype=np.uint8).reshape(3, 8)
    with ConstantFile(tmp_path / "scratch") as constants:
        parts = constants.constant((row for row in packed), ov.Type.u4, (3, 4, 4))
        odd = constants.constant(np.array([0x21, 0x03], np.uint8), ov.Type.u4, (3,))
        parts.set_friendly_name("parts")
        odd.set_friendly_name("odd")
        found = saved(tmp_path, constants, [parts, odd])
    data = (tmp_path / "model.bin").read_bytes()
    assert data[:24] == packed.tobytes()
    assert data[ALIGNMENT_BYTES:] == b"\x21\x03"
    assert list(found["parts"].shape) == [3, 4, 4]


def test_a_constant_that_is_used_twice_is_stored_once(tmp_path: Path) -> None:
    values = np.ones(1000, np.float32)
    with ConstantFile(tmp_path / "scratch") as constants:
        node = constants.constant(values, ov.Type.f32, (1000,))
        saved(tmp_path, constants, [op.add(node, node), node])
    assert (tmp_path / "model.bin").stat().st_size == values.nbytes


def test_bytes_that_do_not_fill_the_shape_are_refused(tmp_path: Path) -> None:
    with (
        ConstantFile(tmp_path / "scratch") as constants,
        pytest.raises((AssertionError, RuntimeError)),
    ):
        constants.constant(np.zeros(3, np.float32), ov.Type.f32, (4,))
    assert not (tmp_path / "scratch").exists()


def test_every_export_writes_the_same_bytes(tmp_path: Path) -> None:
    arch = tiny_architecture(layers=2)
    for name in ("one", "two"):
        export(arch, tmp_path / name, Packing(symmetric=False))
    for file in ("model.xml", "model.bin"):
        one, two = ((tmp_path / name / file).read_bytes() for name in ("one", "two"))
        assert one == two


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    program = Path(__file__).resolve().parents[2] / "support/exportpeak.py"
    done = subprocess.run(
        [sys.executable, program, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.bin").stat().st_size > 150 << 20
    # OpenVINO's own nodes and the XML that it builds from them, 0.8 MiB a layer; the weights are 7.
    assert int(done.stdout) < 30 << 10
