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
from tidegate.edge.executors.kv_size import kv_bytes_per_token, kv_precision, kv_size
from tidegate.edge.executors.openvino_model import KvPrecision
from tidegate.edge.memory import check_memory, check_model, memory_need, weights_need
from tidegate.engine.facts import Described
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


def test_a_budget_for_kv_makes_the_pool_smaller_or_takes_rows_away(large: Manifest) -> None:
    settings = ExecutorSettings(rows=4, kv_mib=64)
    each = kv_bytes_per_token(large.decoder, "openvino", "u8")
    paged = kv_size(large, "openvino", settings)
    assert (paged.rows, paged.context_tokens) == (4, 2048)
    assert paged.kv_tokens % 32 == 0
    assert 64 * MIB - 32 * each < paged.kv_tokens * each <= 64 * MIB
    # 2 048 tokens of float32 are 88 MiB.
    slots = kv_size(large, "onnx", ExecutorSettings(rows=4, kv_mib=200))
    assert (slots.rows, slots.context_tokens, slots.kv_tokens) == (2, 2048, 4096)


def test_a_budget_below_one_context_shortens_it_unless_it_was_asked_for(large: Manifest) -> None:
    short = kv_size(large, "onnx", ExecutorSettings(rows=4, kv_mib=44))
    assert (short.rows, short.context_tokens, short.kv_tokens) == (1, 1024, 1024)
    paged = kv_size(large, "openvino", ExecutorSettings(rows=4, kv_mib=10))
    assert (paged.rows, paged.context_tokens) == (4, paged.kv_tokens)
    asked = ExecutorSettings(rows=4, kv_mib=44, context_tokens=2048)
    with pytest.raises(ConfigError, match=r"kv_mib = 44: must be at least 88, for a context of"):
        kv_size(large, "onnx", asked)
    with pytest.raises(ConfigError, match=r"kv_mib = 1: must be at least 2, for a context of 32"):
        kv_size(large, "onnx", ExecutorSettings(kv_mib=1))


@given(
    rows=st.integers(1, 8),
    kv_mib=st.integers(2, 1000),
    target=st.sampled_from(["onnx", "openvino"]),
    precision=st.sampled_from([None, "f16", "u8"]),
)
def test_kv_never_takes_more_than_its_budget(
    large: Manifest, rows: int, kv_mib: int, target: DeviceTarget, precision: KvPrecision | None
) -> None:
    settings = ExecutorSettings(rows=rows, kv_mib=kv_mib, kv_precision=precision)
    found = kv_size(large, target, settings)
    each = kv_bytes_per_token(large.decoder, target, kv_precision(large.decoder, target, settings))
    assert found.kv_tokens * each <= kv_mib * MIB
    assert 1 <= found.rows <= rows
    assert 32 <= found.context_tokens <= min(2048, found.kv_tokens)
    need = memory_need(large, target, settings).to_json()
    assert need["kv_bytes"] == int(found.kv_tokens * each)


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_an_executor_allocates_what_its_budget_leaves(
    bundle: Bundle, target: DeviceTarget, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ExecutorSettings(choice=target, rows=16, kv_mib=1, threads=1, step_tokens=32)
    executor = open_executor(bundle, settings)
    size = kv_size(bundle.manifest, target, settings)
    try:
        assert isinstance(executor, Described)
        assert executor.facts.kv_bytes <= MIB
        assert executor.limits.step_rows == size.rows
        assert executor.limits.context_tokens == size.context_tokens
    finally:
        executor.close()
    if size.rows < 16 or size.context_tokens < 256:
        assert "kv_mib = 1 leaves room for" in caplog.text


def test_weights_beyond_what_a_board_takes_are_refused_with_the_sum(large: Manifest) -> None:
    need = memory_need(large, "onnx", ExecutorSettings(), others=(large,))
    check_model(need, None)
    check_model(need, 1410)
    with pytest.raises(ConfigError, match=r"max_model_mib = 1409: must be at least 1410") as caught:
        check_model(need, 1409)
    assert "weights of other bundles" in str(caught.value)
    assert "KV" not in str(caught.value)
    check_model(weights_need(large.memory.weight_bytes), 705)
