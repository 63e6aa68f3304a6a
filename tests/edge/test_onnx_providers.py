"""Execution providers as settings: order, options, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.edge.executors.onnx_providers import ProviderName, Providers
from tidegate.errors import ConfigError

EVERYTHING = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


def test_providers_keep_their_order_and_get_their_own_options(tmp_path: Path) -> None:
    wanted = Providers(names=("tensorrt", "cuda", "cpu"), device=1, tensorrt_cache=tmp_path)
    assert wanted.for_session(EVERYTHING) == [
        (
            "TensorrtExecutionProvider",
            {
                "device_id": "1",
                "trt_fp16_enable": "True",
                "trt_engine_cache_enable": "True",
                "trt_engine_cache_path": str(tmp_path),
            },
        ),
        ("CUDAExecutionProvider", {"device_id": "1"}),
        "CPUExecutionProvider",
    ]


def test_tensorrt_keeps_no_engines_unless_it_is_told_where() -> None:
    (provider,) = Providers(names=("tensorrt",), tensorrt_fp16=False).for_session(EVERYTHING)
    assert provider == (
        "TensorrtExecutionProvider",
        {"device_id": "0", "trt_fp16_enable": "False"},
    )


@pytest.mark.parametrize("names", [("cpu", "cuda"), ("cuda", "cpu"), ("tensorrt",)])
def test_anything_but_the_cpu_alone_is_accelerated(names: tuple[ProviderName, ...]) -> None:
    assert Providers(names=names).accelerated
    assert not Providers().accelerated


def test_a_provider_that_this_build_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(ConfigError, match=r"providers = 'cuda': must be one of cpu, tensorrt"):
        Providers(names=("cpu", "cuda")).for_session([EVERYTHING[0], EVERYTHING[2]])


def test_wrong_settings_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"providers = \['npu'\]: must be some of cpu, cuda"):
        Providers(names=("npu",))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"providers = \[\]"):
        Providers(names=())
    with pytest.raises(ConfigError, match=r"providers = .*names each once"):
        Providers(names=("cpu", "cpu"))
    with pytest.raises(ConfigError, match=r"providers\.device = -1"):
        Providers(device=-1)
    with pytest.raises(ConfigError, match=r"providers\.tensorrt_cache = .*existing folder"):
        Providers(names=("tensorrt",), tensorrt_cache=tmp_path / "nowhere")
