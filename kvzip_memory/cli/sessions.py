"""Conversations whose turns lie in the folder as text."""

from typing import Any

from rich.filesize import decimal
from rich.table import Table

from kvzip_memory import turns
from kvzip_memory.cli.opening import contexts_of, sessions_of
from kvzip_memory.cli.options import DEFAULT, CacheDir, Json, Tenant
from kvzip_memory.cli.terminal import ago, as_time, shown, tell
from kvzip_memory.registry import EVERYONE


def sessions(tenant: Tenant = None, cache_dir: CacheDir = DEFAULT, as_json: Json = False) -> None:
    """Conversations whose turns lie in the folder as text, beside the contexts made of them."""
    found = sessions_of(cache_dir, EVERYONE if tenant is None else contexts_of(cache_dir, tenant).tenant)

    def render() -> Table:
        table = Table("session", "turns", "bytes", "written", "")
        for s in found:
            table.add_row(shown(s.name), f"{s.turns:,}", decimal(s.nbytes), ago(s.written), "expired" if s.expired else "")
        return table

    tell([session_facts(s) for s in found], as_json, render)


def session_facts(session: turns.Session) -> dict[str, Any]:
    times = {"written": as_time(session.written), "expires": as_time(session.expires)}
    return {"session": session.name, "turns": session.turns, "nbytes": session.nbytes, **times, "file": str(session.file.path)}
