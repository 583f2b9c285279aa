"""The values that flow through everything: a compressed context, its layers and facts. No behaviour beyond reading them."""

from kvzip_memory.context.context import CompressedContext, Layers, Lease, Resident, Storage, Writer, checked_context, seen_from
from kvzip_memory.context.facts import LONGEST_NAME, Part, Receipt, Recipe, Source, as_told, parts_of
from kvzip_memory.context.layers import NO_STATES, RaggedLayer, States, Window, storage_nbytes

__all__ = [
    "LONGEST_NAME",
    "NO_STATES",
    "CompressedContext",
    "Layers",
    "Lease",
    "Part",
    "RaggedLayer",
    "Receipt",
    "Recipe",
    "Resident",
    "Source",
    "States",
    "Storage",
    "Window",
    "Writer",
    "as_told",
    "checked_context",
    "parts_of",
    "seen_from",
    "storage_nbytes",
]
