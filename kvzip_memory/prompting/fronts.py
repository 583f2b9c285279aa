"""What a prompt begins with before anything was said: the system prompt and the tools. Where it changes at every call, no context of a
prompt's beginning is ever met again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence

from kvzip_memory.prompting.messages import Message
from kvzip_memory.prompting.tools import Tool
from kvzip_memory.system.digests import digest
from kvzip_memory.system.forks import refuse_after_fork

_REMEMBERED = 4096


def said_first(messages: Sequence[Message]) -> int:
    """The first message behind the system prompt."""
    return next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))


def front(messages: Sequence[Message], tools: Sequence[Tool] | None) -> str:
    """Digest of the system prompt and the tools."""
    return digest([[message["content"] for message in messages[: said_first(messages)]], list(tools or ())])[:16]


class Fronts:
    """How often the fronts of conversations have changed from one call to the next. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        refuse_after_fork(self, "_lock")
        self._seen: OrderedDict[Hashable, tuple[str, int]] = OrderedDict()

    def changes(self, conversation: Hashable, now: str) -> int:
        """How often that of a conversation has changed without a break, until now."""
        with self._lock:
            before, count = self._seen.pop(conversation, (now, 0))
            count = count + 1 if before != now else 0
            self._seen[conversation] = now, count
            while len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
            return count
