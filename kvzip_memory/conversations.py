"""Conversations that grow: older messages are folded into contexts, block by block, and nothing is forgotten.

For agents, whose frameworks send the whole conversation with every call. Whether a context begins a conversation is decided
by token ids alone, so an edited, forked or rewound conversation finds what still fits or is read anew, and what was
remembered can be lost without any answer being another one.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvzip_memory.compression.ratios import checked_ratio
from kvzip_memory.context import CompressedContext, Recipe
from kvzip_memory.engine import KVzipEngine
from kvzip_memory.errors import BudgetError, InputError, WindowError
from kvzip_memory.prompting.fronts import front, said_first
from kvzip_memory.prompting.messages import Message
from kvzip_memory.prompting.prompt import Prompt
from kvzip_memory.prompting.tools import Tool
from kvzip_memory.system.printable import logger_of

logger = logger_of(__name__)

#: ``("tokens", 3000)``, ``("messages", 20)`` or ``("fraction", 0.5)`` of the model's window.
Size = tuple[str, float]
#: One size; a mapping of several, all of which must be reached; or a list of which one must.
Trigger = Size | Mapping[str, float] | Sequence[Size | Mapping[str, float]]


@dataclass(frozen=True)
class Recalled:
    """The context a conversation begins with.

    Attributes:
        context: None while nothing has been folded.
        messages: how many messages it stands for, from the first one on.
        front: digest of the system prompt and tools it begins with.
        changes: how often they have changed.
        refused: they cannot come behind a context, so there is none.
    """

    context: CompressedContext | None = None
    messages: int = 0
    front: str = ""
    changes: int = 0
    refused: bool = False

    @property
    def behind(self) -> bool:
        """Whether the context is one of the conversation alone, as system prompt or tools go on changing: they come behind it."""
        return self.changes > 1

    @property
    def handle(self) -> dict[str, Any] | None:
        """What to keep of it between calls; plain JSON."""
        if self.context is None:
            return {"refused": True} if self.refused else None
        handle = {"key": self.context.key, "messages": self.messages, "front": "" if self.behind else self.front}
        return {**handle, "changes": self.changes} if self.changes else handle


class Memory:
    """Folds the older messages of a conversation when those behind its context have become too many.

    Folds are made between messages, never between an answer's tool calls and their results. Safe for threads.

    Args:
        trigger: how much must have come behind the context (all messages at first) for a fold.
        keep: how much stays as it is.

    Raises:
        InputError: a size that is none, or ``keep`` not below the same size of ``trigger``.
    """

    def __init__(self, trigger: Trigger, keep: Size) -> None:
        clauses: Any = trigger if isinstance(trigger, list) else [trigger]
        for size in [keep, *(clause for clause in clauses if not isinstance(clause, Mapping))]:
            if not (isinstance(size, tuple) and len(size) == 2):
                raise InputError(f'{size!r} is no size; give ("tokens", n), ("messages", n) or ("fraction", x)')
        self._clauses = [dict(clause) if isinstance(clause, Mapping) else dict([clause]) for clause in clauses]
        self._keep, self._warned = keep, False
        for kind, value in [keep, *(item for clause in self._clauses for item in clause.items())]:
            if kind not in ("tokens", "messages", "fraction") or not value > 0 or (kind == "fraction" and value > 1):
                raise InputError(
                    f'{(kind, value)} is no size; give ("tokens", n), ("messages", n), or ("fraction", x) of the window, 0 < x <= 1'
                )
        for clause in self._clauses:
            if not clause or not keep[1] < clause.get(keep[0], float("inf")):
                raise InputError(f"trigger {clause} with keep {keep} would fold at every call; keep less than triggers")

    def recall(
        self,
        engine: KVzipEngine,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        base: CompressedContext | None = None,
        handle: Mapping[str, Any] | None = None,
        ratio: float | None = None,
        tags: Sequence[str] = (),
    ) -> Recalled:
        """The context that the conversation begins with, extended if a fold is due and there is room for it.

        A conversation that is no prompt has none. Where the system prompt or the tools are other ones than at the call before, twice, the
        context is from then on one of the turns alone; the system prompt is then to come behind it, before the first that a user says.

        Args:
            engine: whose contexts they are.
            messages: the whole conversation; it ends with what is to be answered.
            tools: the tools of the prompt.
            base: the context the conversation is over, if any.
            handle: what was recalled at the call before; without it the longest stored beginning of no smaller ratio is looked for.
            ratio: kept fraction of the pairs of what is folded; None is that of the context before, or the engine's.
            tags: of the conversation, by which its contexts are forgotten.

        Raises:
            InputError: a ratio outside (0, 1], or a ``base`` of another tenant.
            ModelError: see :meth:`KVzipEngine.load`.
        """
        ratio = None if ratio is None else checked_ratio(ratio)
        base = engine.one_context([base])
        if handle and handle.get("refused"):
            return Recalled(refused=True)
        now, changes = front(messages, tools), int((handle or {}).get("changes", 0))
        changes += bool(handle and handle.get("front", now) not in ("", now))
        if changes > 1:
            return self._recalled_behind(engine, messages, tools, base, handle, ratio, tags, changes)
        return replace(self._recalled(engine, messages, tools, base, handle, ratio, tags), front=now, changes=changes)

    def _recalled_behind(
        self,
        engine: KVzipEngine,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        base: CompressedContext | None,
        handle: Mapping[str, Any] | None,
        ratio: float | None,
        tags: Sequence[str],
        changes: int,
    ) -> Recalled:
        """The context of the turns alone, if the system prompt and the tools can come behind it."""
        first = said_first(messages)
        system, turns = messages[:first], messages[first:]
        handle = handle and {**handle, "messages": int(handle["messages"]) - first}
        found = self._recalled(engine, turns, None, base, handle, ratio, tags, alone=True)
        if found.context is not None:
            rest = list(turns[found.messages :])
            at = next(i for i, message in enumerate(rest) if message["role"] == "user")
            try:
                engine.prompt_ids(found.context, [*rest[:at], *system, *rest[at:]], tools)
            except InputError as error:
                if not self._warned:
                    self._warned = True
                    warnings.warn(
                        "nothing is folded: the system prompt or the tools change, and this model's chat template does not take them "
                        f"behind a conversation ({error}); keep them as they are, and say what changes in the last message",
                        stacklevel=3,
                    )
                return Recalled(refused=True)
        return replace(found, messages=found.messages + first if found.context else 0, changes=changes)

    def _recalled(
        self,
        engine: KVzipEngine,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        base: CompressedContext | None,
        handle: Mapping[str, Any] | None,
        ratio: float | None,
        tags: Sequence[str],
        alone: bool = False,
    ) -> Recalled:
        try:
            talk = _Talk(engine, messages, tools, base, tags, alone)
        except InputError as error:  # whoever asks it will say so
            logger.debug("nothing is recalled: %s", error)
            return Recalled()
        found = talk.stored(handle, engine.ratio if ratio is None else ratio)
        if found.context is not None:
            engine.registry.join(found.context.key, tags)
        cut = self._cut(talk, found) if self._due(talk, found) else None
        if cut is None:
            return found
        try:
            return talk.folded(found, cut, ratio)
        except WindowError as error:  # the prompt may fit all the same, or will say so itself
            logger.debug("nothing is folded: %s", error)
        except BudgetError as error:
            warnings.warn(f"nothing is folded: {error}", stacklevel=2)
        return found

    def _due(self, talk: _Talk, found: Recalled) -> bool:
        before = found.context or talk.base
        tokens = len(talk.ids) - (before.n_tokens if before else 0)
        sizes = {
            "tokens": tokens,
            "fraction": tokens / talk.engine.window,
            "messages": sum(message["role"] != "system" for message in talk.messages[found.messages :]),
        }
        return any(all(sizes[kind] >= value for kind, value in clause.items()) for clause in self._clauses)

    def _cut(self, talk: _Talk, found: Recalled) -> int | None:
        """How many messages the next context stands for, None if nothing can be folded."""
        kind, value = self._keep
        points = [i for i in talk.borders if i > found.messages]
        if kind == "messages":
            points = [i for i in points if i <= len(talk.messages) - value]
        else:
            tokens = value if kind == "tokens" else value * talk.engine.window
            end = bisect_left(points, True, key=lambda i: len(talk.ids) - talk.length(i) <= tokens)
            points = points[: end + 1]
        cut = next((i for i in reversed(points) if talk.fits(found, i)), None)
        if points and cut is None:
            warnings.warn("nothing is folded: this model's chat template changes the beginning of a prompt as it grows", stacklevel=3)
        return cut


class _Talk:
    """A conversation as a prompt, and the prompts of its beginnings."""

    def __init__(
        self,
        engine: KVzipEngine,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        base: CompressedContext | None,
        tags: Sequence[str],
        alone: bool,
    ) -> None:
        self.engine, self.messages, self.tools, self.base, self.tags = engine, list(messages), tools, base, tags
        self._prompts = engine._prompts
        recipe = base.recipe if base else None
        self.ids = [*(base.token_ids.tolist() if base else []), *self._prompts.question(recipe, messages, tools, fixed=True)]
        said = said_first(messages)
        end = len(self.messages)
        if alone:  # behind it something that a user says, which the system prompt comes before
            end = max((i + 1 for i, message in enumerate(messages) if message["role"] == "user"), default=0)
        #: Numbers of messages that a context may stand for.
        self.borders = [i for i in range(said + 1, end) if messages[i]["role"] != "tool" and not messages[i - 1].get("tool_calls")]

    def stored(self, handle: Mapping[str, Any] | None, ratio: float) -> Recalled:
        """The context of a handle if the conversation begins with it, else the longest one stored, if it keeps as much."""
        context, count = None, 0
        if handle is not None:
            try:
                context, count = self.engine.get(handle["key"]), int(handle["messages"])
            except (BudgetError, InputError) as error:
                logger.debug("%s", error)
        if context is not None and count in self.borders and self._begins(context.token_ids.tolist(), context.recipe, count):
            return Recalled(context, count)
        context = self.engine.stored_prefix(self.ids, ratio)
        if context is None or (self.base and context.n_tokens <= self.base.n_tokens):
            return Recalled()
        at = bisect_left(self.borders, context.n_tokens, key=self.length)
        if at < len(self.borders) and self._begins(context.token_ids.tolist(), context.recipe, self.borders[at]):
            return Recalled(context, self.borders[at])
        return Recalled()

    def length(self, count: int) -> int:
        """Tokens of the first ``count`` messages; 0 where the template does not let them end there."""
        try:
            return len(self._beginning(Recalled(), count).token_ids)
        except InputError:
            return 0

    def fits(self, found: Recalled, count: int) -> bool:
        """Whether the prompt is that of a context of the first ``count`` messages and what comes behind it."""
        try:
            prompt = self._beginning(found, count)
        except InputError:
            return False
        return self._begins(prompt.token_ids, prompt.recipe, count)

    def folded(self, found: Recalled, count: int, ratio: float | None) -> Recalled:
        parent, more = found.context or self.base, self.messages[found.messages : count]
        if parent is None:
            return Recalled(self.engine.load(more, tools=self.tools, ratio=ratio, tags=self.tags), count)
        self.engine.leave_behind(parent.identity.get("parent"), self.tags)
        context = self.engine.extend(parent, more, tools=self.tools, ratio=ratio, tags=self.tags, behind=True, share=None)
        return Recalled(context, count)

    def _begins(self, ids: Sequence[int], recipe: Recipe, count: int) -> bool:
        try:
            return self.ids == [*ids, *self._prompts.question(recipe, self.messages[count:], self.tools)]
        except InputError:
            return False

    def _beginning(self, found: Recalled, count: int) -> Prompt:
        parent, more = found.context or self.base, self.messages[found.messages : count]
        return (
            self._prompts.conversation(more, tools=self.tools)
            if parent is None
            else self._prompts.more_turns(parent, more, (), self.tools, behind=True)
        )
