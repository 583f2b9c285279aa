"""Which contexts an engine may use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvzip_memory.building import Builder
from kvzip_memory.context import CompressedContext, checked_context, parts_of
from kvzip_memory.errors import InputError
from kvzip_memory.model_identity import ModelIdentity
from kvzip_memory.prompting.language import Language
from kvzip_memory.registry import Entry
from kvzip_memory.system.digests import same


class Access:
    """Says which contexts an engine may use: its tenant's and nobody's, of its model as it is now; and of those, which it may go on from.

    Args:
        identity: tells which model it is.
        builder: builds what goes on from them.
        tenant: digest of the engine's tenant, None without one.
    """

    def __init__(self, identity: ModelIdentity, builder: Builder, tenant: str | None) -> None:
        self._identity, self._builder, self._tenant = identity, builder, tenant

    def is_mine(self, identity: Mapping[str, Any]) -> bool:
        """Whether a context of this identity is the tenant's, or nobody's."""
        return identity.get("tenant") in (None, self._tenant)

    def mine(self, context: CompressedContext) -> CompressedContext:
        """The context, if it is the tenant's, or nobody's.

        Raises:
            InputError: it is another tenant's: as of a key that is not stored; or no context.
        """
        if not self.is_mine(checked_context(context).identity):
            raise not_stored(context.key)
        return context

    def is_own(self, context: CompressedContext) -> bool:
        """Whether a context is the tenant's, and not nobody's unless the engine has none."""
        return context.identity.get("tenant") == self._tenant

    def check(self, language: Language, context: CompressedContext | None) -> None:
        """Raises:
        InputError: as of :meth:`mine`.
        IdentityMismatchError: the context is another model's.
        """
        if context is not None:
            self._identity.check(self.mine(context).identity, language, repr(context))

    def check_parent(self, language: Language, context: CompressedContext, share: bool = False) -> None:
        """:meth:`check` of what a context is to be grown from, or is to ``share``.

        Raises:
            InputError: another scorer has ranked its pairs, which others are to compete with; or pairs that are not the tenant's are to be
            shared.
        """
        self.check(language, checked_context(context))
        share = share or context.is_one
        if (share or context.parts) and not self.is_own(context):
            raise InputError(
                f"{context!r} is nobody's and would be deleted without asking this tenant, whose context would share its pairs; load its "
                "text with this engine"
            )
        scorer = context.identity.get("scorer")
        if not share and scorer is not None and not same(scorer, self._builder.scorer):
            raise InputError(
                f"the pairs of {context!r} were ranked by {scorer}, with which this engine's {self._builder.scorer} cannot be "
                "compared; extend it with an engine of that scorer, or with share=True, or load the text again"
            )

    def is_as_fine(self, entry: Entry, ratio: float) -> bool:
        """Whether a stored context keeps as much, chosen as the engine chooses, unless nothing was evicted; and was read where it stands,
        behind all that is before it."""
        moved = entry.identity.get("shift") or any(part.joined for part in parts_of(entry.identity))
        return not moved and entry.fineness >= ratio and self.is_way_of(entry)

    def is_way_of(self, entry: Entry) -> bool:
        """Whether its pairs were chosen as the engine chooses, unless nothing was evicted."""
        return self._builder.is_way_of(entry.identity)


def not_stored(reference: str, but: str = "") -> InputError:
    """The error for what is not there, or as if it were not."""
    return InputError(f"no context {reference!r} of this model is stored{but}: load the text")
