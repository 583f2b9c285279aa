"""Building a context: prefill -> score -> allocate -> refit -> encode -> evict."""

from kvzip_memory.compression.pipeline import Compressed, Stages, compress
from kvzip_memory.compression.prefill import DensePairs, Prefilled, Progress, prefill, read_behind

__all__ = ["Compressed", "DensePairs", "Prefilled", "Progress", "Stages", "compress", "prefill", "read_behind"]
