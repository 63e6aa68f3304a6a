"""The sum of a daemon's memory: it covers what executors allocate, and says what would fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wordmodel import write_word_checkpoint

from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import make_recipe
from tidegate.edge.executors.choice import ExecutorSettings, open_executor
from tidegate.edge.executors.openvino_model import KvPrecision
from tidegate.edge.memory import check_memory, kv_bytes_per_token, kv_precision, memory_need
from tidegate.errors import ConfigError
from tidegate.model.bundle import Bundle
from tidegate.model.manifest import DeviceTarget, Manifest, MemoryNeed

MIB = 1 << 20


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("memory")
    checkpoint = write_word_checkpoint(folder / "model", context=256)
    recipe = make_recipe(bits=4, group_size=64, symmetric=False)
    plan = ConversionPlan(model_id="tiny", targets=("onnx", "openvino"), recipe=recipe)
    return convert(checkpoint, folder / "bundle", plan)


@pytest.fixture(scope="module")
def large(bundle: Bundle) -> Manifest:
    """The shape of TinyLlama-1.1B in 4 bits."""
    arch = replace(
        bundle.manifest.decoder,
        layers=22,
        width=2048,
        heads=32,
        kv_heads=4,
        head_size=64,
        inner=5632,
        vocab=32_000,
        context=2048,
    )
    memory = MemoryNeed(weight_bytes=659_873_792, kv_values_per_token=arch.kv_values_per_token)
    return replace(bundle.manifest, architecture=arch, context_tokens=2048, memory=memory)


@pytest.mark.parametrize(
    ("target", "precision"),
    [
        ("onnx", None),
        ("openvino", None),
        ("openvino", "u8"),
        ("openvino", "u4"),
        ("openvino", "f16"),
    ],
)
def test_the_kv_of_an_executor_is_what_was_predicted(
    bundle: Bundle, target: DeviceTarget, precision: KvPrecision | None
) -> None:
    settings = ExecutorSettings(choice=target, rows=2, threads=1, kv_precision=precision)
    executor = open_executor(bundle, settings)
    try:
        arch = bundle.manifest.decoder
        kept = kv_precision(arch, target, settings)
        predicted = kv_bytes_per_token(arch, target, kept)
        assert executor.kv.bytes_per_token <= predicted + 1
        assert executor.kv.bytes_per_token >= 0.8 * predicted
    finally:
        executor.close()


@pytest.mark.parametrize(("target", "measured_mib"), [("openvino", 994), ("onnx", 1222)])
def test_the_sum_covers_what_was_measured_and_stays_near_it(
    large: Manifest, target: DeviceTarget, measured_mib: int
) -> None:
    """RSS after the largest steps, 1.1 B weights, 4 rows of 2048 tokens, steps of 256."""
    settings = ExecutorSettings(choice=target, rows=4, context_tokens=2048, step_tokens=256)
    need = memory_need(large, target, settings)
    assert measured_mib * MIB <= need.nbytes <= 1.08 * measured_mib * MIB


def test_what_fits_is_accepted_and_what_does_not_is_refused_with_the_sum(large: Manifest) -> None:
    settings = ExecutorSettings(choice="onnx", rows=4)
    need = memory_need(large, "onnx", settings, cache_bytes=8 * MIB)
    enough = -(-need.nbytes // MIB)
    for budget, available in ((enough, 1 << 40), (None, enough * MIB)):
        check_memory(
            large, "onnx", settings, need=need, budget_mib=budget, available_bytes=available
        )
    with pytest.raises(ConfigError) as caught:
        check_memory(large, "onnx", settings, need=need, budget_mib=1000, available_bytes=1 << 40)
    message = str(caught.value)
    assert message.startswith(f"memory_mib = 1000: must be at least {enough}, which is\n")
    for line in ("weights ", "KV, 4 x 2048 tokens in f32", "352 MiB", "steps of 256", "sum "):
        assert line in message
    assert message.endswith("this would fit: --context 2048 --rows 1")
    with pytest.raises(ConfigError, match=r"(?s)MiB of memory available = 500: .*nothing smaller"):
        check_memory(large, "onnx", settings, need=need, budget_mib=2000, available_bytes=500 * MIB)


def test_coarser_kv_is_proposed_before_fewer_rows(large: Manifest) -> None:
    settings = ExecutorSettings(choice="openvino", rows=4, kv_precision="f32")
    need = memory_need(large, "openvino", settings)
    with pytest.raises(ConfigError, match=r"--context 2048 --rows 4 --kv-precision f16$"):
        check_memory(
            large,
            "openvino",
            settings,
            need=need,
            budget_mib=need.nbytes // MIB - 100,
            available_bytes=1 << 40,
        )


def test_other_bundles_count_with_their_weights(large: Manifest) -> None:
    settings = ExecutorSettings(choice="onnx")
    alone = memory_need(large, "onnx", settings)
    beside = memory_need(large, "onnx", settings, others=(large,))
    assert beside.nbytes - alone.nbytes > large.memory.weight_bytes
    assert "weights of other bundles" in beside.lines()
    assert beside.to_json()["sum_bytes"] == beside.nbytes


@given(
    context=st.integers(64, 2048),
    rows=st.integers(1, 8),
    share=st.floats(0.3, 1.0),
    target=st.sampled_from(["onnx", "openvino"]),
)
def test_what_is_proposed_fits(
    large: Manifest, context: int, rows: int, share: float, target: DeviceTarget
) -> None:
    settings = ExecutorSettings(choice=target, rows=rows, context_tokens=context)
    need = memory_need(large, target, settings)
    limit = int(need.nbytes * share)
    try:
        check_memory(large, target, settings, need=need, budget_mib=None, available_bytes=limit)
    except ConfigError as error:
        assert limit < need.nbytes
        words = str(error).rsplit("this would fit: ", 1)
        if len(words) == 1:
            return
        flags = dict(zip(words[1].split()[::2], words[1].split()[1::2], strict=True))
        smaller = replace(
            settings, context_tokens=int(flags["--context"]), rows=int(flags["--rows"])
        )
        if "--kv-precision" in flags:
            assert flags["--kv-precision"] in ("f16", "u8", "u4")
            return
        assert memory_need(large, target, smaller).nbytes <= limit
    else:
        assert limit >= need.nbytes
