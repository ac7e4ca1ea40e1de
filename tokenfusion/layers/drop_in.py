"""Modules in the place of others: fused while that is valid, and the original otherwise.

A fused forward reads past some of the parts of a module: it takes their parameters and does not call them. Whatever
people do to such a part (a hook, an adapter, another class, another size) has to count. So `why_not` is asked at every
call, and `fuse` asks the same function first.
"""

import logging
import sys
import types
import weakref
from typing import ClassVar

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.utils.module_tracker import ModuleTracker

from tokenfusion.kernels import dispatch
from tokenfusion.kernels.checks import symbolic
from tokenfusion.layers import settled
from tokenfusion.layers.functions import why_not_functions
from tokenfusion.layers.modes import functions_are_seen, operators_are_seen

NAME = "_fused_as"  # an attribute of the module, so that its copies and pickles have it
STATE = "_fused_state"  # another, of what it was when it was fused
PLAIN = (nn.Parameter, torch.Tensor)  # no subclass: quantized, distributed and other weights multiply in their own way

_log = logging.getLogger("tokenfusion")
_told_of: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_told_of_replicas: set[tuple[str, type[nn.Module], str]] = set()
_forwards: dict[type[nn.Module], types.FunctionType | None] = {}
_calls: dict[type[nn.Module], tuple[types.FunctionType, types.FunctionType] | None] = {}
_CALLS = ("__call__", "_call_impl")


class DropIn:
    """Base of a fused class, before the class that it stands in for: class Fused(DropIn, Original).

    Its forward asks `fuses` first. In TorchScript it calls `plain_forward`, the original's.
    """

    original: ClassVar[type[nn.Module]]
    plain_forward: ClassVar[types.FunctionType]

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if DropIn in cls.__bases__ and issubclass(cls.__bases__[-1], nn.Module):
            cls.stand_in_for(cls.__bases__[-1])

    @classmethod
    def stand_in_for(cls, original: type[nn.Module]) -> None:
        """Makes this class, and no subclass that somebody derives from it, the fused one of `original`."""
        cls.original = original
        cls.plain_forward = renamed(original.forward, "plain_forward")
        remember_forwards(cls, original)

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """What rules the fused forward out in the parts of a module, of either class; None where it is valid."""
        raise NotImplementedError

    @classmethod
    def why_not_fused(cls, module: nn.Module) -> str | None:
        """Why the fused forward is not valid for a module of either class, as things are now; None where it is."""
        if cls.original.forward is not _forwards[cls.original]:
            return f"the forward of {cls.original.__name__} was replaced"
        return why_not_surroundings() or cls.why_not(module)

    def fuses(self, *tensors: torch.Tensor | None, kept: bool = False) -> bool:
        """Whether this call may run fused. Where a change to the module is the reason that it may not, it is logged.

        tensors: all that it is given; those of a subclass may know nothing of the package's operators, or have a
            meaning of their own for the functions that the original calls.
        kept: whether the fused backward pass reads them and the original's may not, which copies or projects them
            first.
        """
        if dispatch.transform() is not None or not all(map(_is_plain, tensors)):
            return False
        if kept and any(map(_is_kept_by_no_backward_pass, tensors)):
            return False
        if not torch.compiler.is_compiling() and (functions_are_seen() or operators_are_seen()):
            return False
        reason = self.why_not_fused(self)
        if reason is not None and not torch.compiler.is_compiling():
            _report(self, reason)
        return reason is None

    def __prepare_scriptable__(self) -> nn.Module:
        """What TorchScript compiles: as the original's forward is now."""
        cls = type(self)
        if "plain_forward" in vars(cls) and cls.original is not cls:
            cls.plain_forward = renamed(cls.original.forward, "plain_forward")
        return super().__prepare_scriptable__()

    def as_leaf(self, tensors: tuple[torch.Tensor, ...], options: dict) -> torch.fx.Proxy:
        """The call of a module in a graph of torch.fx, which looks into none of torch's own."""
        tracer = next(tensor.tracer for tensor in tensors if symbolic(tensor))
        return tracer.create_proxy("call_module", tracer.path_of_module(self), tensors, options)


def _is_plain(tensor: torch.Tensor | None) -> bool:
    return tensor is None or type(tensor) in PLAIN


def _is_kept_by_no_backward_pass(tensor: torch.Tensor | None) -> bool:
    if tensor is None or torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() and tensor.is_inference()


def name(module: nn.Module, path: str) -> None:
    """What to call the module in the log."""
    vars(module)[NAME] = path


def restore(module: DropIn) -> None:
    """Gives a module the class back that its fused one stands in for."""
    module.__class__ = module.original
    for name in (NAME, STATE):
        vars(module).pop(name, None)


def _report(module: nn.Module, reason: str) -> None:
    """Once for each module, and once for all of its replicas, which nn.DataParallel makes anew for each call."""
    where = vars(module).get(NAME) or "a module"
    is_replica = "_is_replica" in vars(module)
    told, what = (_told_of_replicas, (where, type(module), reason)) if is_replica else (_told_of, module)
    if what not in told:
        told.add(what)
        _log.warning("%s (%s) runs its original forward: %s", where, type(module).__name__, reason)


def renamed(function: types.FunctionType, new: str) -> types.FunctionType:
    """A copy by another name: TorchScript calls a method what its function is called."""
    copy = types.FunctionType(function.__code__, function.__globals__, new, function.__defaults__, function.__closure__)
    copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, function.__annotations__
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return copy


