"""Settings of `open_executor` reach the executor that was chosen, or are refused by name."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nativebuild import native_folder
from wordmodel import write_word_checkpoint

from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import make_recipe
from tidegate.edge.executors.choice import Choice, ExecutorSettings, choose_target, open_executor
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.engine.facts import Described, ExecutorFacts
from tidegate.errors import BundleError, ConfigError
from tidegate.model.bundle import Bundle

SETTINGS = ExecutorSettings(choice="openvino", rows=2, step_tokens=32, threads=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return converted(tmp_path_factory.mktemp("choice"), seed=0)


def converted(folder: Path, seed: int) -> Bundle:
    checkpoint = write_word_checkpoint(folder / "model", context=64, seed=seed)
    recipe = make_recipe(bits=4, group_size=64, symmetric=False)
    plan = ConversionPlan(model_id="tiny", targets=("onnx", "openvino"), recipe=recipe)
    return convert(checkpoint, folder / "bundle", plan)


def facts_of(bundle: Bundle, settings: ExecutorSettings) -> ExecutorFacts:
    executor = open_executor(bundle, settings)
    assert isinstance(executor, Described)
    facts = executor.facts
    executor.close()
    return facts


def test_openvino_is_preferred_where_the_bundle_holds_both(bundle: Bundle) -> None:
    assert choose_target(bundle, "auto") == "openvino"
    assert facts_of(bundle, replace(SETTINGS, choice="auto")).runtime.startswith("openvino 2026.4")
    assert facts_of(bundle, replace(SETTINGS, choice="onnx")).runtime.startswith("onnxruntime ")
    with pytest.raises(BundleError, match="no target that a device can run"):
        choose_target(bundle, "auto", preference=())


def test_a_device_needs_only_the_library_that_runs_its_bundle(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert facts_of(bundle, replace(SETTINGS, choice="auto")).runtime.startswith("onnxruntime ")
    with pytest.raises(ConfigError, match=r"executor = 'openvino': .* openvino is not"):
        open_executor(bundle, SETTINGS)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"executor = 'auto': .* openvino or onnxruntime is not"):
        open_executor(bundle, replace(SETTINGS, choice="auto"))


def test_sizes_and_precision_reach_the_facts(bundle: Bundle) -> None:
    facts = facts_of(bundle, replace(SETTINGS, kv_precision="f16", native="off"))
    assert (facts.threads, facts.kv_precision) == (1, "f16")
    # Two rows of 64 tokens, two layers of two heads of 32, keys and values, two bytes each.
    assert facts.kv_bytes == 2 * 64 * 2 * 2 * 32 * 2 * 2
    assert facts.linear == "openvino, because it was asked for"
    assert facts.load_s > 0


def test_tiles_are_kept_per_bundle(bundle: Bundle, tmp_path: Path) -> None:
    native_folder()
    settings = replace(SETTINGS, native="on", cache_dir=tmp_path / "cache")
    other = converted(tmp_path, seed=1)
    found = [facts_of(one, settings).cache for one in (bundle, other, bundle, other)]
    assert found == ["written to cache", "written to cache", "cache", "cache"]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_what_onnx_runtime_cannot_do_is_refused(bundle: Bundle) -> None:
    onnx = replace(SETTINGS, choice="onnx")
    with pytest.raises(ConfigError, match="kv_precision = 'u4': must be u8, f16 or f32"):
        open_executor(bundle, replace(onnx, kv_precision="u4"))
    with pytest.raises(ConfigError, match="native = 'on': must be auto or off on ONNX Runtime"):
        open_executor(bundle, replace(onnx, native="on"))


def test_a_context_beyond_the_bundles_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="context_tokens = 65: must be at most the bundle's 64"):
        open_executor(bundle, replace(SETTINGS, context_tokens=65))


def test_providers_choose_the_runtime_that_has_them_and_are_refused_by_name(bundle: Bundle) -> None:
    assert ExecutorSettings(providers=("cuda", "cpu")).runtime == "onnx"
    assert ExecutorSettings(providers=("cpu",)).runtime == "auto"
    with pytest.raises(ConfigError, match=r"providers = \['cuda'\]: must be cpu alone on OpenVINO"):
        replace(SETTINGS, providers=("cuda",))
    wanted = ExecutorSettings(providers=("cuda", "cpu"), rows=1, step_tokens=32, threads=1)
    with pytest.raises(ConfigError, match=r"providers = 'cuda': must be one of .*cpu"):
        open_executor(bundle, wanted)
    with pytest.raises(ConfigError, match="kv_mib = 0: must be at least 1, or absent"):
        ExecutorSettings(kv_mib=0)


@pytest.mark.parametrize("choice", ["onnx", "openvino"])
def test_threads_sleep_while_there_is_nothing_to_do(choice: Choice, bundle: Bundle) -> None:
    settings = replace(SETTINGS, choice=choice, threads=2)
    executor = open_executor(bundle, settings)
    blocks = np.arange(2, dtype=np.int32)
    tokens = np.arange(16)
    row = Row(tokens=tokens, past=0, blocks=blocks, slot=0, logits=1)
    try:
        for _ in range(20):
            executor.execute(ExecutorStep(rows=(row,)))
        time.sleep(0.1)
        before_s = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before_s < 0.1, "a thread that spins takes all of it"
    finally:
        executor.close()
