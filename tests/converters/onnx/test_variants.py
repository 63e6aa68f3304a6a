"""Variants of the ONNX graph against the torch reference: int8 KV, and float16 throughout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from tinymodel import RandomWeights, tiny_architecture
from torchreference import TorchReference

from tidegate.converters.onnx.ops import export_onnx
from tidegate.converters.onnx.ranges import LayerRanges, measure_ranges
from tidegate.converters.onnx.variant_names import FILES, Variant, parse_variants
from tidegate.converters.onnx.variants import write_variants
from tidegate.converters.passes.base import CalibrationText
from tidegate.converters.rounding.rtn import quantise
from tidegate.edge.executors.onnx import UNIT_TOKENS, OnnxExecutor, OnnxSettings
from tidegate.edge.executors.onnx_session import KvPrecision
from tidegate.engine.executor import ExecutorStep, Logits, Row
from tidegate.engine.spill import KvUnit
from tidegate.errors import BundleError, ConfigError, ConversionError
from tidegate.model.architecture import Architecture, LayerKind
from tidegate.model.rope import Rope

PRECISIONS: dict[Variant, KvPrecision] = {"int8kv": "int8", "fp16": "float16"}
TOKENS = 48


def weights_of(arch: Architecture) -> RandomWeights:
    return RandomWeights(
        arch, quantise=lambda _, dense: quantise(dense, bits=4, group_size=32, symmetric=False)
    )


def text(arch: Architecture, count: int = 6) -> CalibrationText:
    rng = np.random.default_rng(8)
    found = tuple(tuple(rng.integers(0, arch.vocab, TOKENS).tolist()) for _ in range(count))
    return CalibrationText(name="random", sha256="0" * 64, sequences=found, all_sequences=found)


def silent(what: str, done: int, total: int) -> None:
    pass


def made(arch: Architecture, folder: Path, variants: Sequence[Variant]) -> RandomWeights:
    """Export a random model with variants, calibrated on the tokens that tests run."""
    weights = weights_of(arch)
    export_onnx(arch, weights, folder)
    ranges = measure_ranges(arch, weights, text(arch), folder, silent)
    write_variants(folder, arch, variants, ranges)
    return weights


def steps(arch: Architecture) -> list[ExecutorStep]:
    """Sequences of the text in three slots: chunks, then ragged decodes."""
    sequences = [np.array(one) for one in text(arch).sequences[:3]]

    def row(slot: int, past: int, count: int) -> Row:
        return Row(tokens=sequences[slot][past : past + count], past=past, slot=slot)

    return [
        ExecutorStep(rows=(row(0, 0, 17), row(2, 0, 5))),
        ExecutorStep(rows=(row(1, 0, 29), row(0, 17, 1), row(2, 5, 1))),
        ExecutorStep(rows=(row(0, 18, 9),)),
        *(
            ExecutorStep(rows=(row(2, 6 + i, 1), row(0, 27 + i, 1), row(1, 29 + i, 1)))
            for i in range(19)
        ),
    ]


def logits_of(executor: OnnxExecutor | TorchReference, arch: Architecture) -> Logits:
    found = []
    for step in steps(arch):
        result = executor.execute(step)
        found.append(result if isinstance(result, np.ndarray) else result.logits)
    return np.concatenate(found)


def relative_error(found: Logits, expected: Logits) -> float:
    """Root mean square of the difference, beside that of the logits."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def errors(arch: Architecture, folder: Path, variant: Variant) -> tuple[float, float]:
    """Errors of the plain graph and of the variant, both against the reference."""
    weights = made(arch, folder, [variant])
    expected = logits_of(TorchReference(arch, weights, slots=3, tokens=TOKENS), arch)
    found = []
    for precision in ("float32", PRECISIONS[variant]):
        settings = OnnxSettings(
            slots=3,
            context_tokens=TOKENS,
            step_tokens=TOKENS,
            threads=1,
            kv_precision=precision,
        )
        executor = OnnxExecutor(folder, arch, settings)
        found.append(relative_error(logits_of(executor, arch), expected))
        executor.close()
    return found[0], found[1]


