"""Which model it is: the fields of a key that it decides. Told from a stamp where that is enough, proven by reading all weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from kvzip_memory.errors import IdentityMismatchError
from kvzip_memory.inference.modeling import LanguageModel
from kvzip_memory.inference.weights import Fingerprint, Stamp, weights_identity
from kvzip_memory.prompting.language import Language
from kvzip_memory.registry import identity
from kvzip_memory.registry.identity import check_same_model


def model_identity(model: PreTrainedModel, weights: str | None = None, written: int = identity.FORMAT) -> dict[str, Any]:
    """Those of :data:`~kvzip_memory.registry.identity.MODEL_FIELDS` that a model in memory decides.

    Args:
        weights: their fingerprint; None has them read (measured: about 0.6 s a GB on one CPU core).
        written: the format of its contexts.
    """
    return {"format": written, **weights_identity(model, weights)}


class ModelIdentity:
    """The model's fields of a key, as they are now. Those of its weights are computed again when one, or an adapter, has changed."""

    def __init__(self, model: LanguageModel) -> None:
        self._model, self._weights = model, Fingerprint(model.model)
        self._known: tuple[Stamp | None, dict[str, Any]] = (None, {})
        self._format = identity.FORMAT if model.layout.plain else identity.FORMAT_OF_STATES

    def of(self, language: Language) -> dict[str, Any]:
        """All of :data:`~kvzip_memory.registry.identity.MODEL_FIELDS`, with those that a language decides.

        Raises:
            IdentityMismatchError: the model was moved to another device.
            InputError: it has a dtype now that the engine's attention cannot compute with.
        """
        now = self.stamp()
        known, fields = self._known
        if now != known:
            self._model.changed(moved=known is not None and now.places != known.places)
            others = known is None or -1 in now.written(known)  # not only buffers, which the model's own forward may write to
            fields = model_identity(self._model.model, self._weights.get(anew=others), self._format)
            self._known = (now, fields)
        return {**fields, **language.identity}

    def proven(self, language: Language) -> dict[str, Any]:
        """:meth:`of` with all weights read, also if none seems to have changed."""
        self.of(language)
        known, _ = self._known
        fields = model_identity(self._model.model, self._weights.get(), self._format)
        self._known = (known, fields)
        return {**fields, **language.identity}

    def stamp(self) -> Stamp:
        """What :meth:`prove` is given to tell what has happened since."""
        return self._model.watch.stamp()

    def check(self, made_with: Mapping[str, Any], language: Language, where: str) -> None:
        """Raises:
        IdentityMismatchError: what has this identity was made with another model.
        """
        check_same_model(made_with, self.of(language), where)

    def prove(self, made_with: Mapping[str, Any], language: Language, where: str, since: Stamp) -> None:
        """All weights are read: they are those of an identity, and were all the time since a stamp, while something was built of them.

        Raises:
            IdentityMismatchError: they are others, or were for a while.
        """
        until = self.stamp()
        way_out = "nothing is stored. Load it again, and change no weights meanwhile"
        changed = f"the model was changed, perhaps while it was built, and {way_out}"
        check_same_model(made_with, self.proven(language), where, changed)
        if not self._model.untouched(since, until):
            raise IdentityMismatchError(
                f"the model was changed and changed back while {where} was built from it, and {way_out}", fields=("weights",)
            )
