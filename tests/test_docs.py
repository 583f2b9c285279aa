"""The snippets of docs/llamaindex.md, run from top to bottom on SmolLM2."""

import re
from pathlib import Path

import pytest

from kvzip_memory import KVzipEngine

PAGE = Path(__file__).parent.parent / "docs" / "llamaindex.md"


def test_the_llamaindex_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: KVzipEngine) -> None:
    monkeypatch.chdir(tmp_path)
    # The same weights, already loaded, in the place of a download.
    monkeypatch.setattr(KVzipEngine, "from_pretrained", lambda model, **options: smollm2)
    (tmp_path / "contracts").mkdir()
    (tmp_path / "contracts" / "lease.txt").write_text("The lease was signed by Ms Ito on 3 May. " * 8)
    (tmp_path / "contracts" / "car.txt").write_text("The car is leased from Mr Abe until June. " * 8)
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(snippets) == 10
    names: dict[str, object] = {"__name__": "page"}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
