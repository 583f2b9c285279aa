"""Contexts by key: built once, placed in tiers, found again."""

from kvzip_memory.registry.disk import Entry
from kvzip_memory.registry.names import Label
from kvzip_memory.registry.registry import EVERYONE, Build, ContextRegistry, Forgotten, Report, Wanted, check_text, parse_bytes

__all__ = ["EVERYONE", "Build", "ContextRegistry", "Entry", "Forgotten", "Label", "Report", "Wanted", "check_text", "parse_bytes"]
