"""The driver: what is packed, what passes are given and told, and that nothing is passed over."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from scriptedpasses import scripted
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.driver.pipeline import Job, Packed, compress
from tidegate.converters.driver.store import StoreWeights
from tidegate.converters.passes.base import (
    Block,
    BlockData,
    CalibrationText,
    Model,
    PassError,
    Progress,
)
from tidegate.converters.recipe import RecipeWeights, make_recipe
from tidegate.converters.recipe_file import parse_recipe
from tidegate.converters.rounding.packing import pack
from tidegate.errors import ConversionError
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.packed import DenseLinear, Linear, LowRankLinear, PackedLinear, dense_weight
from tidegate.model.recipe import Recipe
from tidegate.model.roles import roles

PLAIN = make_recipe(bits=4, group_size=32, symmetric=False)
TEXT = CalibrationText(name="t", sha256="0" * 64, sequences=((5, 6, 7, 8, 9), (10, 11, 12)))


def silent(what: str, done: int, total: int) -> None:
    pass


def random_model(**sizes: int) -> Model:
    arch = tiny_architecture(**sizes)  # type: ignore[arg-type]
    return Model(arch=arch, weights=RandomWeights(arch))


def job(
    folder: Path, recipe: Recipe = PLAIN, model: Model | None = None, *, see: Progress = silent
) -> Job:
    folder.mkdir(exist_ok=True)
    return Job(recipe=recipe, model=model or random_model(), text=TEXT, folder=folder, progress=see)


def same(one: Linear, other: Linear) -> bool:
    assert isinstance(one, PackedLinear)
    assert isinstance(other, PackedLinear)
    return (
        np.array_equal(one.values, other.values)
        and np.array_equal(one.scales, other.scales)
        and (one.zeros is None) == (other.zeros is None)
        and (one.zeros is None or np.array_equal(one.zeros, other.zeros))  # type: ignore[arg-type]
        and (one.bits, one.inputs, one.group_size) == (other.bits, other.inputs, other.group_size)
    )


def weights_of(packed: Packed) -> StoreWeights:
    return StoreWeights(packed.store)


@pytest.mark.parametrize("dtype", ["in memory", "from a checkpoint"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_stored_is_what_rounding_in_memory_gives(
    tmp_path: Path, dtype: str, symmetric: bool
) -> None:
    recipe = make_recipe(bits=4, group_size=64, symmetric=symmetric)
    arch = tiny_architecture(tied_head=False)
    folder = write_checkpoint(tmp_path / "checkpoint", arch, RandomWeights(arch), shards=2)
    with Checkpoint.open(folder) as checkpoint:
        source = checkpoint.weights()
        twin = RecipeWeights(source, recipe)
        model = Model(arch=arch, weights=source)
        if dtype == "in memory":
            model = Model(arch=arch, weights=_Resident(source))
        found = weights_of(compress(job(tmp_path / "work", recipe, model)))
        for name, role in roles(arch).items():
            if role.is_linear:
                assert same(found.linear(name), twin.linear(name)), name
            else:
                assert np.array_equal(found.vector(name), twin.vector(name)), name
        bits, nbytes = found.bits_and_bytes()
        assert bits == twin.tensor_bits
        assert nbytes == twin.nbytes
        found.close()


class _Resident:
    """Gives weights as objects, so that they are not read by rows."""

    def __init__(self, source: object) -> None:
        self.linear = source.linear  # type: ignore[attr-defined]
        self.vector = source.vector  # type: ignore[attr-defined]


def test_the_pass_of_rounding_gives_what_the_driver_gives_for_it(tmp_path: Path) -> None:
    recipe = parse_recipe('name = "x"\n[[passes]]\nkind = "rtn"\n', "x.toml")
    streamed = weights_of(compress(job(tmp_path / "a", recipe)))
    # A pass that leaves everything alone makes the driver apply `rtn` to blocks in memory.
    idle = replace(recipe, passes=(scripted(lambda block, data: None), *recipe.passes))
    applied = weights_of(compress(job(tmp_path / "b", idle)))
    for name, role in roles(tiny_architecture()).items():
        if role.is_linear:
            assert same(streamed.linear(name), applied.linear(name)), name


def test_rounding_alone_never_loads_torch(tmp_path: Path) -> None:
    arch = tiny_architecture()
    folder = write_checkpoint(tmp_path / "checkpoint", arch, RandomWeights(arch))
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tidegate.cli.main import main\n"
        f"arguments = ['convert', {str(folder)!r}, '--quiet', '--out']\n"
        f"assert main([*arguments, {str(tmp_path / 'a')!r}]) == 0\n"
        f"assert main([*arguments, {str(tmp_path / 'b')!r}, '--recipe', 'fast']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


def test_a_pass_sees_every_block_once_in_the_order_of_the_walk(tmp_path: Path) -> None:
    seen: list[tuple[str, int | None, list[str]]] = []
    look = scripted(lambda block, data: seen.append((block.name, block.layer, [*block.linears])))
    told: list[tuple[str, int, int]] = []
    compress(job(tmp_path / "w", replace(PLAIN, passes=(look,)), see=lambda *one: told.append(one)))
    assert [(name, layer) for name, layer, _ in seen] == [
        ("embed", None),
        ("layers.0", 0),
        ("layers.1", 1),
        ("final", None),
    ]
    assert seen[1][2] == [f"layers.0.{part}" for part in ("q", "k", "v", "o", "gate", "up", "down")]
    assert told == [("scripted", done, 4) for done in range(5)]


def test_a_pass_is_only_given_blocks_that_its_patterns_touch(tmp_path: Path) -> None:
    seen: list[str] = []
    look = scripted(lambda block, data: seen.append(block.name), match=("layers.1.down",))
    compress(job(tmp_path / "w", replace(PLAIN, passes=(look,))))
    assert seen == ["layers.1"]


def test_what_a_pass_has_packed_or_cut_is_stored_as_it_left_it(tmp_path: Path) -> None:
    arch = tiny_architecture()
    ones = DenseLinear(weight=np.ones((128, 4), np.float32))
    twos = DenseLinear(weight=np.full((4, 192), 2, np.float32))

    def work(block: Block, data: BlockData | None) -> None:
        if block.layer == 0:
            role = "layers.0.down"
            block.linears[role] = LowRankLinear(first=twos, second=ones)
            block.vectors["layers.0.mlp_norm"] = np.full(128, 3, np.float32)
            q = block.linears["layers.0.q"]
            wanted = replace(block.formats["layers.0.q"], bits=8)
            block.linears["layers.0.q"] = pack("layers.0.q", q, wanted).make()

    found = weights_of(compress(job(tmp_path / "w", replace(PLAIN, passes=(scripted(work),)))))
    down, q = found.linear("layers.0.down"), found.linear("layers.0.q")
    assert isinstance(down, LowRankLinear)
    assert isinstance(down.first, PackedLinear)
    assert np.allclose(dense_weight(down), 8, rtol=1e-2)
    assert isinstance(q, PackedLinear)
    assert q.bits == 8
    assert (found.vector("layers.0.mlp_norm") == 3).all()
    bits, _ = found.bits_and_bytes()
    assert (bits["layers.0.q"], bits["layers.0.down"], bits["layers.1.q"]) == (8, 4, 4)
    assert set(bits) == {name for name, role in roles(arch).items() if role.is_linear}


def test_weights_of_32_bits_are_stored_as_they_are(tmp_path: Path) -> None:
    recipe = parse_recipe(
        'name = "x"\n[[formats]]\nmatch = ["layers.*.down"]\nbits = 32\n', "x.toml"
    )
    model = random_model()
    found = weights_of(compress(job(tmp_path / "w", recipe, model)))
    down = found.linear("layers.1.down")
    assert isinstance(down, DenseLinear)
    assert np.array_equal(down.weight, dense_weight(model.weights.linear("layers.1.down")))
    assert found.bits_and_bytes()[0]["layers.1.down"] == 32


def test_an_error_in_a_pass_names_the_pass_the_place_and_what_ran_before(tmp_path: Path) -> None:
    def work(block: Block, data: BlockData | None) -> None:
        if block.layer == 1:
            raise ZeroDivisionError("nothing to divide by")

    first, second = scripted(lambda block, data: None), scripted(work)
    recipe = replace(PLAIN, passes=(first, second))
    message = (
        r"pass scripted: layers\.1: ZeroDivisionError: nothing to divide by "
        r"\(after scripted\)"
    )
    with pytest.raises(PassError, match=message):
        compress(job(tmp_path / "w", recipe))


def test_a_pass_that_makes_a_weight_infinite_is_named_with_the_weight(tmp_path: Path) -> None:
    def work(block: Block, data: BlockData | None) -> None:
        if block.layer == 1:
            weight = np.full((128, 192), np.nan, np.float32)
            block.linears["layers.1.down"] = DenseLinear(weight=weight)

    bad = scripted(work)
    with pytest.raises(PassError, match=r"pass scripted: .*layers\.1\.down: became infinite"):
        compress(job(tmp_path / "w", replace(PLAIN, passes=(bad,))))


@pytest.mark.parametrize("role", ["layers.1.up", "layers.0.mlp_norm", "embed"])
def test_numbers_that_are_none_in_a_checkpoint_are_named_by_their_role(
    tmp_path: Path, role: str
) -> None:
    model = random_model()
    if role.endswith("norm"):
        model.weights.vector(role)[3] = np.nan
    else:
        model.weights.linear(role).weight[3, 5] = np.inf  # type: ignore[union-attr]
    with pytest.raises(ConversionError, match=rf"{role.replace('.', '[.]')}: .*infinite"):
        compress(job(tmp_path / "w", model=model))


def test_what_passes_could_not_do_is_told_by_role_and_pass(tmp_path: Path) -> None:
    def work(block: Block, data: BlockData | None) -> None:
        if block.layer == 0:
            block.notes["layers.0.q"] = "too round"

    one, other = scripted(work), scripted(work)
    packed = compress(job(tmp_path / "w", replace(PLAIN, passes=(one, other))))
    assert packed.notes == {"layers.0.q": "scripted: too round; scripted: too round"}
    again = compress(job(tmp_path / "w", replace(PLAIN, passes=(one, other))))
    assert again.notes == packed.notes


def test_finished_blocks_are_not_done_again(tmp_path: Path) -> None:
    seen: list[str] = []

    def work(block: Block, data: BlockData | None) -> None:
        seen.append(block.name)
        if block.layer == 1 and len(seen) == 3:
            raise KeyboardInterrupt

    recipe = replace(PLAIN, passes=(scripted(work),))
    with pytest.raises(KeyboardInterrupt):
        compress(job(tmp_path / "w", recipe))
    compress(job(tmp_path / "w", recipe))
    assert seen == ["embed", "layers.0", "layers.1", "layers.1", "final"]
