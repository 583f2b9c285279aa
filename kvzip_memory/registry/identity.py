"""What a context is the context *of*. Two contexts have one key exactly if every field below is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from kvzip_memory.compression.scorers import VERSIONS
from kvzip_memory.context import Part, Recipe
from kvzip_memory.errors import IdentityMismatchError, InputError
from kvzip_memory.system.digests import digest, same
from kvzip_memory.system.printable import brief

#: Version of everything that is not a field of its own: file layout, build steps, prompt cutting.
FORMAT = 4
#: That of contexts with states, latents or chunks, which readers of the one before do not know. Whoever changes either makes both new.
FORMAT_OF_STATES = 5
#: There are as many kinds of contexts of each, which readers of those before do not know: without parts of others, with such, and with such
#: that share positions; then the same whose pairs are codes.
_KINDS = 3
NEWEST_FORMAT = FORMAT + 2 * 2 * _KINDS - 1

#: Fields that belong to the model; a stored context can be used only where all of them are the same.
MODEL_FIELDS = ("format", "architecture", "config", "weights", "adapter", "dtype", "quantization", "tokenizer", "template")

#: The tenant of operators, whose contexts are those of all.
EVERYONE = "*"

#: What the command calls contexts that are no tenant's; no tenant is called so.
NOBODY = "-"

#: What to call the fields whose names do not say it.
_LABELS = {
    "format": "version of files and keys",
    "weights": "weights fingerprint",
    "config": "model configuration",
    "template": "chat template",
    "keep": "the list of pinned spans",
    "system": "system prompt",
    "recipe": "what follows the context (template variables)",
    "parent": "the context it was grown from",
    "parts": "what it shares with others, and where that stands",
}
_DERIVED = ("tokens", "protected", "recipe")


def recipe_digest(recipe: Recipe) -> str:
    """What a recipe adds to a key. The system prompt is in it already, and recipes without a tail are as they always were."""
    return digest({field: value for field, value in vars(recipe).items() if field != "system" and (field != "tail" or value)})


def tenant_digest(tenant: str | None) -> str | None:
    """The salt a tenant's keys are made with; None without a tenant.

    Raises:
        InputError: the tenant is no text, as a ``SecretStr``, of which all would have one digest; or it is empty or ``-``.
    """
    if not isinstance(tenant, str | None):
        raise InputError(f"tenant is of type {type(tenant).__name__}; give a text, of a SecretStr what get_secret_value() returns")
    if tenant in ("", NOBODY):
        raise InputError(f"tenant is {tenant!r}, by which nobody can be told from no tenant; give None for none, or another text")
    return None if tenant is None else digest(["tenant", tenant])


def is_whose(identity: Mapping[str, Any], tenant: str | None) -> bool:
    """Whether a context is a tenant's, whose digest is given."""
    return tenant in (EVERYONE, identity.get("tenant"))


def group_of(identity: Mapping[str, Any]) -> str:
    """What the contexts of one text and tenant have in common, whatever model and ratio they were made with."""
    return digest([identity["tenant"], identity["text"]])


