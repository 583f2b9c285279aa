"""Short turns in the place of what is not known yet, or need not be rendered again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvzip_memory.prompting.messages import Message, system_messages

#: Stands for a question that is not known yet. A digit merges with nothing that comes before it.
ASKED: Message = {"role": "user", "content": "0"}


def lead(role: str, system: str = "", end: str = "") -> list[Message]:
    """The shortest conversation that ends in a role, behind a system prompt, and in a text that goes on with ``end``."""
    text = f"a{end}"
    before = system_messages(system or None)
    if role == "system":
        return [{"role": "system", "content": f"{system or 'a'}{end}"}]
    if role == "assistant":
        return [*before, {"role": "user", "content": "a"}, {"role": "assistant", "content": text}]
    if role == "tool":
        call = a_call("a", {})
        return [*before, {"role": "user", "content": "a"}, call, {"role": "tool", "content": text, "tool_call_id": None}]
    return [*before, {"role": "user", "content": text}]


def a_call(name: str, arguments: Mapping[str, Any], call_id: str | None = None) -> Message:
    """An answer that is one call."""
    return {"role": "assistant", "content": "", "tool_calls": [{"id": call_id, "name": name, "arguments": arguments}]}
