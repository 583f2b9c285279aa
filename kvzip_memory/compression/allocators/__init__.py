"""Which pairs are kept? One method a file."""

from kvzip_memory.compression.allocators.base import Allocator
from kvzip_memory.compression.allocators.global_topk import GlobalTopK
from kvzip_memory.compression.allocators.per_layer import PerLayer
from kvzip_memory.compression.allocators.uniform import Uniform
from kvzip_memory.compression.methods import Methods

#: Allocators by name.
ALLOCATORS: Methods[Allocator] = Methods(
    "allocator", ("allocate",), (str, dict), {"global": GlobalTopK, "per_layer": PerLayer, "uniform": Uniform}
)

__all__ = ["ALLOCATORS", "Allocator", "GlobalTopK", "PerLayer", "Uniform"]
