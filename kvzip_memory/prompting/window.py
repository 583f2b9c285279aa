"""The model's window: texts that do not fit are refused before they are tokenised whole."""

from __future__ import annotations

from collections.abc import Sequence

from kvzip_memory.errors import WindowError
from kvzip_memory.prompting.encoding import Encoder
from kvzip_memory.prompting.frames import CUT
from kvzip_memory.prompting.messages import Message
from kvzip_memory.prompting.prompt import Prompt

#: Tokens of the window that a context leaves free, for a question and its answer.
FREE_TOKENS = 256


def check_room(prompt: Prompt, window: int, way_out: str = "split the text into several contexts", saved: int = 0) -> None:
    """Refuse a prompt whose context would leave no room for a question.

    Args:
        saved: tokens that take no positions for themselves.

    Raises:
        WindowError: it would.
    """
    tokens, limit = len(prompt.token_ids) - saved, max(0, window - FREE_TOKENS)
    if tokens > limit:
        shared = f" in {tokens:,} positions" if saved else ""
        raise WindowError(
            f"the text has {len(prompt.token_ids):,} tokens{shared}; a context may have {limit:,} (the model's window of {window:,} less "
            f"{FREE_TOKENS} for a question and its answer). Compressing does not widen the window: {way_out} or use a model with a "
            "longer one",
            tokens=tokens,
            window=window,
        )


class Window:
    """Counts no more than tells that texts do not fit.

    Args:
        encoder: makes ids of texts.
        tokens: that the model can hold; None refuses nothing.
    """

    def __init__(self, encoder: Encoder, tokens: int | None) -> None:
        self._encoder, self.tokens = encoder, tokens

    def check_messages(self, messages: Sequence[Message]) -> None:
        """Refuse texts that have more tokens than the window, before they are rendered. What an answer said may not be shown.

        Raises:
            WindowError: they have.
        """
        said = [message["content"].replace(CUT, "").strip() for message in messages if message["role"] != "assistant"]
        said = [text for text in said if text]
        if self.tokens is not None and len(said) > self.tokens:
            raise WindowError(
                f"{len(said):,} texts have {len(said):,} tokens and more, which were not counted; the model's window is "
                f"{self.tokens:,} tokens. Give fewer texts, or several contexts of them",
                tokens=len(said),
                window=self.tokens,
            )
        self.check(max(said, key=len, default=""))
        self.check("".join(said))

    def check(self, text: str) -> None:
        """Refuse a text that has more tokens than the window, before it is tokenised whole.

        Raises:
            WindowError: it has.
        """
        if self.tokens is None or (tokens := self._encoder.least(text, self.tokens)) <= self.tokens:
            return
        raise WindowError(
            f"a text of {len(text):,} characters has {tokens:,} tokens and more, which were not counted; the model's window is "
            f"{self.tokens:,} tokens. Give a shorter text, or several contexts of it",
            tokens=tokens,
            window=self.tokens,
        )
