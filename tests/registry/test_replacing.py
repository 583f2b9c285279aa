"""A file that is stored in the place of an older one, or beside another writer of the same key: nothing that is sound is lost for it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvzip_memory.errors import StorageError
from kvzip_memory.registry.disk import putting, store
from kvzip_memory.registry.disk.store import DiskTier, NotStoredError
from synthetic import CPU, context, same, wanted


def put(tier: DiskTier, number: int, locked: bool = True, **changes: Any) -> None:
    tier.put(replace(context(number), **changes), wanted(number).group, locked=locked)


def key(number: int) -> str:
    return wanted(number).key


def sound(tier: DiskTier, *numbers: int) -> bool:
    return tier.usage() == tier.measured() and all(same(tier.get(key(number), CPU), context(number)) for number in numbers)


@pytest.mark.parametrize("room", [2.0, 2.5, 3.0, None])
def test_others_stay_where_one_is_stored_again(tmp_path: Path, room: float | None) -> None:
    before = DiskTier(tmp_path)
    for number in (0, 1):
        put(before, number)
    size = before.usage() // 2
    before.close()
    tier = DiskTier(tmp_path, None if room is None else round(room * size))
    for number in (1, 0, 1):
        put(tier, number)
        assert sound(tier, 0, 1)


def test_what_is_stored_anew_while_an_expired_file_is_read_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, looked = DiskTier(tmp_path), DiskTier(tmp_path), list[bool]()
    put(one, 1, created=time.time() - 100, expires=time.time() - 1)
    is_past = store.is_past

    def then_stored(*given: Any) -> bool:
        past = is_past(*given)
        if past and not looked:
            looked.append(past)
            put(one, 1, created=time.time(), expires=time.time() + 1000)
        return past

    monkeypatch.setattr(store, "is_past", then_stored)
    with pytest.raises(NotStoredError, match="expired"):
        other.get(key(1), CPU)
    assert looked
    assert sound(DiskTier(tmp_path), 1)


def test_an_expired_file_goes_when_it_is_read(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    put(tier, 1, created=time.time() - 100, expires=time.time() - 1)
    with pytest.raises(NotStoredError, match="expired"):
        tier.get(key(1), CPU)
    assert not tier.has(key(1))
    assert tier.usage() == tier.measured() == 0


@pytest.mark.parametrize("older", [True, False])
def test_two_writers_of_one_key_do_not_take_each_others_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool) -> None:
    """One of them without the lock, for which it would have had to wait."""
    one, other = DiskTier(tmp_path), DiskTier(tmp_path)
    if older:
        put(one, 1)
    whole, go_on, moved = threading.Event(), threading.Event(), putting.replace_with

    def slowly(path: Path, temporary: Path) -> None:
        whole.set()
        assert go_on.wait(30)
        moved(path, temporary)

    monkeypatch.setattr(putting, "replace_with", slowly)
    hold = one.builders.hold(key(1))
    assert hold.acquire()
    writer = threading.Thread(target=put, args=(one, 1))
    writer.start()
    assert whole.wait(30)
    with pytest.raises(StorageError, match="another process is writing it"):
        put(other, 1, locked=False)
    go_on.set()
    writer.join(30)
    hold.release()
    assert sound(one, 1)
    assert sound(other, 1)


def test_who_has_no_lock_stores_what_nobody_else_writes(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    put(tier, 1, locked=False)
    assert sound(tier, 1)
