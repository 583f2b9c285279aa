"""A model as it computes in evaluation mode, whatever mode its modules are in. They are others', too, and are never switched."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from kvzip_memory.errors import ModelError

M = TypeVar("M", bound=nn.Module)


def in_training(model: nn.Module) -> bool:
    """Whether some module of a model is in training mode."""
    modules: list[Any] = [model]
    for module in modules:
        if module.training:
            return True
        if inner := module._modules:
            modules += filter(None, inner.values())
    return False


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
    while "_orig_mod" in module._modules:
        module = module._orig_mod
    if id(module) in copies:
        return copies[id(module)]
    own = vars(module)
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
