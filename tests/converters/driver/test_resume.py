"""Interruption at any moment: no half bundle, the same bytes after going on, no stale work."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from scriptedpasses import scripted
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.passes.base import Block, BlockData
from tidegate.converters.recipe import make_recipe
from tidegate.converters.recipe_file import load_recipe
from tidegate.errors import ConversionError
from tidegate.model.bundle import Bundle

RECIPE = make_recipe(bits=4, group_size=32, symmetric=False)
PLAN = ConversionPlan(model_id="tiny", targets=("onnx", "openvino"), recipe=RECIPE)
AWARE = """
name = "aware"
[[formats]]
match = ["*"]
group_size = 32
[[passes]]
kind = "gptq"
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch = tiny_architecture(layers=4, tied_head=False)
    return write_checkpoint(tmp_path_factory.mktemp("in") / "checkpoint", arch, RandomWeights(arch))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def command(checkpoint: Path, out: Path, *more: str | Path) -> list[str]:
    return [
        *(sys.executable, "-P", "-m", "tidegate.cli", "convert", str(checkpoint)),
        *("--out", str(out), "--quiet", *map(str, more)),
    ]


def environment() -> dict[str, str]:
    """Of one thread, since several spin where other tests run beside; the sources tested here."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment())


def run(arguments: list[str]) -> None:
    process = start(arguments)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 0, told


def files_of(bundle: Path) -> dict[str, bytes]:
    return {
        path.relative_to(bundle).as_posix(): path.read_bytes()
        for path in sorted(bundle.rglob("*"))
        if path.is_file()
    }


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.name != out.name)


@pytest.mark.system
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_conversion_that_is_killed_again_and_again_ends_in_the_same_bytes(
    checkpoint: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    recipe = tmp_path / "aware.toml"
    recipe.write_text(AWARE)
    whole, out = tmp_path / "whole" / "b", tmp_path / "killed" / "b"
    run(command(checkpoint, whole, "--recipe", recipe))
    chance = random.Random(int(stop))
    stopped = 0
    for blocks in (1, chance.randint(2, 4), 6):
        before = finished_blocks(out)
        process = start(command(checkpoint, out, "--recipe", recipe))
        # One more than there were: before that it may not listen to signals yet.
        while process.poll() is None and finished_blocks(out) < max(blocks, before + 1):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(stop)
        told = process.communicate(timeout=60)[1]
        stopped += process.returncode != 0
        if out.exists():
            Bundle.open(out)  # a bundle that is there is whole
            break
        if stop is signal.SIGTERM:
            assert "tidegate: interrupted: what is finished is kept" in told
            assert "Traceback" not in told
    assert stopped
    run(command(checkpoint, out, "--recipe", recipe))
    found, expected = files_of(out), files_of(whole)
    version = json.loads(found.pop("manifest.json"))["version"]
    assert json.loads(expected.pop("manifest.json"))["version"] == 1
    assert version <= 2  # 2 if the last kill came after the bundle was in place
    assert found == expected
    assert beside(out) == []


@pytest.mark.parametrize(
    ("aware", "limit_bytes"),
    [
        (False, 1),
        (False, 100_000),
        (False, 400_000),
        (True, 200_000),  # every packed block is smaller; what they give for the text is not
    ],
)
def test_a_full_disk_is_one_clear_error_and_the_work_goes_on_after_it(
    checkpoint: Path, tmp_path: Path, aware: bool, limit_bytes: int
) -> None:
    out, whole = tmp_path / "full" / "b", tmp_path / "whole" / "b"
    plan, arguments = PLAN, command(checkpoint, out, "--group-size", "32")
    if aware:
        text, recipe = tmp_path / "text.txt", tmp_path / "aware.toml"
        text.write_text("abcdefgh" * 80)
        recipe.write_text(AWARE)
        plan = replace(PLAN, recipe=load_recipe(str(recipe)), text=text)
        arguments = command(checkpoint, out, "--recipe", recipe, "--text", text)
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)),
    )
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not out.exists()
    convert(checkpoint, out, plan)
    convert(checkpoint, whole, plan)
    assert files_of(out).keys() == files_of(whole).keys()
    assert all(files_of(out)[name] == data for name, data in files_of(whole).items())
    assert beside(out) == []


def finished_blocks(out: Path) -> int:
    return len(list(out.parent.glob(f".{out.name}.work-*/stage-0/*.safetensors")))


def interrupted_at(plan: ConversionPlan, checkpoint: Path, out: Path) -> Path:
    """Interrupt a conversion when two blocks are done; gives the work folder."""

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, out, plan, stop)
    (work,) = out.parent.glob(f".{out.name}.work-*")
    return work


def test_what_was_finished_is_used_again(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    work = interrupted_at(PLAN, checkpoint, out)
    finished = {path.name for path in (work / "stage-0").iterdir()}
    assert finished == {"embed.safetensors", "layers.0.safetensors"}
    before = (work / "stage-0" / "embed.safetensors").stat().st_ino
    seen: list[int] = []
    convert(
        checkpoint,
        out,
        PLAN,
        lambda what, done, total: seen.append(
            (work / "stage-0" / "embed.safetensors").stat().st_ino
        ),
    )
    assert set(seen) == {before}
    assert beside(out) == []


def test_another_recipe_checkpoint_or_text_does_not_use_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    works = {interrupted_at(PLAN, checkpoint, out)}
    other_recipe = replace(PLAN, recipe=make_recipe(bits=8, group_size=32, symmetric=False))

    def remove_others() -> Path:
        (found,) = set(out.parent.glob(".b.work-*")) - works
        works.add(found)
        return found

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    arch = tiny_architecture(layers=4, tied_head=False)
    other = write_checkpoint(tmp_path / "other", arch, RandomWeights(arch, seed=1))
    shorter = replace(PLAN, context_tokens=100)
    for folder, plan in ((checkpoint, other_recipe), (other, PLAN), (checkpoint, shorter)):
        with pytest.raises(KeyboardInterrupt):
            convert(folder, out, plan, stop)
        remove_others()
    assert len(works) == 4


def test_a_restart_drops_what_is_there(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    interrupted_at(PLAN, checkpoint, out)
    interrupted_at(replace(PLAN, context_tokens=100, restart=True), checkpoint, out)
    convert(checkpoint, out, replace(PLAN, restart=True))
    assert beside(out) == []


def test_a_finished_target_is_not_made_again(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("openvino"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, out, PLAN, stop)
    assert not out.exists()
    told: list[str] = []
    convert(checkpoint, out, PLAN, lambda what, done, total: told.append(what))
    assert {what.partition(":")[0] for what in told} == {"openvino"}


def test_two_conversions_to_one_place_do_not_meet(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    met: list[str] = []

    def again(what: str, done: int, total: int) -> None:
        if not met:
            process = start(command(checkpoint, out, "--group-size", "32"))
            met.append(process.communicate(timeout=60)[1])

    assert convert(checkpoint, out, PLAN, again).manifest.version == 1
    assert "another process is making it" in met[0]


def test_a_refusal_leaves_no_work(checkpoint: Path, tmp_path: Path) -> None:
    def refuse(block: Block, data: BlockData | None) -> None:
        if block.layer == 2:
            raise ValueError("no")

    recipe = replace(RECIPE, passes=(scripted(refuse),))
    with pytest.raises(ConversionError, match=r"pass scripted: layers\.2: ValueError: no"):
        convert(checkpoint, tmp_path / "b", replace(PLAN, recipe=recipe))
    assert os.listdir(tmp_path) == []


def test_data_is_seen_alike_after_an_interruption(checkpoint: Path, tmp_path: Path) -> None:
    grams: list[bytes] = []
    stop = [False]

    def look(block: Block, data: BlockData | None) -> None:
        assert data is not None
        if block.layer == 3:
            if stop[0]:
                raise KeyboardInterrupt
            grams.append(data.gram("layers.3.down").numpy().tobytes())

    recipe = replace(RECIPE, passes=(scripted(look, data=True),))
    plan = replace(PLAN, recipe=recipe, targets=("onnx",))
    convert(checkpoint, tmp_path / "a", plan)
    stop[0] = True
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, tmp_path / "b", plan)
    stop[0] = False
    convert(checkpoint, tmp_path / "b", plan)
    assert grams[0] == grams[1]
