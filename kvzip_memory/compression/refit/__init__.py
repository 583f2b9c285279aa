"""What do the kept pairs say? One method a file."""

from kvzip_memory.compression.methods import Methods
from kvzip_memory.compression.refit.base import LayerPairs, Refit
from kvzip_memory.compression.refit.none import NoRefit
from kvzip_memory.compression.refit.ridge import RidgeRefit

#: Refits by name.
REFITS: Methods[Refit] = Methods("refit", ("every", "fit"), (dict, type(None)), {"none": NoRefit, "ridge": RidgeRefit})

__all__ = ["REFITS", "LayerPairs", "NoRefit", "Refit", "RidgeRefit"]