def with_kind(**changes: object) -> Architecture:
    arch = tiny_architecture()
    return dataclasses.replace(arch, kinds=(dataclasses.replace(arch.kinds[0], **changes),))  # type: ignore[arg-type]


MODELS: dict[str, Architecture] = {
    "plain": tiny_architecture(),
    "a window": with_kind(window=8),
    "no rotation": with_kind(rope=None),
    # Heads of 40 are filled up to 48 for the operator, and their halves laid out anew.
    "odd heads": dataclasses.replace(
        tiny_architecture(), head_size=40, kinds=(LayerKind(rope=Rope.plain(10000.0, 40)),)
    ),
    "softcap": dataclasses.replace(tiny_architecture(), attention_softcap=0.7),
}


@pytest.mark.parametrize("model", MODELS)
def test_int8_kv_adds_little_to_what_int8_activations_cost(tmp_path: Path, model: str) -> None:
    plain, variant = errors(MODELS[model], tmp_path, "int8kv")
    # Independent errors add up in squares. Measured: 0.019 to 0.049 of its own, of normal values,
    # whose largest magnitude is far above the usual one.
    assert variant**2 <= plain**2 + 0.06**2
    assert variant > plain / 2, "the reference is not what ran"


@pytest.mark.parametrize("model", ["plain", "odd heads"])
def test_int8_kv_holds_the_nearest_step_of_every_channel(tmp_path: Path, model: str) -> None:
    arch = MODELS[model]
    made(arch, tmp_path, ["int8kv"])
    kept = {}
    for precision in ("float32", "int8"):
        settings = OnnxSettings(
            slots=1, context_tokens=TOKENS, step_tokens=TOKENS, threads=1, kv_precision=precision
        )
        executor = OnnxExecutor(tmp_path, arch, settings)
        prompt = np.array(text(arch).sequences[0][:UNIT_TOKENS])
        executor.execute(ExecutorStep(rows=(Row(tokens=prompt, past=0, slot=0),)))
        data = np.frombuffer(executor.read_kv(KvUnit(home=0)), precision)
        # Keys and values of two layers; the first layer has seen nothing of the other's rounding.
        kept[precision] = data.reshape(4, arch.kv_heads, UNIT_TOKENS, -1)[[0, 2]]
        executor.close()
    graph = onnx.load(str(tmp_path / FILES["int8kv"]), load_external_data=False).graph
    constants = {
        one.name: onnx.numpy_helper.to_array(one)
        for one in graph.initializer
        if "_scale." in one.name
    }
    for place, kind in enumerate(("key", "value")):
        scale = constants[f"{kind}_scale.0"][0]
        error = np.abs(kept["int8"][place] * scale - kept["float32"][place])
        assert (error <= scale * 0.501).all()
        assert kept["int8"][place].any()


@pytest.mark.parametrize("model", MODELS)
def test_float16_adds_next_to_nothing(tmp_path: Path, model: str) -> None:
    plain, variant = errors(MODELS[model], tmp_path, "fp16")
    # Measured: at most 0.012 of its own.
    assert variant**2 <= plain**2 + 0.015**2