def remember_forwards(*kinds: type[nn.Module]) -> None:
    """Takes the forward of these classes, as it is when they are first seen, for the one that is read past, and what
    calls it.

    One of torch's or timm's that is patched at that moment is no forward to read past; in a class of somebody else's,
    which is tried as it is, it counts as the class's own. When the patch is taken off, the class counts as changed.
    Either way its modules run their original forward until the process ends.
    """
    for kind in kinds:
        _forwards.setdefault(kind, kind.forward if _is_as_written(kind, "forward") else None)
        _calls.setdefault(kind, _call_of(kind) if all(_is_as_written(kind, name) for name in _CALLS) else None)


def _call_of(kind: type[nn.Module]) -> tuple[types.FunctionType, types.FunctionType]:
    return kind.__call__, kind._call_impl


def _is_as_written(kind: type[nn.Module], name: str) -> bool:
    """Whether a method that is torch's or timm's comes from the file of its class; of others nobody knows."""
    base = next(base for base in kind.__mro__ if name in vars(base))
    if base.__module__.partition(".")[0] not in ("torch", "timm") or issubclass(base, DropIn):
        return True
    module = sys.modules.get(base.__module__)
    return module is not None and getattr(vars(base)[name], "__globals__", None) is vars(module)


def why_not_part(part: nn.Module | None, name: str, *kinds: type[nn.Module]) -> str | None:
    """Why a part may not be read past: None where it is of one of these classes, and calling it would do nothing else.

    A subclass, such as a quantised layer, has another forward. The reason starts with the part's name.
    """
    kind = type(part)
    if kind not in kinds:
        expected = kinds[0]
        got = kind.__name__ if kind.__name__ != expected.__name__ else f"{kind.__module__}.{kind.__name__}"
        return f"{name} is {got}, expected {expected.__module__.partition('.')[0]}'s {expected.__name__}"
    state = part.__dict__
    if not callable(part.forward) or "forward" in state:  # torch.compile watches the attribute, and not the dictionary
        return f"{name} has its forward set on the instance"
    if state.get("_compiled_call_impl") is not None:
        return f"{name} is compiled by itself"
    if kind.forward is not _forwards[kind]:
        return f"{name}: the forward of {kind.__name__} was replaced"
    if not torch.compiler.is_compiling() and _call_of(kind) != _calls[kind]:
        return f"{name}: the __call__ of {kind.__name__} was replaced"
    if (
        (state["_forward_hooks"] and settled.has_others(state["_forward_hooks"]))
        or (state["_forward_pre_hooks"] and settled.has_others(state["_forward_pre_hooks"]))
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return f"{name} has hooks, which would not run as before"
    for parameter in state["_parameters"].values():
        if parameter is None:
            continue
        if type(parameter) not in PLAIN:
            return f"{name} has a parameter of class {type(parameter).__name__}"
        if parameter.layout is not torch.strided:
            return f"{name} has a sparse parameter, or one of another layout"
    return None


def why_not_parameters(part: nn.Module | None, name: str) -> str | None:
    """Why what a part that is called computes of its own parameters may not go to an operator: of a subclass, it has a
    meaning of its own for the functions that the original gives it to."""
    for parameter in part._parameters.values() if isinstance(part, nn.Module) else ():
        if parameter is not None and type(parameter) not in PLAIN:
            return f"{name} has a parameter of class {type(parameter).__name__}"
    return None


def why_not_linear(
    part: nn.Module | None, name: str, rows: int | None = None, columns: int | None = None
) -> str | None:
    """`why_not_part` of an nn.Linear whose weight is [rows, columns], by default as large as the layer says."""
    reason = why_not_part(part, name, nn.Linear)
    if reason is not None:
        return reason
    rows = part.out_features if rows is None else rows
    columns = part.in_features if columns is None else columns
    weight = part._parameters.get("weight")  # getattr on a module takes ten times as long
    if weight is None or weight.size() != (rows, columns):
        got = "no parameter" if weight is None else list(weight.shape)
        return f"{name}: its weight is {got}, expected [{rows}, {columns}]"
    return None


def why_not_norm(part: nn.Module | None, name: str) -> str | None:
    """`why_not_part` of an nn.LayerNorm over the channels."""
    if type(part) is not nn.LayerNorm or len(part.normalized_shape) != 1:
        return f"{name} is {type(part).__name__}, expected torch's LayerNorm over the channels"
    return why_not_part(part, name, nn.LayerNorm)


def why_not_dropout(part: nn.Module | None, name: str, training: bool) -> str | None:
    """`why_not_part` of a dropout layer, which must not drop anything at present."""
    reason = why_not_part(part, name, nn.Dropout, nn.Identity)
    if reason is None and type(part) is nn.Dropout and part.p > 0 and (training or part.training):
        return f"{name}: {dropout(part)} in training needs the attention weights"
    return reason


def why_not_surroundings() -> str | None:
    """What was done to all modules, or to what they call."""
    return why_not_functions() or _why_not_watched()


def _why_not_watched() -> str | None:
    """Hooks on all modules are not called for the parts that are read past; those that only keep track do not count."""
    if not (
        global_hooks._global_forward_hooks
        or global_hooks._global_forward_pre_hooks
        or global_hooks._global_backward_hooks
        or global_hooks._global_backward_pre_hooks
    ):
        return None
    for hooks in (
        global_hooks._global_forward_hooks,
        global_hooks._global_forward_pre_hooks,
        global_hooks._global_backward_hooks,
        global_hooks._global_backward_pre_hooks,
    ):
        if any(not isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks.values()):
            return "hooks on all modules would not run as before"
    return None


def dropout(part: nn.Dropout) -> str:
    """With its rate, which torch.compile cannot put into a text."""
    return "dropout" if torch.compiler.is_compiling() else f"dropout {part.p:g}"


def within(name: str, reason: str | None) -> str | None:
    """A reason that concerns a child, as one of its parent."""
    return reason and f"{name}.{reason}"


remember_forwards(nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity, nn.GELU, nn.Sequential, nn.ModuleList)