def model_fields(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The :data:`MODEL_FIELDS` of an identity, whatever it shares and however it is written; None for those that older versions lack."""
    fields = {field: identity.get(field) for field in MODEL_FIELDS}
    return {**fields, "format": _of_the_model(fields["format"])}


def with_parts(written: int, parts: Sequence[Part], in_codes: bool) -> dict[str, Any]:
    """What a key says of the parts that a context shares: with a format of its own, by that of the context's others; so has one that is, or
    shares what is, in codes."""
    kind = 1 + any(part.nearer for part in parts) if parts else 0
    codes = 2 * _KINDS if in_codes and not are_codes(written) else 0
    return {"format": written + 2 * kind + codes, **({"parts": [part.told for part in parts]} if parts else {})}


def are_codes(written: Any) -> bool:
    """Whether a format is one of contexts with pairs that are codes."""
    return type(written) is int and FORMAT + 2 * _KINDS <= written <= NEWEST_FORMAT


def _of_the_model(written: Any) -> Any:
    """What a format says of the model, whatever its contexts share, and whether their pairs are codes."""
    return FORMAT + (written - FORMAT) % 2 if type(written) is int and FORMAT <= written <= NEWEST_FORMAT else written


def family_of(identity: Mapping[str, Any]) -> str:
    """What the contexts that one model and tenant can use have in common."""
    return digest([identity.get("tenant"), *model_fields(identity).values()])


def tokens_digest(ids: Sequence[int] | np.ndarray) -> str:
    """Hash of a context's ids: the field ``tokens``."""
    return hashlib.sha256(np.asarray(ids, dtype=np.int32).tobytes()).hexdigest()


def differing_fields(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields that are not the same; those that follow from others only if nothing else differs."""
    stored, wanted = ({**identity, "format": _of_the_model(identity.get("format"))} for identity in (stored, wanted))
    fields = [field for field in {**wanted, **stored} if not same(stored.get(field), wanted.get(field))]
    return tuple(field for field in fields if field not in _DERIVED) or tuple(fields)


def only_ratio_differs(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return same({**stored, "ratio": None}, {**wanted, "ratio": None})


def other_version(identity: Mapping[str, Any]) -> Literal["older", "newer"] | None:
    """Whether an older or a newer version of this package made a context, which this one finds by no text; None: this one.

    That is told by the version of files and keys, and by that of the scorer. Of a scorer that is not ours nothing is known.
    """
    name, version = _scorer(identity)
    written = _of_the_model(identity.get("format"))
    for stored, here in ((FORMAT if written == FORMAT_OF_STATES else written, FORMAT), (version, VERSIONS.get(name, version))):
        if (other := _compared(stored, here)) is not None:
            return other
    return None


def _compared(stored: Any, here: Any) -> Literal["older", "newer"] | None:
    if type(stored) is not int or type(here) is not int or stored == here:
        return None
    return "older" if stored < here else "newer"


def _scorer(identity: Mapping[str, Any]) -> tuple[str, Any]:
    """Name and version of the scorer."""
    scorer = identity.get("scorer")
    return (str(scorer.get("name")), scorer.get("version")) if isinstance(scorer, Mapping) else ("", None)


def explain(
    wanted: Mapping[str, Any], near: Sequence[Mapping[str, Any]], named: Sequence[Mapping[str, Any]]
) -> tuple[tuple[str, ...], str]:
    """Why a context is not there.

    Args:
        wanted: the identity that was asked for.
        near: identities of stored contexts of the same text and tenant.
        named: identities of stored contexts of the same name and tenant.

    Returns:
        The fields in which the nearest one differs, and a sentence that names them.
    """
    if near:
        stored = min(near, key=lambda identity: len(differing_fields(identity, wanted)))
        differs = differing_fields(stored, wanted)
        if (version := _of_versions(stored, wanted)) is not None:
            return version
        if differs == ("ratio",):
            return differs, f"ratio: stored with {stored['ratio']}, from which {wanted['ratio']} cannot be had"
        shown = "; ".join(_told(field, stored.get(field), wanted.get(field)) for field in differs)
        return differs, f"the same text is stored, but {shown}"
    if named:
        return ("text",), "text differs from what is stored under this name"
    if wanted["tenant"] is not None:
        return (), "not stored for this tenant (contexts of other tenants are never looked at)"
    return (), "not stored"


def _told(field: str, stored: Any, wanted: Any) -> str:
    """How a field differs; of two mappings what of them does."""
    then, now = _short(stored), _short(wanted)
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        names = [name for name in {**stored, **wanted} if not same(stored.get(name), wanted.get(name))]
        then, now = (brief({name: value.get(name) for name in names}) for value in (stored, wanted))
    return f"{label(field)} differs (field {field}: stored {then}, wanted {now})"


def _of_versions(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[tuple[str, ...], str] | None:
    """The same of one that another version has made: all else that differs may come of that."""
    if (other := _compared(*(_of_the_model(identity.get("format")) for identity in (stored, wanted)))) is not None:
        return ("format",), _by(other, f"field format: stored {stored['format']}, wanted {wanted['format']}")
    (name, version), (wanted_name, wanted_version) = _scorer(stored), _scorer(wanted)
    if name == wanted_name and (other := _compared(version, wanted_version)) is not None:
        return ("scorer",), _by(other, f"field scorer: stored {name} of version {version}, wanted {wanted_version}")
    return None


def _by(other: str, what: str) -> str:
    way_out = "; kvzip-memory gc --old deletes what older ones have stored" if other == "older" else ""
    return f"the same text is stored, but by {_name_of(other)} ({what}){way_out}"


def _name_of(other: str) -> str:
    """What to call another version."""
    return f"an {other} version of kvzip-memory" if other == "older" else f"a {other} version of kvzip-memory"


def label(field: str) -> str:
    """What to call a field."""
    return _LABELS.get(field, field)


def key_of(identity: Mapping[str, Any]) -> str:
    """The key: sha256 of the canonical JSON of the identity, 64 hex digits."""
    return digest(identity)


def check_same_model(
    identity: Mapping[str, Any],
    here: Mapping[str, Any],
    where: str,
    way_out: str = "open it with the model it was built with, or load the text again",
) -> None:
    """
    Args:
        here: the model's fields.

    Raises:
        IdentityMismatchError: naming every model field that differs.
    """
    stored = model_fields(identity)
    differing = tuple(f for f in MODEL_FIELDS if stored[f] != here[f])
    if differing:
        shown = "; ".join(f"{f}: stored {_short(stored[f])}, here {_short(here[f])}" for f in differing)
        other = _compared(stored["format"], here["format"])
        if other is not None:  # from which all else may come
            raise IdentityMismatchError(
                f"{where} was built by {_name_of(other)} ({shown}); load the text again, or use that version", fields=differing
            )
        raise IdentityMismatchError(f"{where} was built with another model ({shown}); {way_out}", fields=differing)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else text[:12] + "..."
