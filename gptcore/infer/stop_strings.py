"""Cut a stream of text at the first stop string, wherever the pieces break."""

from __future__ import annotations

from collections.abc import Sequence

from gptcore.errors import UserError


class StopStrings:
    """Passes text through until one of ``stops`` appears; holds back what may still become one.

    The stop string itself and what follows are dropped. Where several end up matching, the one that starts
    first wins. Raises UserError for an empty stop string, which would match before any text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise UserError("a stop string is empty; leave it out or give at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """The part of the text so far that is now safe to show. Nothing more once ``matched`` is set."""
        if self.matched is not None:
            return ""
        text = self._held + piece
        found = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            place, self.matched = min(found)
            self._held = ""
            return text[:place]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - size :]):
            return size
    return 0
