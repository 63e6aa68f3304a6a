"""Recordings of steps: which are kept, and what runs otherwise."""

from __future__ import annotations

from collections.abc import Callable

from tidegate.cloud.graphs import Graphs


class Recorder:
    """Names what was recorded and what was replayed."""

    def __init__(self) -> None:
        self.recorded: list[str] = []
        self.replayed: list[str] = []
        self.now = ""

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        name = self.now
        self.recorded.append(name)
        return lambda: self.replayed.append(name)


def run(graphs: Graphs, recorder: Recorder, keys: str) -> list[str]:
    """What ran plainly."""
    plainly: list[str] = []
    for key in keys:
        recorder.now = key
        graphs.run(key, lambda key=key: plainly.append(key))  # type: ignore[misc]
    return plainly


def test_what_was_not_used_for_longest_makes_room() -> None:
    recorder = Recorder()
    graphs = Graphs(recorder, most=2)
    assert run(graphs, recorder, "abac") == ["a", "b", "c"]
    assert recorder.replayed == ["a"]
    assert len(graphs) == 2
    assert run(graphs, recorder, "acb") == ["b"], "b had to go for c"
    assert recorder.recorded == ["a", "b", "c", "b"]


def test_without_a_recorder_or_a_key_everything_runs_plainly() -> None:
    recorder = Recorder()
    assert run(Graphs(), recorder, "aa") == ["a", "a"]
    graphs = Graphs(recorder)
    ran: list[int] = []
    for _ in range(2):
        graphs.run(None, lambda: ran.append(1))
    assert (len(ran), len(graphs), recorder.recorded) == (2, 0, [])
