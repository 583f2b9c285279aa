"""Options of a call as frameworks give them, and under the names that other makers have for them.

A value comes from the call, or else from the object that is called, or else from our default; None stands for the next of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvzip_memory.compression.ratios import checked_ratio
from kvzip_memory.errors import InputError
from kvzip_memory.inference.generation import GenerationParams
from kvzip_memory.system.flags import checked_flag
from kvzip_memory.system.printable import brief

#: How an answer is generated; ``max_tokens`` is ``max_new_tokens`` of :class:`~kvzip_memory.inference.generation.GenerationParams`.
CALL_OPTIONS = ("temperature", "max_tokens", "top_p", "top_k", "seed", "stop", "repetition_penalty", "no_repeat_ngram_size")

_ALIASES = {
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "stop_sequences": "stop",
}

# Options of others that we have not: the value that says nothing, and the way out.
_FOREIGN: dict[str, tuple[Any, str]] = {
    "n": (1, "a call gives one answer; make several calls, which are decoded together"),
    "best_of": (1, "a call gives one answer; make several calls, which are decoded together"),
    "logprobs": (False, "probabilities are not given; KVzipEngine.logits computes them"),
    "top_logprobs": (0, "probabilities are not given; KVzipEngine.logits computes them"),
    "logit_bias": ({}, "tokens cannot be weighed one by one; repetition_penalty and no_repeat_ngram_size are there"),
    "presence_penalty": (0, "use repetition_penalty or no_repeat_ngram_size"),
    "frequency_penalty": (0, "use repetition_penalty or no_repeat_ngram_size"),
}

# Fields of models that are True or False, and what else there is to say of them.
_FLAGS = {"reuse": "; how much of its pairs a context that is reused keeps at least is said by ratio", "streaming": "", "behind": ""}


def renamed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options under our names, without those that say nothing.

    Raises:
        InputError: one that we have not, or two names of one option with different values.
    """
    options = dict(given)
    for alias, name in _ALIASES.items():
        value = options.pop(alias, None)
        if value is None:
            continue
        if options.get(name) not in (None, value):
            raise InputError(f"{alias} is {brief(value)} and {name} is {brief(options[name])}; they are one option, give it once")
        options[name] = value
    for name, (nothing, way_out) in _FOREIGN.items():
        value = options.pop(name, None)
        if value is not None and value != nothing:
            raise InputError(f"{name} is {brief(value)}; {way_out}")
    return options


def for_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an object with these options as fields: None is the field's default, a single ``stop`` a list of one.

    Raises:
        InputError: a value that Pydantic would take for another one, as it takes True for 1 and "no" for False, or outside its range.
    """
    options = {name: value for name, value in renamed(values).items() if value is not None or name not in (*CALL_OPTIONS, *_FLAGS)}
    sampling(options, {}, {})
    if options.get("ratio") is not None:
        options["ratio"] = checked_ratio(options["ratio"])
    for name in options.keys() & _FLAGS.keys():
        checked_flag(name, options[name], _FLAGS[name])
    return {**options, "stop": [options["stop"]]} if isinstance(options.get("stop"), str) else options


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, which True and 1.0 are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def sampling(call: Mapping[str, Any], of_object: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :class:`~kvzip_memory.inference.generation.GenerationParams`: of each option what is given first.

    Raises:
        InputError: a value outside its range.
    """
    options: dict[str, Any] = {}
    for name in CALL_OPTIONS:
        values = [value for source in (call, of_object, defaults) if (value := source.get(name)) is not None]
        if values:
            options["max_new_tokens" if name == "max_tokens" else name] = values[0]
    try:
        checked = GenerationParams(**options)
    except InputError as error:  # under the name it was given by
        raise InputError(str(error).replace("max_new_tokens", "max_tokens")) from error
    return {name: getattr(checked, name) for name in options}


def reused(call: bool | None, of_object: bool, ratio: float | None) -> bool | float:
    """``reuse`` of :meth:`~kvzip_memory.engine.KVzipEngine.stream`: what the call says, or else the object, which says the ``ratio``.

    Raises:
        InputError: the call says neither True nor False.
    """
    reuse = of_object if call is None else checked_flag("reuse", call, _FLAGS["reuse"])
    return reuse if ratio is None else reuse and ratio
