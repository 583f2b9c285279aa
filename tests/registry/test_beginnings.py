"""The longest stored beginning of a prompt, however many contexts there are."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

import synthetic
from kvzip_memory import CompressedContext
from kvzip_memory.registry import ContextRegistry, Wanted
from kvzip_memory.registry.beginnings import beginning, beginnings
from kvzip_memory.registry.identity import MODEL_FIELDS, group_of, key_of, tokens_digest
from kvzip_memory.system.digests import digest
from synthetic import CPU

MODEL = {**dict.fromkeys(MODEL_FIELDS, "x"), "format": 1}


def context(ids: Sequence[int]) -> tuple[Wanted, CompressedContext]:
    identity = {**synthetic.IDENTITY, **MODEL, "text": digest(ids), "tokens": tokens_digest(ids)}
    wanted = Wanted(key_of(identity), identity, group_of(identity))
    made = synthetic.context(0, pairs=4)
    return wanted, replace(made, key=wanted.key, identity=identity, token_ids=torch.tensor(ids, dtype=torch.int32))


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_the_longest_is_found_as_by_looking_at_all(tier: str, tmp_path: Path) -> None:
    """Prompts and contexts that share beginnings of every length, also around powers of two."""
    rng = Random(tier)
    stem = [rng.randrange(3) for _ in range(140)]
    stored = {tuple(stem[: rng.randrange(1, 140)]) + tuple(rng.randrange(3) for _ in range(rng.choice((0, 0, 1, 5)))) for _ in range(40)}
    stored |= {tuple(stem[:n]) for n in (1, 2, 3, 63, 64, 65, 127, 128)}
    size = max(context(ids)[1].nbytes for ids in stored)
    registry = ContextRegistry(CPU, tmp_path if tier == "disk" else None, device_bytes=size if tier == "host" else None, host_bytes=None)
    for ids in stored:
        wanted, made = context(ids)
        with registry.lease(wanted, lambda report, made=made: made):  # type: ignore[misc]
            pass
    if tier == "disk":
        registry.close()
        registry = ContextRegistry(CPU, tmp_path)
    for _ in range(60):
        prompt = stem[: rng.randrange(141)] + [rng.randrange(3) for _ in range(rng.randrange(4))]
        expected = max((len(ids) for ids in stored if len(ids) < len(prompt) and list(ids) == prompt[: len(ids)]), default=None)
        found = registry.longest_prefix(MODEL, prompt)
        assert (None if found is None else found.n_tokens) == expected
    for entry in registry.contexts():
        registry.remove(entry.key)
    assert registry.longest_prefix(MODEL, [*stem, 1]) is None
    assert not registry._memory.device.filing._files
    assert not registry._memory.host.filing._files
    registry.close()


def test_places_to_look_at_grow_with_the_logarithm_of_a_prompt() -> None:
    assert beginnings([]) == []
    for n in (1, 2, 3, 4, 7, 8, 9, 1000):
        ids = list(range(n))
        assert len(beginnings(ids)) == n.bit_length()
        assert beginning(ids) == beginnings([*ids, 5, 6])[n.bit_length() - 1]


def test_a_row_of_an_earlier_version_is_found_after_its_next_use(tmp_path: Path) -> None:
    registry, ids = ContextRegistry(CPU, tmp_path), list(range(50))
    wanted, made = context(ids)
    with registry.lease(wanted, lambda report: made):
        pass
    registry.close()
    registry = ContextRegistry(CPU, tmp_path)
    disk = registry._backing.tier
    assert disk is not None
    index = disk._keeper.opened().index
    row = index.get(f"context:{wanted.key}")
    assert row is not None
    for key in list(index.keys("beginning:")):
        index.delete(f"beginning:{key}")
    del row["beginning"]
    index.set(f"context:{wanted.key}", row)
    assert registry.longest_prefix(MODEL, [*ids, 1]) is None
    disk.touch(wanted.key)
    found = registry.longest_prefix(MODEL, [*ids, 1])
    assert found is not None
    assert found.key == wanted.key
    registry.close()
