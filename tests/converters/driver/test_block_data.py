"""What passes see of calibration text: against the same model run as a whole, and always fresh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scriptedpasses import scripted
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.driver.dependencies import input_of, upstream
from tidegate.converters.driver.pipeline import Job, compress
from tidegate.converters.passes.base import Block, BlockData, CalibrationText, Model
from tidegate.converters.recipe import RecipeWeights, make_recipe
from tidegate.kernels.torch_encoder_ops import TorchEncoderOps
from tidegate.kernels.torch_ops import TorchKv, TorchOps, TorchRow, WeightTensors
from tidegate.model.architecture import Architecture, Experts, LayerKind
from tidegate.model.blocks import block_names, block_roles
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.ops import CommonOps
from tidegate.model.packed import DenseLinear, Linear, dense_weight
from tidegate.model.registry import AnyArchitecture
from tidegate.model.roles import roles
from tidegate.model.rope import Rope
from tidegate.model.walk import Weights, decoder, encoder

EXACT = replace(make_recipe(bits=8, group_size=32, symmetric=False), name="exact")
SEQUENCES = tuple(
    tuple(int(token) for token in np.random.default_rng(seed).integers(5, 200, length))
    for seed, length in enumerate((40, 1, 70, 33))
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def moe_architecture(count: int = 4) -> Architecture:
    experts = Experts(count=count, chosen=2, inner=64, normalised=True)
    kind = LayerKind(rope=Rope.plain(10000.0, 32), experts=experts)
    return replace(tiny_architecture(), kinds=(kind,))


def encoder_architecture() -> EncoderArchitecture:
    return EncoderArchitecture(
        model_type="bert",
        layers=2,
        width=64,
        heads=4,
        inner=96,
        vocab=203,
        context=80,
        norm_eps=1e-12,
        activation="gelu",
        token_types=2,
        pooling="cls",
        pooler="tanh",
        labels=("a", "b", "c"),
    )


ARCHITECTURES: dict[str, Callable[[], AnyArchitecture]] = {
    "tied": tiny_architecture,
    "untied": lambda: tiny_architecture(tied_head=False),
    "experts": moe_architecture,
    "encoder": encoder_architecture,
}


def look(
    folder: Path,
    arch: AnyArchitecture,
    work: Callable[[Block, BlockData], None],
    *,
    sees_errors: bool = True,
    weights: Weights | None = None,
) -> Weights:
    """Run a recipe of one pass that looks at data; gives the weights it began with."""
    weights = weights or RandomWeights(arch)

    def looking(block: Block, data: BlockData | None) -> None:
        assert data is not None
        work(block, data)

    folder.mkdir(exist_ok=True)
    compress(
        Job(
            recipe=replace(EXACT, passes=(scripted(looking, data=True),)),
            model=Model(arch=arch, weights=weights),
            text=CalibrationText(name="t", sha256="0" * 64, sequences=SEQUENCES),
            folder=folder,
            progress=lambda what, done, total: None,
            sees_errors=sees_errors,
        )
    )
    return weights


def inputs_by_role(arch: AnyArchitecture, weights: Weights) -> dict[str, torch.Tensor]:
    """The obvious twin: the whole model at once, remembering what enters each linear layer."""
    known = {id(weights.linear(name)): name for name, role in roles(arch).items() if role.is_linear}
    found: dict[str, torch.Tensor] = {}
    if isinstance(arch, EncoderArchitecture):
        ops: TorchOps | TorchEncoderOps = TorchEncoderOps(SEQUENCES, WeightTensors())
    else:
        rows = [TorchRow(tokens=one, past=0, slot=slot) for slot, one in enumerate(SEQUENCES)]
        kv = TorchKv.allocate(
            layers=arch.layers,
            slots=len(rows),
            tokens=80,
            kv_heads=arch.kv_heads,
            head_size=arch.head_size,
        )
        ops = TorchOps(rows, kv, WeightTensors())
        ops.gather_rows = lambda x: x  # type: ignore[method-assign]
    plain = ops.linears

    def linears(x: torch.Tensor, parts: list[Linear]) -> list[torch.Tensor]:
        for part in parts:
            found[known[id(part)]] = x
        return plain(x, parts)

    ops.linears = linears  # type: ignore[method-assign, assignment]
    _walk(ops, arch, weights)
    return found


def _walk(ops: CommonOps[torch.Tensor], arch: AnyArchitecture, weights: Weights) -> None:
    if isinstance(arch, EncoderArchitecture):
        encoder(ops, arch, weights)  # type: ignore[arg-type]
    else:
        decoder(ops, arch, weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_statistics_are_those_of_the_whole_model_run_at_once(tmp_path: Path, kind: str) -> None:
    arch = ARCHITECTURES[kind]()
    weights = RandomWeights(arch)
    expected = inputs_by_role(arch, weights)
    seen: list[str] = []

    def work(block: Block, data: BlockData) -> None:
        for role in block.linears:
            if role not in expected or (role == "embed" and block.name == "embed"):
                with pytest.raises(LookupError, match=role):
                    data.gram(role)
                continue
            x = expected[role].double()
            seen.append(role)
            close(data.gram(role), x.T @ x / len(x))
            close(data.mean_square(role), x.square().mean(0))
            close(data.mean_abs(role), x.abs().mean(0))
            close(data.peak(role), x.abs().amax(0))
            rows = data.rows(role).double()
            assert 0 < len(rows) <= len(x)
            nearest = torch.cdist(rows, x).amin(1)
            assert nearest.max() < 1e-3 * x.norm(dim=1).max()

    look(tmp_path / "w", arch, work, sees_errors=False, weights=weights)
    assert set(seen) == set(expected) - {"embed"}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_later_layers_see_what_packing_did_to_earlier_ones_only_if_told_to(tmp_path: Path) -> None:
    arch = tiny_architecture()
    weights = RandomWeights(arch)
    whole = inputs_by_role(arch, weights)["layers.1.q"]
    packed = inputs_by_role(arch, _Kept(RecipeWeights(weights, EXACT), arch))["layers.1.q"]
    found: dict[bool, torch.Tensor] = {}
    for sees_errors in (False, True):

        def work(block: Block, data: BlockData, sees_errors: bool = sees_errors) -> None:
            if block.layer == 1:
                found[sees_errors] = data.rows("layers.1.q")

        look(tmp_path / str(sees_errors), arch, work, sees_errors=sees_errors, weights=weights)
    torch.testing.assert_close(found[False], whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[True], packed, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed, whole, rtol=1e-4, atol=1e-5)


class _Kept:
    """Every weight once, so that it can be told by identity."""

    def __init__(self, source: Weights, arch: AnyArchitecture) -> None:
        self._linears = {
            name: source.linear(name) for name, role in roles(arch).items() if role.is_linear
        }
        self.vector = source.vector

    def linear(self, role: str) -> Linear:
        return self._linears[role]


def test_statistics_follow_what_a_pass_changes(tmp_path: Path) -> None:
    def work(block: Block, data: BlockData) -> None:
        if block.layer != 0:
            return
        before = {part: data.gram(f"layers.0.{part}") for part in ("q", "o", "gate", "down")}
        assert data.gram("layers.0.q") is before["q"]  # nothing changed: nothing is run
        up = block.linears["layers.0.up"]
        block.linears["layers.0.up"] = DenseLinear(weight=2 * dense_weight(up))
        assert data.gram("layers.0.gate") is before["gate"]
        torch.testing.assert_close(data.gram("layers.0.down"), 4 * before["down"])
        norm = block.vectors["layers.0.attention_norm"]
        block.vectors["layers.0.attention_norm"] = 3 * norm
        torch.testing.assert_close(data.gram("layers.0.v"), 9 * before["q"])
        assert not torch.allclose(data.mean_square("layers.0.o"), before["o"].diagonal())

    look(tmp_path / "w", tiny_architecture(), work)


def test_a_sample_of_rows_holds_the_same_tokens_before_and_after_a_change(tmp_path: Path) -> None:
    def work(block: Block, data: BlockData) -> None:
        if block.layer == 0:
            before = data.rows("layers.0.q")
            scale = np.float32(2)
            block.vectors["layers.0.attention_norm"] = (
                scale * block.vectors["layers.0.attention_norm"]
            )
            torch.testing.assert_close(data.rows("layers.0.k"), 2 * before)

    look(tmp_path / "w", tiny_architecture(), work)


def test_a_block_is_given_what_the_one_before_it_gives(tmp_path: Path) -> None:
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def work(block: Block, data: BlockData) -> None:
        outputs.append(torch.cat(list(data.outputs())))
        if block.name == "embed":
            with pytest.raises(LookupError, match="no input but tokens"):
                data.inputs()
        else:
            inputs.append(torch.cat(list(data.inputs())))

    look(tmp_path / "w", tiny_architecture(), work, sees_errors=False)
    for given, made in zip(inputs, outputs, strict=False):
        torch.testing.assert_close(given, made)
    assert outputs[-1].shape == (sum(map(len, SEQUENCES)), 203)


def test_an_expert_that_no_token_chose_is_named(tmp_path: Path) -> None:
    arch = moe_architecture(count=5)
    weights = RandomWeights(arch)
    router = weights.linear("layers.0.router")
    assert isinstance(router, DenseLinear)
    # Two of the others always give more than 0, which is what the first gives.
    router.weight[:] = np.outer([0, 1, -1, 0.5, -0.5], router.weight[0])

    def work(block: Block, data: BlockData) -> None:
        if block.layer == 0:
            for part in ("gate", "up", "down"):
                with pytest.raises(LookupError, match=rf"experts\.0\.{part}: no calibration token"):
                    data.gram(f"layers.0.experts.0.{part}")
                with pytest.raises(LookupError, match=rf"experts\.0\.{part}: no calibration token"):
                    data.rows(f"layers.0.experts.0.{part}")
                data.gram(f"layers.0.experts.1.{part}")

    look(tmp_path / "w", arch, work, weights=weights)


def test_what_blocks_give_is_gone_from_the_disk_at_the_end(tmp_path: Path) -> None:
    look(tmp_path / "w", tiny_architecture(), lambda block, data: None)
    assert list((tmp_path / "w").rglob("*.f32")) == []


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_linear_layer_of_a_block_has_its_place_in_the_walk(kind: str) -> None:
    arch = ARCHITECTURES[kind]()
    for block in block_names(arch)[1:]:
        names = block_roles(arch, block)
        for name in names:
            assert name not in upstream(name, names, arch)


def test_an_experts_input_depends_on_no_other_expert() -> None:
    arch = moe_architecture()
    names = [name for name in roles(arch) if name.startswith("layers.0.")]
    found = upstream("layers.0.experts.2.down", names, arch)
    assert {name for name in found if "experts" in name} == {
        "layers.0.experts.2.gate",
        "layers.0.experts.2.up",
    }
    assert input_of("layers.0.experts.2.up", dict.fromkeys(names)) == "layers.0.experts.2.gate"
    assert input_of("layers.0.up", {"layers.0.up": None}) == "layers.0.up"
