"""The tables that say how kernels are launched."""

from __future__ import annotations

import json
from importlib import resources

import pytest
import torch

from tidegate.kernels import launch
from tidegate.kernels.launch import Gpu, gpu_of, launch_for

ANY = Gpu(name="Some Future GPU", processors=100)


@pytest.mark.parametrize("folder", launch.tables())
def test_every_kernel_has_a_row_for_any_gpu_and_any_size(folder: str) -> None:
    text = resources.files(launch).joinpath(f"{folder}.json").read_text(encoding="utf-8")
    for kernel, rows in json.loads(text).items():
        last = rows[-1]
        assert (last["gpu"], last.get("at_most", {})) == ("*", {}), kernel
        assert launch_for(folder, kernel, ANY, **_huge(rows)).values == last["values"]


@pytest.mark.parametrize("folder", launch.tables())
def test_every_row_says_where_it_comes_from(folder: str) -> None:
    text = resources.files(launch).joinpath(f"{folder}.json").read_text(encoding="utf-8")
    for kernel, rows in json.loads(text).items():
        names = [set(row["values"]) for row in rows]
        assert all(one == names[0] for one in names), kernel
        for row in rows:
            assert row.keys() <= {"gpu", "at_most", "values", "source"}
            assert row["source"].startswith(("rule, not measured", "measured ")), kernel


def test_the_first_row_that_fits_is_taken() -> None:
    narrow = launch_for("pointwise", "rms_norm", ANY, columns=128)
    wide = launch_for("pointwise", "rms_norm", ANY, columns=4096)
    assert narrow["values_per_program"] < wide["values_per_program"]


def test_a_kernel_without_a_row_is_named() -> None:
    with pytest.raises(LookupError, match=r"pointwise.nothing on Some Future GPU with {'rows': 3}"):
        launch_for("pointwise", "nothing", ANY, rows=3)


def test_without_a_gpu_there_is_the_interpreter() -> None:
    assert gpu_of(torch.device("cpu")).name == "interpreted"


def _huge(rows: list[dict[str, dict[str, int]]]) -> dict[str, int]:
    return {name: 2**40 for row in rows for name in row.get("at_most", {})}
