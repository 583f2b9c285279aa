"""Contexts by key: built once, placed in tiers, found again."""

from kvzip_memory.registry.disk.entry import Entry
from kvzip_memory.registry.disk.names import Label
from kvzip_memory.registry.forgetting import Forgotten
from kvzip_memory.registry.identity import EVERYONE
from kvzip_memory.registry.registry import ContextRegistry
from kvzip_memory.registry.room import BusyError
from kvzip_memory.registry.wanted import Build, Report, Wanted, check_name, check_tag, check_text, check_ttl, parse_bytes

__all__ = [
    "EVERYONE",
    "Build",
    "BusyError",
    "ContextRegistry",
    "Entry",
    "Forgotten",
    "Label",
    "Report",
    "Wanted",
    "check_name",
    "check_tag",
    "check_text",
    "check_ttl",
    "parse_bytes",
]
