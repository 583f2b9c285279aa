"""Options of a call, as LangChain and its users give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvzip_memory import InputError
from kvzip_memory.frameworks.options import CALL_OPTIONS, renamed
from langchain_kvzip.structured import Wanted

# Options of a call that say nothing to a local model.
_IGNORED = {"ls_structured_output_format", "strict", "stream", "stream_usage", "timeout", "user"}

# With ``keep_unfinished`` what is cut is given as it is, not raised.
_KNOWN = {*CALL_OPTIONS, "reuse", "tools", "tool_choice", "parallel_tool_calls", "response_format", "model", "keep_unfinished"}


def given_options(options: Mapping[str, Any], model_name: str) -> dict[str, Any]:
    """The options of a call under their own names.

    Raises:
        InputError: some of them are unknown, or another model is asked for.
    """
    given = renamed(options)
    if (model := given.get("model") or model_name) != model_name:
        raise InputError(f"model={model!r} was asked of a chat model over {model_name!r}; make another one with the same engine")
    if unknown := sorted(given.keys() - _KNOWN - _IGNORED):
        raise InputError(f"options {unknown} are unknown; known are {sorted(_KNOWN)}")
    return given


@dataclass(frozen=True)
class CallOptions:
    """What a call is made with.

    Attributes:
        stream: arguments of :meth:`KVzipEngine.stream`.
        told: whether the model is told of the schema, too.
        keep_unfinished: whether an answer that is cut is given as it is.
    """

    stream: dict[str, Any]
    told: bool
    keep_unfinished: bool

    @classmethod
    def of(cls, given: Mapping[str, Any], sampling: Mapping[str, Any], reuse: bool | float) -> CallOptions:
        """Of :func:`given_options`.

        Raises:
            InputError: a ``response_format`` that is none.
        """
        response_format = given.get("response_format")
        guided = {name: given.get(name) for name in ("tools", "tool_choice", "parallel_tool_calls")}
        stream = {**sampling, "reuse": reuse, **guided, "schema": _response_schema(response_format)}
        return cls(stream, not _is_json_mode(response_format), given.get("keep_unfinished", False))


def _response_schema(response_format: Any) -> dict[str, Any] | None:
    """The schema of OpenAI's ``response_format``, of a class, or of a JSON schema."""
    if response_format is None or response_format == {"type": "text"}:
        return None
    if isinstance(response_format, Mapping) and "json_schema" in response_format:
        schema = response_format["json_schema"].get("schema") if isinstance(response_format["json_schema"], Mapping) else None
        if not isinstance(schema, Mapping):
            raise InputError(f'response_format is {str(response_format)[:80]}; it needs a JSON schema at ["json_schema"]["schema"]')
        return dict(schema)
    return {"type": "object"} if _is_json_mode(response_format) else Wanted.of(response_format).schema


def _is_json_mode(response_format: Any) -> bool:
    return isinstance(response_format, Mapping) and response_format.get("type") == "json_object"
