"""All that is read from a cache folder, with facts that are not ours under checksums that are right.

Nothing is raised but what the API documents, nothing hangs or takes much memory, no other context is served, and the folder can be used
afterwards.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz
from conftest import STRESS, say
from fuzz_targets import TARGETS, a_context_file, a_file_of_codes, a_joins_file, names, progress, turns

INPUTS = 100_000 if STRESS else 300


@pytest.mark.parametrize("make", TARGETS, ids=lambda make: make.__name__)
def test_whatever_stands_in_a_file_is_used_or_refused_with_a_reason(tmp_path: Path, make: Callable[[Path], fuzz.Target]) -> None:
    target = make(tmp_path / "target")
    count = int(INPUTS * TARGETS[make])
    found = fuzz.explore(target, count)
    say(
        target=target.name.replace(" ", "_"),
        inputs=found.ends.total(),
        lines=len(found.lines),
        kept=len(found.corpus),
        **{k.replace(" ", "_"): n for k, n in found.ends.items()},
    )
    faults = "\n".join(f"{place}: {what}" for place, what in found.faults.items())
    assert not faults


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=9), inside, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("make", [a_context_file, a_joins_file, a_file_of_codes, names, progress, turns], ids=lambda make: make.__name__)
def test_anything_in_the_place_of_any_fact(tmp_path_factory: pytest.TempPathFactory, make: Callable[[Path], fuzz.Target]) -> None:
    target = make(tmp_path_factory.mktemp("any") / "target")
    lines = target.seeds[0].split(b"\n")

    @settings(max_examples=2000 if STRESS else 25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len([line for line in lines if line]) - 1))
        value = inside = json.loads(lines[at])
        while data.draw(st.booleans()) and isinstance(inside, dict | list) and inside:
            place = data.draw(st.sampled_from([*inside] if isinstance(inside, dict) else range(len(inside))))
            if data.draw(st.booleans()) or not isinstance(inside[place], dict | list):
                inside[place] = data.draw(ANYTHING)
                break
            inside = inside[place]
        text = b"\n".join([*lines[:at], json.dumps(value).encode(), *lines[at + 1 :]])
        with fuzz.bounded():
            target.read(target.signed(text))

    check()
