"""Names, tags, sources and sessions that hold what a terminal obeys: shown by every command, bar and log line as escapes."""

from __future__ import annotations

import ast
import importlib
import json
import logging
import pkgutil
import re
import sys
import unicodedata
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import kvzip_memory
import kvzip_memory.progress
import langchain_kvzip
import llama_index_kvzip
from conftest import TEXT, tiny_engine, tiny_model, tiny_tokenizer
from kvzip_memory import InputError, cli
from kvzip_memory.cli.terminal import console
from kvzip_memory.progress import Bar
from kvzip_memory.prompting.documents import Document
from kvzip_memory.system.printable import printable
from kvzip_memory.turns import TurnsFile

# A cleared screen, a title, a link, a carriage return, a line of its own, text that runs backwards, half a pair, a C1 control, an emoji by
# rich's name and rich's markup.
HOSTILE = "\x1b[2J\x1b]0;title\x07\x1b]8;;http://x\x1b\\link\r\nerror: none\x0b\x85\u2028\u202egnp\u200b\ud800\x9b31m\x7f:bomb:[red]x[/red]"
ODD = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
NAME = HOSTILE.replace("\ud800", "")  # which no name may hold


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 2000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4, ttl=1e6)
    engine.load([Document(TEXT, NAME)], name=NAME, tags=[NAME, "thread: " + NAME])
    engine.load(TEXT + "More.", name=NAME + "2", tags=NAME)
    engine.load(TEXT + "More.", name="other")
    engine.load(TEXT + "Again.", name=NAME + "2")
    engine.close()
    session = TurnsFile.of(tmp_path, None, "kvzip", NAME)
    session.append({"turns": [{"role": "user", "content": "Who?"}]}, f"memory kvzip: {NAME}", None)
    (tmp_path / "model").mkdir()
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "page.txt").write_text(TEXT)
    (tmp_path / "gguf" / (NAME.replace("/", "_") + f"-{'a' * 64}-float32-transformers-5")).mkdir(parents=True)
    return tmp_path


#: How every command is called; what it is told comes from the attacker wherever it can.
CALLS: dict[str, list[list[str]]] = {
    "load": [["{folder}/page.txt", "--model", "{folder}/model", "--name", NAME, "--tag", NAME]],
    "ls": [[], ["--tag", NAME]],
    "show": [[NAME], [HOSTILE]],
    "pin": [[NAME], [HOSTILE]],
    "unpin": [[NAME], [HOSTILE]],
    "sessions": [[]],
    "conversions": [[]],
    "verify": [[], [NAME], [HOSTILE]],
    "gc": [[]],
    "stats": [[]],
    "doctor": [[]],
    "rm": [
        ["other"],
        [HOSTILE],
        [NAME + "2"],
        ["--tag", NAME],
        ["--tag", HOSTILE],
        ["--conversion", HOSTILE],
        ["--conversion", NAME[:4]],
        [f"memory kvzip: {NAME}"],
        [NAME],
    ],
}


def commands() -> dict[str, Any]:
    return {command.name or command.callback.__name__: command for command in cli.app.registered_commands if command.callback}


def test_all_commands_are_here() -> None:
    assert set(CALLS) == set(commands())


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("command", CALLS)
def test_no_command_hands_on_what_a_terminal_obeys(
    folder: Path, command: str, as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in CALLS[command]:
        arguments = [text.replace("{folder}", str(folder)) for text in given]
        monkeypatch.setattr(
            sys, "argv", ["kvzip-memory", command, *arguments, "--cache-dir", str(folder), *(["--json"] if as_json else [])]
        )
        with pytest.raises(SystemExit):
            cli.main()
        captured = capsys.readouterr()
        for text in (re.sub(r"\rLoading weights[^\r\n]*", "", text) for text in captured):  # transformers' bar
            assert not ODD.search(text), (given, text)
            assert "💣" not in text
        assert not any(line.startswith("error: none") for line in captured.out.splitlines())
        if as_json and captured.out:
            json.loads(captured.out)
        if not as_json and captured.out and NAME in given and command != "verify":
            assert ":bomb:[red]x[/red]" in captured.out


def test_errors_of_all_kinds_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in (InputError, OSError):

        def fail(kind: Any = kind) -> None:
            raise kind(HOSTILE)

        monkeypatch.setattr(cli, "app", fail)
        with pytest.raises(SystemExit):
            cli.main()
        told = capsys.readouterr().err
        assert not ODD.search(told)
        assert "\\x1b[2J" in told.replace("\n", "")
        assert not any(line.startswith("error: none") for line in told.splitlines()[1:])


def test_texts_reach_the_console_through_one_door() -> None:
    trees = [ast.parse(path.read_text()) for path in Path(cli.__file__).parent.glob("*.py")]
    escaping = {
        function.name
        for function in chain.from_iterable(map(ast.walk, trees))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and node.id == "escape"
    }
    assert escaping == {"shown"}


def test_every_character_that_cannot_be_seen_is_an_escape() -> None:
    for code in range(sys.maxunicode + 1):
        character, kind = chr(code), unicodedata.category(chr(code))
        if kind[0] in "LMNPS" or kind == "Zs":
            assert printable(character) == character
        elif kind in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            assert printable(character).startswith("\\"), code
    assert printable("naïve 東京　🙂 .txt") == "naïve 東京　🙂 .txt"


def test_progress_bars_show_names_and_what_others_tell_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Tqdm:
        n = 0

        def __init__(self, **options: Any) -> None:
            made.append(options["desc"])

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            made.append(text)

        def update(self, n: int) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr(kvzip_memory.progress, "tqdm", Tqdm)
    with Bar(HOSTILE + "x" * 1000, True) as bar:
        bar.show(HOSTILE + "x" * 1000, 0, 0)
    assert len(made) == 2
    assert not any(ODD.search(text) or "\n" in text or len(text) > 40 for text in made)


def modules() -> Iterator[Any]:
    for package in (kvzip_memory, langchain_kvzip, llama_index_kvzip):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield importlib.import_module(module.name)


def test_all_log_lines_are_printable(caplog: pytest.LogCaptureFixture) -> None:
    loggers = {module.logger for module in modules() if isinstance(getattr(module, "logger", None), logging.Logger)}
    assert len(loggers) >= 14
    for logger in loggers:
        logger.error("%s of %d: %s (%r) %.1f", HOSTILE, 3, OSError(HOSTILE), HOSTILE, 0.5)
        logger.error(HOSTILE)
    assert len(caplog.messages) == 2 * len(loggers)
    assert not any(ODD.search(text) or "\n" in text for text in caplog.messages)
    assert " of 3: " in caplog.messages[0]
    for module in modules():
        if module.__name__ != "kvzip_memory.system.printable":
            assert "getLogger" not in Path(str(module.__file__)).read_text(), f"{module.__name__}: take logger_of"


def test_a_log_line_of_a_conversation_s_name_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    engine, mark = tiny_engine(ratio=0.4), {"cache_control": {"type": "ephemeral"}}
    for turn in range(4):
        system = {"role": "system", "content": [{"type": "text", "text": f"{turn} " + TEXT * 2, **mark}]}
        engine.load_marked([system, {"role": "user", "content": "Who?"}], tags=NAME)
    assert any("cache_control is ignored" in text for text in caplog.messages)
    assert not any(ODD.search(text) or "\n" in text for text in caplog.messages)
