"""`TextReader`: a text that is still arriving, read by a format as if it were there.

A format is a generator that yields wherever it must wait for more text. Each decision is made from text that no
later text can change, so what comes out does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from functools import cache
from typing import TypeVar

ResultT = TypeVar("ResultT")
Steps = Generator[None, None, ResultT]
Emit = Callable[[str], None]

_SPACE = re.compile(r"[ \t\r\n]*")


class TextReader:
    """`text[position:]` has arrived and is not read yet; once `is_complete`, nothing follows."""

    def __init__(self) -> None:
        self.text = ""
        self.position = 0
        self.is_complete = False
        self._marks: list[int] = []

    def push(self, text: str) -> None:
        kept = self._marks[0] if self._marks else self.position
        if kept:
            self.text = self.text[kept:]
            self.position -= kept
            self._marks = [mark - kept for mark in self._marks]
        self.text += text

    def mark(self) -> None:
        """Remember this place, so that `rewind` can go back to it. Marks may be nested."""
        self._marks.append(self.position)

    def release(self) -> None:
        """Forget the last mark."""
        self._marks.pop()

    def rewind(self) -> None:
        """Back to the last mark, which is forgotten."""
        self.position = self._marks.pop()

    def peek(self) -> Steps[str]:
        """The next character; "" at the end."""
        while self.position == len(self.text):
            if self.is_complete:
                return ""
            yield
        return self.text[self.position]

    def skip_space(self) -> Steps[str]:
        """Pass white space by; the next character, "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.text) or self.is_complete:
                return self.text[self.position : self.position + 1]
            yield

    def take(self, literals: Sequence[str]) -> Steps[str | None]:
        """Pass the longest of `literals` that stands here; None, and nothing passed, where none does."""
        while True:
            left = len(self.text) - self.position
            is_open = not self.is_complete and any(
                left < len(literal) and literal.startswith(self.text[self.position :]) for literal in literals
            )
            if not is_open:
                break
            yield
        found = max((x for x in literals if self.text.startswith(x, self.position)), key=len, default=None)
        if found is not None:
            self.position += len(found)
        return found

    def until(self, markers: Sequence[str], emit: Emit) -> Steps[str | None]:
        """Emit what stands before the first of `markers`, as it arrives, and pass the marker, which is returned.

        None at the end of the text. Where two begin at one place, the longer counts.
        """
        finder = _finder(tuple(markers))
        while True:
            match = finder.pattern.search(self.text, self.position)
            held = len(self.text) if self.is_complete else finder.hold(self.text, self.position)
            if match is not None and (match.start() < held or self.is_complete):
                if match.start() > self.position:
                    emit(self.text[self.position : match.start()])
                self.position = match.end()
                return match.group()
            if held > self.position:
                emit(self.text[self.position : held])
                self.position = held
            if self.is_complete:
                return None
            yield

    def scan(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Pass what `pattern` matches: a run of single characters, so that more text can only lengthen it."""
        parts = []
        while True:
            match = pattern.match(self.text, self.position)
            if match is not None:
                parts.append(match.group())
                self.position = match.end()
            if self.position < len(self.text) or self.is_complete:
                return "".join(parts)
            yield


class _Finder:
    def __init__(self, markers: tuple[str, ...]) -> None:
        self.pattern = re.compile("|".join(re.escape(marker) for marker in sorted(markers, key=len, reverse=True)))
        self._prefixes = {marker[:size] for marker in markers for size in range(1, len(marker))}
        self._longest = max(map(len, markers)) - 1

    def hold(self, text: str, start: int) -> int:
        """Where the longest end of `text` begins that a marker may go on from; its length where there is none."""
        for position in range(max(start, len(text) - self._longest), len(text)):
            if text[position:] in self._prefixes:
                return position
        return len(text)


@cache
def _finder(markers: tuple[str, ...]) -> _Finder:
    return _Finder(markers)
