"""Typed answers from a loaded document: whatever the model would rather say, they validate.

python examples/structured_output.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from demo import demo_model
from langchain_core.documents import Document
from pydantic import BaseModel, Field

from langchain_kvzip import KVzipChatModel

NOTICE = """Torch Light Company, notice to all staff.
The lamp of the north tower is wound at dusk by Ferdinand. The storm of the second of March broke two panes of glass.
Mrs Abernathy has ordered new panes; they come with the supply boat on Thursday. Until then the north tower is closed to visitors.
"""


class Damage(BaseModel):
    """What was damaged."""

    what: Literal["glass", "lamp", "boat", "tower"]
    count: int = Field(ge=0, le=9)
    closed_to_visitors: bool


def main(model: str | Path) -> Damage:
    llm = KVzipChatModel(model=str(model), max_tokens=64)
    notice = llm.load_documents(Document(NOTICE * 3), name="notice")
    damage = llm.with_context(notice).with_structured_output(Damage).invoke("What did the storm break, and how many?")
    assert isinstance(damage, Damage)
    print(repr(damage))
    return damage


if __name__ == "__main__":
    main(demo_model())
