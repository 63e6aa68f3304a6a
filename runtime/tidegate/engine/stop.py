"""Stop strings across token borders: text that may be the beginning of one is held back."""

from __future__ import annotations


class StopStrings:
    """Passes text through until a stop string appears, which is never passed on itself.

    Holds at most one character less than the longest stop string.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to emit, and whether a stop string ended the answer."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        safe = self._safe(text)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """What was held back, once the answer has ended otherwise."""
        text, self._held = self._held, ""
        return text

    def _safe(self, text: str) -> int:
        """Where the longest end of `text` starts that begins a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
