"""What a model thinks before it answers, told from the answer while both arrive."""

from __future__ import annotations

from collections.abc import Iterator


class Reasoning(str):
    """A piece of what the model thinks; plain strings are pieces of what it says."""

    __slots__ = ()


class ReasoningReader:
    """Tells reasoning from text in the pieces of an answer. It comes first, between tags, or not at all.

    Args:
        tags: what the model writes around it, such as ``<think>`` and ``</think>``.
        inside: whether the prompt has opened it already.

    Attributes:
        reasoning: all of it so far, without tags and the white space around it.
        text: all that was said so far, without the empty lines between the two.
    """

    def __init__(self, tags: tuple[str, str], inside: bool = False) -> None:
        self._opening, self._closing = tags
        self._inside, self._said, self._closed = inside, False, False
        self._held = ""  # may be the beginning of a tag, or white space at an end
        self.reasoning = self.text = ""

    def push(self, piece: str) -> Iterator[str]:
        """Pieces of what is known of it; what may be a part of a tag is held back."""
        self._held += piece
        while self._held:
            if self._said:
                yield from self._say(self._held)
                self._held = ""
            elif self._inside:
                thought, closed, rest = self._held.partition(self._closing)
                if not closed:
                    kept = _beginning(self._held, self._closing)
                    settled = self._held[: len(self._held) - kept].rstrip()
                    yield from self._think(settled)
                    self._held = self._held[len(settled) :]
                    return
                yield from self._think(thought.rstrip())
                self._held, self._inside, self._said, self._closed = rest, False, True, True
            else:
                start = self._held.lstrip()
                if start.startswith(self._opening):
                    self._held, self._inside = start.removeprefix(self._opening), True
                elif self._opening.startswith(start):
                    return
                else:
                    self._said = True

    def flush(self) -> Iterator[str]:
        """What was held back because a tag could have begun with it."""
        held, self._held = self._held, ""
        yield from self._think(held.rstrip()) if self._inside else self._say(held)

    def _think(self, thought: str) -> Iterator[str]:
        thought = thought if self.reasoning else thought.lstrip()
        if thought:
            self.reasoning += thought
            yield Reasoning(thought)

    def _say(self, text: str) -> Iterator[str]:
        text = text.lstrip("\n") if self._closed and not self.text else text
        if text:
            self.text += text
            yield text


def _beginning(text: str, tag: str) -> int:
    """How many characters at the end of a text a tag may begin with."""
    return max((n for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)
