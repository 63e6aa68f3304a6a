"""Several models in the real service, and a new version by SIGHUP while clients stream."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from services import Services, run_tidegate, until
from streams import chat
from wordmodel import write_word_checkpoint

pytestmark = pytest.mark.system

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two versions of a model, which say other things."""
    root = tmp_path_factory.mktemp("versions")
    first, second = (write_word_checkpoint(root / f"v{seed}", seed=seed) for seed in (3, 4))
    return first, second


def config(file: Path, model: Path, *more: Path) -> Path:
    text = f'threads = 1\n[[model]]\nname = "m"\npath = "{model}"\nrows = 4\n'
    for place, path in enumerate(more):
        text += f'[[model]]\nname = "other{place}"\npath = "{path}"\nrows = 2\n'
    file.write_text(text)
    return file


def said(url: str, number: int) -> str:
    body = chat(f"word {number}", max_tokens=8, model="m", temperature=0)
    answer = httpx.post(f"{url}{CHAT}", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_sighup_with_a_changed_file_replaces_a_model_under_load(
    tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    first, second = folders
    file = config(tmp_path / "cloud.toml", first)
    with Services(tmp_path) as services:
        cloud = services.tidegate(
            "cloud", "cloud", "--config", str(file), "--listen", "127.0.0.1:0"
        )
        old = [said(cloud.url, number) for number in range(5)]
        found: Counter[str] = Counter()
        stop = threading.Event()

        def asks(first_number: int) -> None:
            number = first_number
            while not stop.is_set():
                text = said(cloud.url, number % 5)
                found["old" if text == old[number % 5] else text] += 1
                number += 1

        threads = [threading.Thread(target=asks, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        config(file, second, first)
        cloud.process.send_signal(signal.SIGHUP)

        def replaced() -> bool:
            models = cloud.get("/status")["models"]
            return len(models) == 2 and models["m"]["loads"] == 2

        until(replaced, "the new version is loaded")
        before = sum(found.values())
        until(lambda: sum(found.values()) > before + 6, "answers after the change")
        stop.set()
        for thread in threads:
            thread.join(30)
        new = [said(cloud.url, number) for number in range(5)]
        assert not set(old) & set(new)
        assert found["old"] > 0
        assert set(found) <= {"old", *new}, "every answer is wholly of one version"
        assert [one["id"] for one in cloud.get("/v1/models")["data"]] == ["m", "other0"]
        assert cloud.stop() == 0


def test_one_that_cannot_be_read_changes_nothing_and_a_call_for_the_second_loads_it(
    tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    first, second = folders
    file = config(tmp_path / "cloud.toml", first, second)
    with Services(tmp_path) as services:
        cloud = services.tidegate(
            "cloud", "cloud", "--config", str(file), "--listen", "127.0.0.1:0"
        )
        states = {one["id"]: one["state"] for one in cloud.get("/v1/models")["data"]}
        assert states == {"m": "ready", "other0": "unloaded"}
        body = chat("hi", max_tokens=4, model="other0")
        answer = httpx.post(f"{cloud.url}{CHAT}", json=body, timeout=30).json()
        assert answer["model"] == "other0"
        config(file, tmp_path / "nowhere")
        refused = httpx.post(f"{cloud.url}/admin/reload", json={}, timeout=30)
        assert refused.status_code == 409
        assert "nowhere" in refused.json()["error"]["message"]
        file.write_text("wors = 3")
        refused = httpx.post(f"{cloud.url}/admin/reload", json={}, timeout=30)
        assert refused.json()["error"]["message"].startswith("wors = 3: must be one of")
        assert said(cloud.url, 1)
        assert cloud.stop() == 0


def test_a_budget_that_is_too_small_is_one_line_with_the_sum(
    tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    file = config(tmp_path / "cloud.toml", folders[0])
    done = run_tidegate("cloud", "--config", str(file), "--models-mib", "1")
    assert done.returncode == 1
    assert done.stderr.startswith("tidegate: models_mib = 1: must be at least ")
    assert "m: KV, 4 x " in done.stderr
