"""The hooks by which results are deferred in the forward of a fused model alone, and computed when it returns.

What outlives the model's forward, or is made by a part that is called by itself, may be used after its weights or
inputs were changed in ways that no tensor tells of, such as `parameter.data.add_`, or memory that NumPy writes to.
"""

import copy
import sys
import threading
from collections import OrderedDict
from types import FrameType

import torch
from torch import nn

from tokenfusion.layers.deferred import DeferredUpConv, settle

_KEY = "tokenfusion"  # torch's are numbers, which start again in the process that a copy is sent to


class _Running(threading.local):
    """The frames in which this thread calls the forwards of fused models, the innermost last.

    Those of calls that Ctrl-C ended are among them until somebody looks: no hook is called then.
    """

    def __init__(self):
        self.frames: list[FrameType] = []


_running = _Running()


def _runs() -> bool:
    while _running.frames:
        if _is_on_the_stack(_running.frames[-1]):
            return True
        _running.frames.pop()
    return False


def _is_on_the_stack(sought: FrameType) -> bool:
    frame = sys._getframe(1)
    while frame is not None and frame is not sought:
        frame = frame.f_back
    return frame is sought


def may_defer() -> bool:
    """Whether a fused model's forward runs; or a backward pass, where activation checkpointing repeats parts of one."""
    return _runs() or torch._C._current_graph_task_id() != -1


def begin(_module: nn.Module, _inputs: tuple) -> None:
    """The hook before the forward; like the other a function of this file, so that a pickled model finds it."""
    if not torch.compiler.is_compiling():
        _runs()
        _running.frames.append(sys._getframe(1))


def settle_after(_module: nn.Module, _inputs: tuple, output: object) -> None:
    """The hook after it.

    In compiled code nothing is deferred, unless there was a graph break and what came then was not compiled.
    """
    if not torch.compiler.is_compiling():
        if _runs() and _running.frames[-1] is sys._getframe(1):
            _running.frames.pop()
        _settle()
    elif _is_deferred(output):
        _settle()


_settle = torch.compiler.disable(settle)


def _is_deferred(output: object) -> bool:
    """Whether something in it is."""
    if isinstance(output, dict):
        return _is_deferred(list(output.values()))
    if isinstance(output, (list, tuple)):
        return any([_is_deferred(each) for each in output])
    return isinstance(output, DeferredUpConv)


def settles(module: nn.Module) -> bool:
    return _KEY in module._forward_hooks


def add(model: nn.Module) -> None:
    """Has the model settle, and no module in it before it is done."""
    remove(model)
    model._forward_pre_hooks[_KEY] = begin
    model._forward_hooks[_KEY] = settle_after
    model._forward_hooks_always_called[_KEY] = True


def remove(model: nn.Module) -> None:
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called):
            hooks.pop(_KEY, None)


def has_others(hooks: dict) -> bool:
    return len(hooks) > (_KEY in hooks)


def _scriptable(module: nn.Module) -> nn.Module:
    """What TorchScript compiles, which takes a hook for code of the model: the module without the hooks."""
    if not settles(module):
        return module
    without = copy.copy(module)
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = vars(without)[name] = OrderedDict(getattr(module, name))
        hooks.pop(_KEY, None)
    return without


nn.Module.__prepare_scriptable__ = _scriptable  # a model that was fused may be of any class, and a copy or unpickled
