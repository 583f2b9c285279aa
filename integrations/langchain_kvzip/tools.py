"""Tools as LangChain's users give them, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from langchain_core.utils.function_calling import convert_to_openai_tool

from kvzip_memory import InputError
from langchain_kvzip.structured import own_schema


def openai_tool(tool: Any) -> dict[str, Any]:
    """A tool in OpenAI's form."""
    own = own_schema(tool)
    kinds = own.get("type") if own else None
    if isinstance(tool, dict) and isinstance(kinds, list) and "object" in kinds:  # a call's arguments are one
        tool = own = {**tool, "type": "object"}
    try:
        made = convert_to_openai_tool(tool)
    except Exception as error:  # LangChain's, in many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{str(tool)[:80]} is no tool ({reason}); give a function, a tool, a class, or a mapping in OpenAI's form or with a title"
        ) from error
    if own and "function" in made:
        made["function"]["parameters"] = {key: value for key, value in own.items() if key not in ("title", "description")}
    return made