def test_int8_kv_takes_a_quarter_of_the_memory_and_survives_copies_and_swaps(
    tmp_path: Path,
) -> None:
    arch = tiny_architecture()
    made(arch, tmp_path, ["int8kv"])
    settings = OnnxSettings(
        slots=4, context_tokens=TOKENS, step_tokens=TOKENS, threads=1, kv_precision="int8"
    )
    executor = OnnxExecutor(tmp_path, arch, settings)
    # Keys and values of two layers, two heads of 32 bytes each.
    assert executor.kv.bytes_per_token == 2 * 2 * 2 * 32
    prompt = np.array(text(arch).sequences[0])
    executor.execute(ExecutorStep(rows=(Row(tokens=prompt[:30], past=0, slot=1),)))
    last = Row(tokens=prompt[30:31], past=30, slot=1)
    alone = executor.execute(ExecutorStep(rows=(last,))).logits
    copied = dataclasses.replace(last, slot=3)
    step = ExecutorStep(rows=(copied, dataclasses.replace(last, slot=1)), copies=((1, 3, 30),))
    np.testing.assert_allclose(executor.execute(step).logits, np.repeat(alone, 2, 0), atol=1e-4)
    unit = executor.read_kv(KvUnit(home=3))
    assert len(unit) == UNIT_TOKENS * executor.kv.bytes_per_token
    executor.write_kv(KvUnit(home=0), unit)
    moved = dataclasses.replace(last, slot=0)
    again = executor.execute(ExecutorStep(rows=(moved,))).logits
    np.testing.assert_allclose(again, alone, atol=1e-4)
    executor.close()


def test_a_graph_of_another_kv_precision_is_refused(tmp_path: Path) -> None:
    arch = tiny_architecture()
    made(arch, tmp_path, ["int8kv"])
    (tmp_path / FILES["int8kv"]).replace(tmp_path / FILES["fp16"])
    settings = OnnxSettings(
        slots=1, context_tokens=TOKENS, step_tokens=TOKENS, kv_precision="float16"
    )
    with pytest.raises(BundleError, match="architecture"):
        OnnxExecutor(tmp_path, arch, settings)


def test_variants_read_the_weights_of_the_graph_they_come_from(tmp_path: Path) -> None:
    made(tiny_architecture(), tmp_path, ["int8kv", "fp16"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.exact.onnx",
        FILES["fp16"],
        FILES["int8kv"],
        "model.onnx",
        "model.onnx.data",
    ]
    for name in FILES.values():
        model = onnx.load(str(tmp_path / name), load_external_data=False)
        outside = [one for one in model.graph.initializer if one.external_data]
        assert {one.external_data[0].value for one in outside} == {"model.onnx.data"}


def test_ranges_are_the_largest_magnitudes_that_the_cache_holds(tmp_path: Path) -> None:
    arch = tiny_architecture()
    weights = weights_of(arch)
    sequence = text(arch, 1).sequences[0]
    ranges = measure_ranges(arch, weights, text(arch, 1), tmp_path, silent)
    reference = TorchReference(arch, weights, slots=1, tokens=TOKENS)
    reference.execute(ExecutorStep(rows=(Row(tokens=np.array(sequence), past=0, slot=0),)))
    for layer, one in enumerate(ranges):
        for found, kept in (
            (one.keys, reference.keys(layer)),
            (one.values, reference.values(layer)),
        ):
            np.testing.assert_allclose(found, np.abs(kept).max(axis=(0, 1)), rtol=1e-4)
    assert list(tmp_path.iterdir()) == []


def reaching(arch: Architecture, activations: float) -> list[LayerRanges]:
    peaks: npt.NDArray[np.float32] = np.ones((arch.kv_heads, arch.head_size), np.float32)
    one = LayerRanges(keys=peaks, values=peaks, activations=activations)
    return [one] * arch.layers


@pytest.mark.parametrize("peak", [20_000.0, float("nan")])
def test_activations_that_float16_may_not_hold_are_refused_by_layer(
    tmp_path: Path, peak: float
) -> None:
    arch = tiny_architecture()
    export_onnx(arch, weights_of(arch), tmp_path)
    with pytest.raises(ConversionError, match="fp16: activations of layer 0"):
        write_variants(tmp_path, arch, ["fp16"], reaching(arch, peak))


@pytest.mark.parametrize("names", ["", "int4kv", "fp16,int4kv"])
def test_an_unknown_variant_is_refused_with_those_there_are(names: str) -> None:
    with pytest.raises(ConfigError, match="int8kv or fp16"):
        parse_variants(names)
    assert parse_variants("fp16, int8kv,fp16") == ("fp16", "int8kv")
