"""Safetensors: what is written is read back, by us and by the reference, and nothing else is."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import bfloat16_bytes, safetensors_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from safetensors import safe_open

from tidegate.errors import CheckpointError
from tidegate.model.safetensors_file import SafetensorsFile
from tidegate.model.safetensors_header import STORED_AS, header_bytes, parse_header
from tidegate.model.safetensors_writer import write_safetensors

DTYPES = sorted({np.dtype(kind) for name, kind in STORED_AS.items() if name != "BF16"}, key=str)
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: st_numpy.arrays(dtype, st_numpy.array_shapes(min_dims=0, min_side=0, max_side=4))
)
NAMES = st.text(min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__" and name.isprintable()
)


def same(one: npt.NDArray[np.generic], other: npt.NDArray[np.generic]) -> bool:
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )


def file_of(tmp_path: Path, header: object, body: bytes = b"") -> Path:
    encoded = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + body)
    return path


@settings(deadline=None, max_examples=150)
@given(tensors=st.dictionaries(NAMES, ARRAYS, max_size=6))
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, npt.NDArray[np.generic]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.safetensors"
    write_safetensors(path, tensors, {"format": "np"})
    with SafetensorsFile(path) as ours, safe_open(path, "np") as reference:
        assert set(ours.entries) == set(tensors) == set(reference.keys())
        assert reference.metadata() == {"format": "np"}
        for name, values in tensors.items():
            assert same(ours.read_raw(name), values)
            assert same(reference.get_tensor(name), values)


@settings(deadline=None, max_examples=100)
@given(
    shape=st_numpy.array_shapes(max_side=5),
    dtype=st.sampled_from(["F16", "F32", "BF16"]),
    data=st.data(),
)
def test_rows_are_those_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, ...],
    dtype: str,
    data: st.DataObject,
) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    path = tmp_path_factory.getbasetemp() / "rows.safetensors"
    path.write_bytes(safetensors_bytes({"other": np.ones(3), "x": values}, dtype=dtype))
    first = data.draw(st.integers(0, shape[0]))
    after = data.draw(st.integers(first, shape[0]))
    with SafetensorsFile(path) as file:
        part = file.read("x", (first, after))
        assert same(part, file.read("x")[first:after])


@pytest.mark.parametrize("rows", [(-1, 1), (0, 4), (2, 1)])
def test_rows_that_are_not_there_are_refused(tmp_path: Path, rows: tuple[int, int]) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": np.ones((3, 2), np.float32), "one": np.ones((), np.float32)})
    with SafetensorsFile(path) as file:
        with pytest.raises(CheckpointError, match=r"x: rows .* \(3, 2\)"):
            file.read("x", rows)
        with pytest.raises(CheckpointError, match="one: rows"):
            file.read("one", (0, 1))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_a_tensor_larger_than_a_chunk_is_widened_exactly(tmp_path: Path, dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal((1031, 1027)).astype(np.float32)
    stored = {"F64": values.astype("<f8"), "F32": values, "F16": values.astype("<f2")}
    body = bfloat16_bytes(values) if dtype == "BF16" else stored[dtype].tobytes()
    entry = {"dtype": dtype, "shape": [*values.shape], "data_offsets": [0, len(body)]}
    expected = stored.get(dtype, values).astype(np.float32)
    if dtype == "BF16":
        bits = np.frombuffer(body, "<u2").astype(np.uint32) << 16
        expected = bits.view(np.float32).reshape(values.shape)
    with SafetensorsFile(file_of(tmp_path, {"x": entry}, body)) as file:
        assert same(file.read("x"), expected)
        assert same(file.read("x", (1000, 1031)), expected[1000:])


def test_reading_costs_the_result_and_one_chunk(tmp_path: Path) -> None:
    values = np.ones((2048, 4096), np.float32)
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"x": values}, dtype="BF16"))
    with SafetensorsFile(path) as file:
        tracemalloc.start()
        try:
            file.read("x")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < values.nbytes + (1 << 20)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I32", "MX9"])
def test_a_type_that_holds_no_weights_is_refused_by_name(tmp_path: Path, dtype: str) -> None:
    nbytes = 4 if dtype == "I32" else 1
    header = {"x": {"dtype": dtype, "shape": [1], "data_offsets": [0, nbytes]}}
    with SafetensorsFile(file_of(tmp_path, header, b"\0" * nbytes)) as file:
        with pytest.raises(CheckpointError, match=f"dtype '{dtype}'"):
            file.read("x")
        if dtype != "I32":
            with pytest.raises(CheckpointError, match=f"dtype '{dtype}'"):
                file.read_raw("x")


def test_a_bfloat16_is_read_raw_as_its_bits(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"x": np.array([1.0, -2.0])}, dtype="BF16"))
    with SafetensorsFile(path) as file:
        assert same(file.read_raw("x"), np.array([0x3F80, 0xC000], np.uint16))


def test_a_file_that_shrinks_while_it_is_open_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": np.ones(5000, np.float32)})
    with SafetensorsFile(path) as file:
        with path.open("r+b") as other:
            other.truncate(1000)
        with pytest.raises(CheckpointError, match=r"x\.safetensors: x: is truncated"):
            file.read("x")


@pytest.mark.parametrize(
    ("shape", "offsets", "problem"),
    [
        ([1], [0, 4 << 40], "ends beyond"),
        ([2], [0, 4], "do not hold"),
        ([0, 1 << 70], [0, 0], "no array can have its shape"),
        ([1] * 65, [0, 4], "no array can have its shape"),
        ([1], [4, 0], "do not hold"),
        ([10**4000, 10**4000], [0, 4], "no array can have its shape"),
        ([1], [0, 10**4290], "ends beyond"),
        ([True], [0, 4], "malformed"),
        ([1.0], [0, 4], "malformed"),
        ([1], [0, 4, 4], "malformed"),
    ],
)
def test_an_entry_that_cannot_be_is_refused(
    tmp_path: Path, shape: list[int], offsets: list[int], problem: str
) -> None:
    header = {"x": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: .*{problem}"):
        SafetensorsFile(file_of(tmp_path, header, bytes(4)))


@settings(deadline=None, max_examples=300)
@given(encoded=st.binary(max_size=60), total=st.integers(0, 2**65))
def test_any_header_is_parsed_or_refused(encoded: bytes, total: int) -> None:
    with suppress(CheckpointError):
        header_bytes(encoded[:8], total)
    with suppress(CheckpointError):
        parse_header(encoded, total)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["F32", "BF16", "I8", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(header=st.dictionaries(NAMES, JSON, max_size=3), total=st.integers(0, 400))
def test_any_json_is_parsed_or_refused(header: dict[str, object], total: int) -> None:
    encoded = json.dumps(header).encode()
    with suppress(CheckpointError):
        entries = parse_header(encoded, total)
        assert sum(entry.stop - entry.start for entry in entries.values()) == total - 8 - len(
            encoded
        )


def test_the_same_tensors_make_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    tensors: dict[str, npt.NDArray[np.generic]] = {
        "b": np.arange(3, dtype=np.int8),
        "a": np.ones((2, 2), np.float32),
    }
    write_safetensors(tmp_path / "one", tensors, {"z": "1", "y": "2"})
    write_safetensors(
        tmp_path / "two", {"a": tensors["a"], "b": tensors["b"]}, {"y": "2", "z": "1"}
    )
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with SafetensorsFile(tmp_path / "one") as file:
        assert file.entries["a"].start % 8 == 0
        assert file.entries["a"].stop == file.entries["b"].start


def test_a_transposed_or_foreign_endian_array_is_written_by_its_values(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"turned": values.T, "big": values.astype(">f4")})
    with SafetensorsFile(path) as file:
        assert same(file.read("turned"), np.ascontiguousarray(values.T))
        assert same(file.read("big"), values)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": np.ones(3, np.float32)})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="complex128"):
        write_safetensors(path, {"a": np.ones(2, np.float32), "x": np.ones(3, np.complex128)})
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["x.safetensors"]
