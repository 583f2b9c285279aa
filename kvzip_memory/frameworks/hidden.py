"""Options that are secrets: tokens, passwords, a tenant's salt. A model object holds them as :class:`~pydantic.SecretStr`, and where it is
written down there is a note in their place."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, PlainSerializer, SecretStr

from kvzip_memory.errors import NotPicklableError

#: Stands for a secret where a model object is written down.
NOTE = "a secret, which is not written down"

# Whatever is text under such a name, however deep. To hide too much does no harm.
_NAMES = re.compile(r"token(?!iz)|secret|passw|credential|auth|tenant|salt|proxies|headers|cookie|(^|_)key", re.IGNORECASE)


def hidden(options: dict[str, Any]) -> dict[str, Any]:
    """Options with their secrets hidden.

    Raises:
        NotPicklableError: they were written down without them.
    """
    return _each(_arrived(options), lambda value, secret: SecretStr(value) if secret and isinstance(value, str) else value)


def revealed(options: dict[str, Any]) -> dict[str, Any]:
    """Options as they were given.

    Raises:
        NotPicklableError: they were written down without their secrets.
    """
    return _arrived(_each(options, lambda value, secret: value.get_secret_value() if _is_hidden(value) else value))


def written(options: dict[str, Any]) -> dict[str, Any]:
    """Options with notes in the place of their secrets."""
    return _each(options, lambda value, secret: NOTE if _is_hidden(value) or (secret and isinstance(value, str)) else value)


def told(options: dict[str, Any]) -> str:
    """A hash that tells options apart, secrets included, from which none can be read.

    Raises:
        NotPicklableError: see :func:`revealed`.
    """
    return hashlib.sha256(repr(sorted(revealed(options).items())).encode(errors="surrogatepass")).hexdigest()


#: The field of such options.
Options = Annotated[dict[str, Any], AfterValidator(hidden), PlainSerializer(written)]


def _is_hidden(value: Any) -> bool:
    return hasattr(value, "get_secret_value")


def _arrived(options: dict[str, Any]) -> dict[str, Any]:
    def check(value: Any, secret: bool) -> None:
        if isinstance(value, str) and value == NOTE:
            raise NotPicklableError(
                f"the model_kwargs {sorted(options)} were written down without their secrets; give them again: dict(data, model_kwargs=...)"
            )

    _each(options, check)
    return options


def _each(value: Any, change: Callable[[Any, bool], Any], secret: bool = False) -> Any:
    """A copy with each value that holds no others changed; ``change`` is told whether it is under the name of a secret."""
    if isinstance(value, dict):
        return {name: _each(inner, change, secret or bool(_NAMES.search(str(name)))) for name, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_each(inner, change, secret) for inner in value)
    return change(value, secret)
