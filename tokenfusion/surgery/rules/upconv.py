"""U-Net decoders: a transposed convolution whose kernel is its stride, and the concatenation of its result.

The pair is looked for in the forward of the module that holds the convolution, as torch.fx traces it with every other
submodule as a leaf; forwards that it cannot trace are known by their class's name. The fused class is a subclass of the module's own whose forward is the traced one with the pair as
one operator: parameters, submodules and hooks of the others stay where they are.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from tokenfusion.kernels import upconv_concat
from tokenfusion.surgery.rules import checks

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_STEPS_TO_A_CONCATENATION = 3  # so far, operators between both are named as the reason


def _is_container(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward or type(module) in _CONTAINERS


def _near_convolutions(module: nn.Module) -> Iterator[str]:
    """Names of the transposed convolutions that a module holds itself or in containers."""
    for name, child in module.named_children():
        if isinstance(child, nn.ConvTranspose2d):
            yield name
        elif _is_container(child):
            yield from (f"{name}.{inner}" for inner in _near_convolutions(child))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not _is_container(module)


def _trace(module: nn.Module, training: bool) -> fx.Graph:
    before = module.training
    module.training = training  # of the module alone: its parts are not run
    try:
        return _Tracer().trace(module)
    finally:
        module.training = before


def _why_not_convolution(module: nn.Module, name: str) -> str | None:
    conv = module.get_submodule(name)
    reason = checks.why_not_type(module, nn.ConvTranspose2d, name) or checks.why_not_bypass(module, name)
    if reason is not None:
        return reason
    if conv.kernel_size != conv.stride or conv.kernel_size[0] != conv.kernel_size[1]:
        return f"{name} has kernel {conv.kernel_size} and stride {conv.stride}, expected k x k with stride k"
    for attribute, expected in (("padding", (0, 0)), ("output_padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1)):
        if getattr(conv, attribute) != expected:
            return f"{name} has {attribute} {getattr(conv, attribute)}, expected {expected}"
    return None


def _concatenated(node: fx.Node) -> tuple[Any, Any]:
    """(tensors, dim) of a call of torch.cat."""
    tensors = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return tensors, dim


def _is_concatenation(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _CONCATENATIONS


def _why_not_pair(module: nn.Module, up: fx.Node) -> str | None:
    """Of the call of a transposed convolution whose result is concatenated sooner or later."""
    name = up.target
    reason = _why_not_convolution(module, name)
    if reason is not None:
        return reason
    if len(up.args) != 1 or up.kwargs:
        return f"{name} is called with more than its input"
    if len(up.users) != 1:
        return f"{name}'s result is used {len(up.users)} times"
    (user,) = up.users
    if not _is_concatenation(user):
        target = user.target if isinstance(user.target, str) else user.target.__name__
        return f"{name}'s result goes through {target} before it is concatenated"
    tensors, dim = _concatenated(user)
    if not isinstance(tensors, (tuple, list)) or len(tensors) != 2:
        return f"{name}'s result is not concatenated with one tensor"
    if dim not in (1, -3):
        return f"{name}'s result is concatenated along dimension {dim}, expected 1"
    return None


def _is_concatenated_later(node: fx.Node, steps: int = _STEPS_TO_A_CONCATENATION) -> bool:
    return any(
        _is_concatenation(user) or (steps > 1 and _is_concatenated_later(user, steps - 1)) for user in node.users
    )


def _pairs(module: nn.Module, graph: fx.Graph) -> list[fx.Node]:
    near = set(_near_convolutions(module))
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target in near]
    return [node for node in calls if _is_concatenated_later(node)]


def _fuse_graph(module: nn.Module, graph: fx.Graph) -> list[str]:
    """Makes one operator of each pair that can be; the reasons of the others."""
    reasons = []
    for up in _pairs(module, graph):
        reason = _why_not_pair(module, up)
        if reason is not None:
            reasons.append(reason)
            continue
        (concatenation,) = up.users
        first, second = _concatenated(concatenation)[0]
        skip_first = second is up
        with graph.inserting_before(concatenation):
            parameters = [graph.get_attr(f"{up.target}.{name}") for name in ("weight", "bias")]
            fused = graph.call_function(
                upconv_concat,
                (up.args[0], *parameters, first if skip_first else second),
                {"skip_first": skip_first},
            )
        concatenation.replace_all_uses_with(fused)
        graph.erase_node(concatenation)
        graph.erase_node(up)
    return reasons


def _monai_up_cat(self: nn.Module, x: torch.Tensor, x_e: torch.Tensor | None) -> torch.Tensor:
    """The forward of MONAI's UpCat: skip x_e first; where the sizes do not match, it pads."""
    up = self.upsample.deconv
    size = [side * scale for side, scale in zip(x.shape[2:], up.stride)]
    if not isinstance(x_e, torch.Tensor) or list(x_e.shape[2:]) != size:
        return self.original.forward(self, x, x_e)
    return self.convs(upconv_concat(x, up.weight, up.bias, x_e, skip_first=True))


