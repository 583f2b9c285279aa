"""What others may have switched: the modes of a model's modules, and torch's in the calling thread.

:func:`evaluation_copy` is a model as it was written and in evaluation mode, however its modules were compiled and whatever mode they are
in. They are other threads', too, and are never switched. What is compiled would be so again and again for our calls, each of which has
other contexts and lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from kvzip_memory.errors import ModelError

M = TypeVar("M", bound=nn.Module)

# Where torch.compile keeps the function it was given.
_WRITTEN = "_torchdynamo_orig_callable"


def as_written(model: M) -> M:
    """What ``torch.compile(model)`` was given; any other model is given back."""
    return model._modules.get("_orig_mod", model)  # type: ignore[return-value]


def in_evaluation(model: nn.Module) -> bool:
    """Whether all modules of a model are in evaluation mode, and none was compiled."""
    modules: list[Any] = [model]
    for module in modules:
        if module is None:
            continue
        own = module.__dict__
        if own["training"] or own.get("_compiled_call_impl") or ("forward" in own and hasattr(own["forward"], _WRITTEN)):
            return False
        if inner := own["_modules"]:
            if "_orig_mod" in inner:
                return False
            modules += inner.values()
    return True


def evaluation_copy(model: M) -> M:
    """The same model in evaluation mode: other modules over the same parameters, buffers, hooks and settings. Costs a millisecond.

    So it has no dropout, noise, checkpointing or running statistics, and nobody else's module is touched. What is set on the model's
    modules later it does not see, so it is made anew for every forward. Compiled modules are run as they were written.

    Raises:
        ModelError: somebody has put another forward onto a module, which may not be bound to the copy.
    """
    copied: M = _copied(model, {})
    return copied


def _copied(module: Any, copies: dict[int, Any]) -> Any:
    module = as_written(module)
    if id(module) in copies:
        return copies[id(module)]
    own = {name: getattr(value, _WRITTEN, value) if name == "forward" else value for name, value in vars(module).items()}
    if "rope_type" in own:  # keeps in itself what it has computed last, and is the same in both modes
        return module
    copy = copies[id(module)] = object.__new__(type(module))
    state = {name: _bound(value, module, copy) if type(value) in _METHODS else value for name, value in own.items()}
    if "forward" in own and state["forward"] is own["forward"]:
        raise ModelError(
            f"the model is in training mode, and another forward was put onto its {type(module).__name__}, of which there is none for "
            "evaluation; call model.eval()"
        )
    inner = {name: child if child is None else _copied(child, copies) for name, child in own["_modules"].items()}
    vars(copy).update(state, _modules=inner, training=False, _compiled_call_impl=None)
    return copy


_METHODS = (MethodType, partial)


def _bound(method: Any, module: nn.Module, copy: nn.Module) -> Any:
    """A method of a module, or a function with the module as an argument (as accelerate sets it), of its copy."""
    if isinstance(method, MethodType):
        return MethodType(method.__func__, copy) if method.__self__ is module else method
    if all(argument is not module for argument in method.args):
        return method
    return partial(method.func, *(copy if argument is module else argument for argument in method.args), **method.keywords)


@contextmanager
def no_autocast() -> Iterator[None]:
    """Tensors are computed in the dtypes they have, whatever autocast the caller is in. Within, calls of torch cost what they cost, where
    under :func:`plain` each takes some microseconds more.
    """
    with ExitStack() as left:
        for device in _devices():
            left.enter_context(torch.autocast(device, enabled=False))
        yield


@cache
def _devices() -> tuple[str, ...]:
    """On which something may be cast by itself."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@contextmanager
def plain() -> Iterator[None]:
    """torch as it is by itself, whatever autocast or default device the caller is in: we say where and in what we compute.

    The model's own thread has no modes; this is for what is computed in the threads of callers.
    """
    with torch.device("cpu"), no_autocast():
        yield
