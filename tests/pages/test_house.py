"""The house: rooms whose imports point one way, and files of one idea each."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from conftest import ROOT

PACKAGE = "kvzip_memory"
FOLDERS = {PACKAGE: ROOT, "langchain_kvzip": ROOT / "integrations", "llama_index_kvzip": ROOT / "integrations"}

#: The rooms of the package from the ground up; each may import those before it.
ROOMS = ("system", "context", "attention", "prompting", "inference", "compression", "registry")
#: Above them are the files at its root, above these the folders that use them, and above all the integrations.
ABOVE = ("frameworks", "cli")
#: Folders of methods, one a file.
METHODS = ("scorers", "allocators", "refit", "codecs")
#: What knows nothing of ours, and may be imported by all.
GROUND = f"{PACKAGE}.errors"

#: Lines that a file may have.
MOST_LINES = 450

FILES = {
    ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
    for package, folder in FOLDERS.items()
    for path in sorted((folder / package).rglob("*.py"))
}


def imports(module: str) -> Iterator[str]:
    """What a module imports, wherever in it; of our modules by their names, of others by any."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: import by the whole name"
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else str(node.module) for name in named)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


IMPORTS = {module: {name for name in imports(module) if name in FILES and name != module} for module in FILES}


def circle_from(module: str) -> list[str]:
    """A way along imports from a module back to it, empty if there is none."""
    ways, seen = [[module]], set[str]()
    while ways:
        way = ways.pop()
        for name in IMPORTS[way[-1]]:
            if name == module:
                return way
            if name not in seen:
                seen.add(name)
                ways.append([*way, name])
    return []


def height(module: str) -> int:
    """How far above the ground a module lies."""
    package, room = [*module.split("."), ""][:2]
    if package != PACKAGE:
        return len(ROOMS) + 2
    return ROOMS.index(room) if room in ROOMS else len(ROOMS) + (room in ABOVE)


def test_every_folder_has_its_place() -> None:
    folders = {path.parent.name for path in FILES.values() if path.parent.parent == ROOT / PACKAGE}
    assert folders == {*ROOMS, *ABOVE}


def test_no_imports_go_round_in_a_circle() -> None:
    circles = {module: way for module in FILES if (way := circle_from(module))}
    assert circles == {}


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str) -> None:
    above = {name for name in IMPORTS[module] if name != GROUND and height(name) > height(module)}
    assert above == set()


def test_what_all_may_import_imports_nothing_of_ours() -> None:
    assert IMPORTS[GROUND] == set()


def test_files_are_short() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES.values()}
    long = {path for path, count in lines.items() if count > MOST_LINES}
    assert not long, f"more than {MOST_LINES} lines: give each idea in them a file of its own"


def test_the_map_names_every_file() -> None:
    """The table of rooms; folders of commands and of methods are one entry each."""
    rows = [line for line in (ROOT / "docs" / "architecture.md").read_text().splitlines() if line.startswith("| `")]
    named = {PACKAGE, *(part for name in re.findall(r"`([\w/]+)`", "\n".join(rows)) for part in name.split("/"))}
    assert {*ROOMS, *ABOVE, *METHODS} <= named
    unnamed = [name for name in FILES if name.startswith(PACKAGE) and name.split(".")[-1] not in named]
    assert not [name for name in unnamed if name.split(".")[-2] not in {*ABOVE, *METHODS}]