# Class -> its forward with the pair as one operator, and its up-convolution, which is alone in its container.
_KNOWN = {"monai.networks.nets.basic_unet.UpCat": (_monai_up_cat, "upsample.deconv")}


def _known_forward(module: nn.Module) -> tuple[Callable | None, str | None] | None:
    """What `_fused_forward` returns, for the classes that are known."""
    forward, expected = _KNOWN.get(f"{type(module).__module__}.{type(module).__qualname__}", (None, None))
    if forward is None:
        return None
    container = expected.rpartition(".")[0]
    reason = _why_not_convolution(module, expected) or checks.why_not_bypass(module, container)
    if reason is None and len(module.get_submodule(container)) != 1:
        reason = f"{container} has more than one layer"
    return (None, reason) if reason else (forward, None)


def _names_a_concatenation(forward: Callable) -> bool:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and any(function.__name__ in code.co_names for function in _CONCATENATIONS)


def _fused_forward(module: nn.Module) -> tuple[Callable | None, str | None]:
    """(forward, None); or (None, the reason why there is none), and (None, None) where nothing is concatenated."""
    known = _known_forward(module)
    if known is not None:
        return known
    try:
        graphs = [_trace(module, training) for training in (False, True)]
    except Exception as error:  # whatever somebody's forward does with a proxy
        message = str(error).strip().splitlines() or [""]
        return None, f"torch.fx cannot trace its forward ({type(error).__name__}: {message[0]})"
    graph = graphs[0]
    pairs = _pairs(module, graph)
    if not pairs:
        hidden = _names_a_concatenation(type(module).forward) and not any(map(_is_concatenation, graph.nodes))
        return None, "it concatenates on a path that torch.fx does not trace" if hidden else None
    if str(graph) != str(graphs[1]):
        return None, "its forward depends on self.training"
    reasons = _fuse_graph(module, graph)
    if len(reasons) == len(pairs):
        return None, "; ".join(reasons)
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<fused {type(module).__name__}>", "exec"), namespace)
    return namespace["forward"], None


class _Fused:
    """What the fused classes have in common. They are made when fuse runs, and so made again when one is loaded."""

    original: type[nn.Module]

    def __reduce_ex__(self, protocol):
        return _load, (self.original, self.__dict__)


def _load(original: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = original.__new__(original)
    module.__setstate__(state)
    RULE.replace(module)
    return module


class DecoderRule:
    """As `Rule`, for modules of any class that up-convolve and concatenate."""

    op = "upconv_concat"
    kind = "ConvTranspose2d + cat"
    absorbs = ()

    def matches(self, module: nn.Module) -> bool:
        if isinstance(module, _Fused):
            return True
        if _is_container(module) or isinstance(module, fx.GraphModule) or not any(_near_convolutions(module)):
            return False
        return _fused_forward(module) != (None, None)

    def why_not(self, module: nn.Module) -> str | None:
        return None if isinstance(module, _Fused) else _fused_forward(module)[1]

    def replace(self, module: nn.Module) -> None:
        if not isinstance(module, _Fused):
            original = type(module)
            body = {"forward": _fused_forward(module)[0], "original": original}
            body |= {"__doc__": original.__doc__, "__module__": original.__module__}
            module.__class__ = type(original.__name__, (_Fused, original), body)

    def restore(self, module: nn.Module) -> None:
        if isinstance(module, _Fused):
            module.__class__ = module.original


RULE = DecoderRule()
RULES = (RULE,)
