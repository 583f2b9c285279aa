"""What a database may hold before anything in it is used: the tables, indexes and triggers that diskcache makes, and its settings.

A view in a table's place, a trigger, or a setting of somebody else's would be computed, run or set as soon as an index is opened.
"""

from __future__ import annotations

import sqlite3

import xxhash
from diskcache.core import DEFAULT_SETTINGS, METADATA

#: Digest of the statement that makes each thing; tests compare them with those of the installed diskcache.
KNOWN: dict[str, str] = {
    "Settings_count_delete": "7be4a42d382681ca",
    "Settings_count_insert": "7d42c5f466e61747",
    "Settings_size_delete": "79504dfc1dc12847",
    "Settings_size_insert": "d7cf485172270be4",
    "Settings_size_update": "2b3ff4ef8a23df2d",
    "Cache": "8cc520698d6120e3",
    "Settings": "bfbf5cf850b823c1",
    "Cache_expire_time": "ff4582399021d9c4",
    "Cache_key_raw": "87d192240c746af5",
}

#: Names of settings.
SETTINGS = frozenset({*DEFAULT_SETTINGS, *METADATA, "sqlite_secure_delete"})


def digest_of(statement: str) -> str:
    return xxhash.xxh3_64_hexdigest(statement.encode())


def oddity(database: sqlite3.Connection) -> str | None:
    """What in a database is none of ours, None if there is nothing. One that is just being made holds less."""
    for name, statement in database.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"):
        if type(statement) is not str or KNOWN.get(name) != digest_of(statement):
            return f"{name!r} in the database is none of ours"
    if database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'Settings'").fetchone() == (1,):
        for (key,) in database.execute("SELECT key FROM Settings"):
            if key not in SETTINGS:
                return f"{key!r} is no setting of ours"
    return None
