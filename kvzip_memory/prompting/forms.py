"""Forms in which families of models write calls of tools.

A model whose template knows no tools, or a form that we do not know, is told Hermes' form in words.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Where a call's name and its id stand in what opens it, in a form whose JSON holds only the arguments.
NAME, ID = "{name}", "{id}"


@dataclass(frozen=True)
class ToolForm:
    """How a family of models writes its calls: ``begin (open JSON close) between (open JSON close) ... end``.

    Attributes:
        name: what users call it.
        begin, open, close, between, end: the texts around the JSON of each call. With :data:`NAME` in ``open`` the JSON is the
            arguments alone.
        arguments: the JSON's key for the arguments, beside ``name``, otherwise.
        prefix: a token that may stand before everything.
    """

    name: str
    begin: str
    open: str
    close: str
    between: str
    end: str
    arguments: str = "arguments"
    prefix: str | None = None

    @property
    def trigger(self) -> str:
        """What tells a call from other text; empty if a call is known by its being JSON."""
        return head.split()[0] if (head := self.head) else ""

    @property
    def head(self) -> str:
        """What stands before the JSON, or the name, of the first call."""
        return self.begin + self.opening

    @property
    def opening(self) -> str:
        return self.open.partition(NAME)[0]

    @property
    def named(self) -> str:
        """What stands between a call's name and its arguments; empty if the JSON holds both."""
        return self.open.partition(NAME)[2]


FORMS = {
    form.name: form
    for form in (
        ToolForm("hermes", "", "<tool_call>\n", "\n</tool_call>", "\n", ""),
        ToolForm("llama3", "", "", "", "; ", "", arguments="parameters", prefix="<|python_tag|>"),
        ToolForm("mistral", "[TOOL_CALLS] [", "", "", ", ", "]"),
        ToolForm("mistral-args", "", f"[TOOL_CALLS]{NAME}[ARGS]", "", "", ""),
        ToolForm("mistral-ids", "", f"[TOOL_CALLS]{NAME}[CALL_ID]{ID}[ARGS]", "", "", ""),
    )
}


def form_of(template: str) -> ToolForm | None:
    """The form in which a chat template writes calls; None if it knows no tools or writes them in a form we do not know."""
    if "[TOOL_CALLS]" in template:
        return FORMS["mistral" if "[ARGS]" not in template else "mistral-ids" if "[CALL_ID]" in template else "mistral-args"]
    if "<tool_call>" in template and "<function=" not in template:
        return FORMS["hermes"]
    if '"parameters": ' in template and "<|eot_id|>" in template:
        return FORMS["llama3"]
    return None
