"""All that is read from a cache folder, with facts that are not ours under checksums that are right.

Nothing is raised but what the API documents, nothing hangs or takes much memory, no other context is served, and the folder can be used
afterwards.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

import fuzz
from fuzz_targets import TARGETS
from test_registry_stress import FULL, say

INPUTS = 100_000 if FULL else 1000


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
    assert not found.faults, "\n".join(f"{place}: {what}" for place, what in found.faults.items())
