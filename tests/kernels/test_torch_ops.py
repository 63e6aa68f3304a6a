"""TorchOps against the model library's own definition, and against itself in other step shapes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tinymodel import RandomWeights, tiny_architecture

from tidegate.kernels.torch_ops import TorchKv, TorchOps, TorchRow, WeightTensors
from tidegate.model.architecture import Architecture, AttentionSpec, LayerKind
from tidegate.model.rope import Rope
from tidegate.model.walk import Weights, decoder

Numbers = npt.NDArray[np.floating]

TOLERANCE = 2e-5
"""On logits of scale 10: float32 sums in another order."""


def make_kv(arch: Architecture, slots: int = 4) -> TorchKv:
    return TorchKv.allocate(
        layers=arch.layers,
        slots=slots,
        tokens=arch.context,
        kv_heads=arch.kv_heads,
        head_size=arch.head_size,
    )


def run(arch: Architecture, weights: Weights, kv: TorchKv, *rows: TorchRow) -> torch.Tensor:
    with torch.inference_mode():
        return decoder(TorchOps(rows, kv, WeightTensors()), arch, weights)


def tokens_of(arch: Architecture, count: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, arch.vocab, count).tolist())


def test_chunks_and_decode_steps_give_the_logits_of_one_pass() -> None:
    arch = tiny_architecture()
    weights = RandomWeights(arch)
    tokens = tokens_of(arch, 41, 1)
    whole = run(arch, weights, make_kv(arch), TorchRow(tokens=tokens, past=0, slot=0))
    kv, past = make_kv(arch), 0
    for chunk in (17, 1, 20, 2, 1):
        row = TorchRow(tokens=tokens[past : past + chunk], past=past, slot=2)
        last = run(arch, weights, kv, row)
        past += chunk
    assert torch.allclose(whole, last, atol=TOLERANCE)


def test_requests_in_one_step_do_not_see_each_other() -> None:
    arch = tiny_architecture(tied_head=False)
    weights = RandomWeights(arch)
    rows = [TorchRow(tokens=tokens_of(arch, 5 + 7 * i, i), past=0, slot=3 - i) for i in range(3)]
    together = run(arch, weights, make_kv(arch), *rows)
    for row, logits in zip(rows, together, strict=True):
        alone = run(arch, weights, make_kv(arch), row)
        assert torch.allclose(alone[0], logits, atol=TOLERANCE)


def test_rows_that_want_no_logits_are_left_out_of_the_head() -> None:
    arch = tiny_architecture()
    rows = [
        TorchRow(tokens=(1, 2, 3), past=0, slot=0, logits=0),
        TorchRow(tokens=(4, 5), past=0, slot=1),
    ]
    logits = run(arch, RandomWeights(arch), make_kv(arch), *rows)
    assert logits.shape == (1, arch.vocab)


def test_a_changed_early_token_changes_the_answer() -> None:
    arch = tiny_architecture()
    weights = RandomWeights(arch)
    first = run(arch, weights, make_kv(arch), TorchRow(tokens=(1, 2, 3, 4), past=0, slot=0))
    other = run(arch, weights, make_kv(arch), TorchRow(tokens=(9, 2, 3, 4), past=0, slot=0))
    assert not torch.allclose(first, other, atol=1e-2)


def with_kind(arch: Architecture, kind: LayerKind) -> Architecture:
    return replace(arch, kinds=(kind,))


def test_a_window_hides_older_tokens_and_no_others() -> None:
    """Two layers of window 4 see the token itself and the six before it."""
    plain = tiny_architecture(layers=2)
    arch = with_kind(plain, replace(plain.kinds[0], window=4))
    weights, tokens = RandomWeights(arch), list(tokens_of(arch, 20, 3))
    row = TorchRow(tokens=tuple(tokens), past=0, slot=0)
    before = run(arch, weights, make_kv(arch), row)
    for place, seen in ((12, False), (13, True), (19, True)):
        other = (*tokens[:place], (tokens[place] + 1) % arch.vocab, *tokens[place + 1 :])
        after = run(arch, weights, make_kv(arch), replace(row, tokens=other))
        assert torch.allclose(before, after, atol=TOLERANCE) != seen


def test_a_layer_without_rotation_does_not_see_the_order_of_earlier_tokens() -> None:
    arch = with_kind(tiny_architecture(layers=1), LayerKind(rope=None))
    weights = RandomWeights(arch)
    first, other = (
        run(arch, weights, make_kv(arch), TorchRow(tokens=tokens, past=0, slot=0))
        for tokens in ((3, 1, 4, 1, 5, 9), (5, 4, 1, 3, 1, 9))
    )
    assert torch.allclose(first, other, atol=TOLERANCE)


def plain_attention(q: Numbers, k: Numbers, v: Numbers, past: int, spec: AttentionSpec) -> Numbers:
    """One query, head and key at a time. q: [T, N, H], k and v: [past + T, K, H]; [T, N, H]."""
    out: Numbers = np.zeros(q.shape)
    share = spec.heads // spec.kv_heads
    for token, head in np.ndindex(q.shape[0], spec.heads):
        at = past + token
        first = 0 if spec.window is None else max(0, at - spec.window + 1)
        query, scores = turn(q[token, head], at, spec.rope), []
        for key in range(first, at + 1):
            score = query @ turn(k[key, head // share], key, spec.rope) * spec.scale
            cap = spec.softcap
            scores.append(score if cap is None else cap * math.tanh(score / cap))
        weights = np.exp(np.array(scores) - max(scores))
        out[token, head] = weights / weights.sum() @ v[first : at + 1, head // share]
    return out


def turn(x: Numbers, position: int, rope: Rope | None) -> Numbers:
    """The rotation of one head, a pair at a time."""
    if rope is None:
        return x
    half = rope.size // 2
    turned: Numbers = x.astype(np.float64)
    for i, frequency in enumerate(rope.frequencies):
        pair = complex(x[i], x[i + half]) * np.exp(1j * frequency * position) * rope.magnitude
        turned[i], turned[i + half] = pair.real, pair.imag
    return turned


ROPES = st.none() | st.builds(
    Rope, frequencies=st.sampled_from([(1.0, 0.1), (0.7,), (1.0, 0.5, 0.2, 0.01)])
)


@settings(deadline=None, max_examples=50)
@given(
    kv_heads=st.integers(1, 3),
    share=st.integers(1, 3),
    chunks=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 8),
    softcap=st.none() | st.floats(0.5, 5),
    rope=ROPES,
    magnitude=st.floats(0.5, 2),
)
def test_attention_is_that_of_one_query_and_key_at_a_time(
    kv_heads: int,
    share: int,
    chunks: list[int],
    window: int | None,
    softcap: float | None,
    rope: Rope | None,
    magnitude: float,
) -> None:
    spec = AttentionSpec(
        layer=0,
        heads=kv_heads * share,
        kv_heads=kv_heads,
        head_size=8,
        scale=0.4,
        rope=None if rope is None else replace(rope, magnitude=magnitude),
        window=window,
        softcap=softcap,
    )
    total, rng = sum(chunks), np.random.default_rng(0)
    q = rng.standard_normal((total, spec.heads, 8)).astype(np.float32)
    k, v = (rng.standard_normal((total, kv_heads, 8)).astype(np.float32) for _ in "kv")
    kv = TorchKv.allocate(layers=1, slots=1, tokens=total, kv_heads=kv_heads, head_size=8)
    past = 0
    for chunk in chunks:
        part = slice(past, past + chunk)
        ops = TorchOps([TorchRow(tokens=(0,) * chunk, past=past, slot=0)], kv, WeightTensors())
        rows = [torch.from_numpy(x[part]).flatten(1) for x in (q, k, v)]
        found = ops.attention(rows[0], rows[1], rows[2], spec)
        expected = plain_attention(q[part], k[: part.stop], v[: part.stop], past, spec)
        assert np.allclose(found.numpy().reshape(expected.shape), expected, atol=1e-5)
        past = part.stop


def test_a_norm_is_taken_over_as_many_values_as_its_weight_has() -> None:
    x = np.random.default_rng(0).standard_normal((3, 24)).astype(np.float32)
    ops = TorchOps(
        [TorchRow(tokens=(0,), past=0, slot=0)], TorchKv(keys=[], values=[]), WeightTensors()
    )
    for size in (8, 24):
        weight = np.linspace(0.5, 2, size, dtype=np.float32)
        runs = x.reshape(3, -1, size)
        expected = runs / np.sqrt((runs**2).mean(-1, keepdims=True) + 0.1) * weight
        found = ops.rms_norm(torch.from_numpy(x), weight, 0.1)
        assert np.allclose(found.numpy(), expected.reshape(3, 24), atol=1e-6)
