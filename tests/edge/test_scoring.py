"""Scoring drives an executor by hand; a toy executor shows what it was asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from everylogit import reference_logits
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.onnx.ops import export_onnx
from tidegate.edge.executors.onnx import OnnxExecutor, OnnxSettings
from tidegate.edge.scoring import greedy_answers, teacher_forced
from tidegate.engine.executor import Executor

ARCH = tiny_architecture()
WEIGHTS = RandomWeights(ARCH, seed=3)


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Executor:
    folder = tmp_path_factory.mktemp("scoring")
    export_onnx(ARCH, WEIGHTS, folder)
    settings = OnnxSettings(slots=3, context_tokens=64, step_tokens=8, threads=1, exact=True)
    return OnnxExecutor(folder, ARCH, settings)


def test_a_step_takes_no_more_rows_than_tokens(tmp_path: Path) -> None:
    export_onnx(ARCH, WEIGHTS, tmp_path)
    settings = OnnxSettings(slots=3, context_tokens=64, step_tokens=2, threads=1, exact=True)
    narrow = OnnxExecutor(tmp_path, ARCH, settings)
    assert [len(found) for found in teacher_forced(narrow, [[1, 2]] * 3)] == [2] * 3
    assert [len(one) for one in greedy_answers(narrow, [[1]] * 3, longest=2, ends=())] == [2] * 3


def sequences(count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, ARCH.vocab, rng.integers(1, 30)).tolist() for _ in range(count)]


def test_every_token_of_every_sequence_gets_the_reference_logits(executor: Executor) -> None:
    texts = sequences(7, seed=1)
    for text, found in zip(texts, teacher_forced(executor, texts), strict=True):
        expected = reference_logits(ARCH, WEIGHTS, np.array(text))
        np.testing.assert_allclose(found, expected, atol=1e-3)


def greedy(prompt: list[int], longest: int, ends: set[int]) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + longest and len(tokens) < 64:
        best = int(reference_logits(ARCH, WEIGHTS, np.array(tokens))[-1].argmax())
        if best in ends:
            break
        tokens.append(best)
    return tokens[len(prompt) :]


def test_answers_are_the_most_likely_tokens_until_an_end(executor: Executor) -> None:
    prompts = sequences(5, seed=2)
    plain = [greedy(prompt, 6, set()) for prompt in prompts]
    end = plain[0][3]
    for ends in (set[int](), {end}):
        expected = [greedy(prompt, 6, ends) for prompt in prompts]
        assert list(greedy_answers(executor, prompts, longest=6, ends=ends)) == expected
    assert plain[0] != greedy(prompts[0], 6, {end})


def test_an_answer_stops_where_the_context_is_full(executor: Executor) -> None:
    prompt = [1] * 61
    (answer,) = greedy_answers(executor, [prompt], longest=50, ends=())
    assert len(answer) == 3
