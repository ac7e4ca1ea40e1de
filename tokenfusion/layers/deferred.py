"""The result of an up-convolution that is computed when it is asked for, and not at all where it is concatenated.

To everybody it is the tensor that the convolution gives. torch.cat of it and one other tensor along the channels runs
upconv_concat, also after a padding by nothing; whatever else is asked of it, by a function, a method, an attribute or
C++ code, computes the convolution once, as at the moment of the module's call, and goes on with that. `settle` computes
what is left when the forward of a fused model returns.

For autograd the result is the convolution's node: its value and the concatenation come after it, so that a hook on the
result, or its gradient, sees every use of it.
"""

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_map_only

from tokenfusion.kernels import dispatch, upconv_concat
from tokenfusion.kernels.upconv.concat.op import OPERATOR
from tokenfusion.kernels.upconv.reference import convolution_gives_wrong_gradient, gradient_as_product
from tokenfusion.kernels.upconv.shapes import gives_channels_last
from tokenfusion.layers.modes import functions_are_seen

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_BACKWARD = (torch.autograd.backward, torch.Tensor.backward)
_ORDINARY = (torch.Tensor, torch.nn.Parameter)

# What the result can tell of itself without being computed. Once it is, it may have been given another shape in place.
_KNOWN = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.ndimension,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.__len__,
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "is_cuda")),
}

# What its node is asked for.
_OF_THE_NODE = {
    torch.Tensor.register_hook,
    torch.Tensor.retain_grad,
    torch.Tensor.grad.__set__,
    *(getattr(torch.Tensor, name).__get__ for name in ("grad", "grad_fn", "output_nr", "requires_grad", "is_leaf")),
    torch.Tensor.retains_grad.__get__,
}


class _Mode:
    """The modes of a moment that a convolution depends on."""

    def __init__(self, device: torch.device):
        self.device = device
        self.grad, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.autocast, self.dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other)

    @property
    def records(self) -> bool:
        return self.grad and not self.inference

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        autocast = torch.autocast(self.device.type, dtype=self.dtype, enabled=self.autocast)
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad), autocast:
            yield


class _Call:
    """What the module was called with, and when."""

    def __init__(self, tensors: dict[str, torch.Tensor | None], scale: int):
        self.tensors, self.scale = tensors, scale
        self.mode = _Mode(tensors["x"].device)
        self.states = {name: _state(tensor) for name, tensor in tensors.items()}

    def why_not_now(self) -> str | None:
        """What has changed since, so that the convolution would compute something else now."""
        for name, tensor in self.tensors.items():
            if _state(tensor) != self.states[name]:
                what = "input" if name == "x" else name
                return (
                    f"the {what} of a fused ConvTranspose2d was changed in place after its call and before its result "
                    "was used: use the result, or clone it, before the change; or call tokenfusion.unfuse"
                )
        if self.mode.stream is not None and self.mode.stream != torch.cuda.current_stream(self.mode.stream.device):
            return (
                "the result of a fused ConvTranspose2d is used on another CUDA stream than that of its call: clone it "
                "there first; or call tokenfusion.unfuse"
            )
        return None

    def check_unchanged(self) -> None:
        reason = self.why_not_now()
        if reason is not None:
            raise RuntimeError(reason)

    def run(self) -> torch.Tensor:
        """The convolution's value; it is for the caller to record it."""
        self.check_unchanged()
        with temporarily_clear_interpreter_stack(), self.mode.entered(), torch.no_grad():
            return torch.conv_transpose2d(*self.tensors.values(), stride=self.scale)


def _state(tensor: torch.Tensor | None) -> tuple[int, int] | None:
    """Differs after a change of the tensor. Inference tensors have none: there the input is a copy of our own."""
    return None if tensor is None or tensor.is_inference() else (tensor._version, tensor.data_ptr())


class _Node(torch.autograd.Function):
    """The convolution, whose result does not exist yet."""

    @staticmethod
    def forward(ctx, call: _Call, x, weight, bias):
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, weight, bias)]
        ctx.save_for_backward(x, weight)
        return _empty(call)

    @staticmethod
    def backward(ctx, grad):
        needed = ctx.needs_input_grad[1:]
        x, weight = (tensor.to(grad.dtype) for tensor in ctx.saved_tensors)
        grads = _backward(grad, x, weight, needed)
        return None, *(g.to(dtype) if want else None for g, want, dtype in zip(grads, needed, ctx.dtypes, strict=True))


def _backward(grad, x, weight, needed):
    chosen = OPERATOR.select(x, weight)
    if chosen.backend != "reference":
        backward = getattr(torch.ops.tokenfusion, f"upconv_concat_backward_{chosen.backend}").default
        return backward(grad, x, weight, needed, *filter(None, [chosen.form]))  # not every backend has forms
    of_x = None
    if needed[0] and convolution_gives_wrong_gradient(x):
        of_x, needed = gradient_as_product(grad, weight), (False, *needed[1:])
    sizes, step = [weight.shape[1]], weight.shape[2:]
    others = [0, 0], [1, 1], True, [0, 0], 1
    grads = torch.ops.aten.convolution_backward(grad, x, weight, sizes, step, *others, needed)
    return grads if of_x is None else (of_x, *grads[1:])


class _Same(torch.autograd.Function):
    """What `make` gives, for autograd the same as the result that it is made from."""

    @staticmethod
    def forward(ctx, result, make):
        return make()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Changed(torch.autograd.Function):
    """A result whose value was changed in place, with the value's history in place of its own."""

    @staticmethod
    def forward(ctx, result, value):
        ctx.mark_dirty(result)
        return result

    @staticmethod
    def backward(ctx, grad):
        return None, grad


class _Joined(torch.autograd.Function):
    """The concatenation of a result and a skip connection, computed from what the result was called with."""

    @staticmethod
    def forward(ctx, result, skip, call: _Call, skip_first: bool):
        ctx.up = (skip.shape[1] if skip_first else 0, result.shape[1])
        ctx.skip = (0 if skip_first else result.shape[1], skip.shape[1])
        x, weight, bias = call.tensors.values()
        return upconv_concat(x, weight, bias, skip, skip_first=skip_first)

    @staticmethod
    def backward(ctx, grad):
        parts = (grad.narrow(1, *part) for part in (ctx.up, ctx.skip))
        return *(g if wanted else None for g, wanted in zip(parts, ctx.needs_input_grad, strict=False)), None, None


def _empty(call: _Call) -> "DeferredUpConv":
    x, weight, _ = call.tensors.values()
    height, width = (side * call.scale for side in x.shape[2:])
    shape = (x.shape[0], weight.shape[1], height, width)
    strides = (shape[1] * height * width, height * width, width, 1)
    if _result_is_channels_last(x, weight):
        strides = (strides[0], 1, width * shape[1], shape[1])
    dtype = call.mode.dtype if call.mode.autocast and x.dtype != torch.float64 else x.dtype
    out = torch.Tensor._make_wrapper_subclass(DeferredUpConv, shape, strides=strides, dtype=dtype, device=x.device)
    torch._C._set_throw_on_mutable_data_ptr(out)
    return out


def _result_is_channels_last(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return _suggests_channels_last(x) or _suggests_channels_last(weight)


def _suggests_channels_last(tensor: torch.Tensor) -> bool:
    """As torch decides it, where both memory formats describe the tensor, too."""
    return torch.ops.aten.is_strides_like_format.default(tensor, torch.channels_last)


def defer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.conv_transpose2d(x, weight, bias, stride=k) for a weight [Cin, Cout, k, k], computed when it is asked for.

    Args:
        x: [B, Cin, h, w], in the dtype of the weight, or autocast to it.

    Returns:
        a tensor [B, Cout, k h, k w].
    """
    call = _Call({"x": x, "weight": weight, "bias": bias}, weight.shape[2])
    recorded = call.mode.records and any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias))
    return _with_state(_Node.apply(call, x, weight, bias) if recorded else _empty(call), call)


class _Deferred:
    """What becomes of a result: `value` once Python has asked, `raw` (without a gradient of its own) once C++ has.

    `node` and `value_node` are their places in autograd as made here; in-place operations give others.
    """

    def __init__(self, call: _Call, node):
        self.call, self.node = call, node
        self.value: torch.Tensor | None = None
        self.value_node = self.followed = None
        self.raw: torch.Tensor | None = None
        self.lock = threading.RLock()

    @property
    def value_has_other_history(self) -> bool:
        value = self.value
        return value is not None and (
            value.grad_fn is not self.value_node or value.requires_grad != (self.value_node is not None)
        )


class _Outstanding(threading.local):
    """The results of this thread that somebody still holds, in the order of their calls."""

    def __init__(self):
        self.results: weakref.WeakValueDictionary[int, DeferredUpConv] = weakref.WeakValueDictionary()
        self.calls = itertools.count()

    def add(self, result: "DeferredUpConv") -> None:
        self.results[next(self.calls)] = result

    def take(self) -> list["DeferredUpConv"]:
        taken = list(self.results.values())
        self.results.clear()
        return taken


_outstanding = _Outstanding()


def _with_state(result: "DeferredUpConv", call: _Call) -> "DeferredUpConv":
    with torch._C.DisableTorchFunctionSubclass():
        result._deferred = _Deferred(call, result.grad_fn)
    _outstanding.add(result)
    return result


def settle() -> None:
    """Computes what this thread has deferred, and somebody still holds.

    A result whose input or weight was changed meanwhile stays as it is: its use is an error, and it may never be used.
    """
    for result in _outstanding.take():
        if _state_of(result).call.why_not_now() is None:
            _computed(result)


class DeferredUpConv(torch.Tensor):
    """The result of `defer`."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _KNOWN:
            state = _state_of(args[0])
            known = next((made for made in (state.value, state.raw) if made is not None), args[0])
            with torch._C.DisableTorchFunctionSubclass():
                return func(known, *args[1:], **kwargs)
        if func in _OF_THE_NODE and not _state_of(args[0]).value_has_other_history:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        fused = None
        if func in _CONCATENATIONS:
            fused = _join(*args, **kwargs)
        elif func is F.pad:
            fused = _pad_by_nothing(*args, **kwargs)
        elif func is torch.autograd.grad:
            args, kwargs = _with_edges(*args, **kwargs)
        elif func in _BACKWARD:
            kwargs["inputs"] = tree_map_only(DeferredUpConv, _retaining_edge, kwargs.get("inputs"))
        if fused is not None:
            return fused
        used: list[DeferredUpConv] = []

        def computed(result: DeferredUpConv) -> torch.Tensor:
            used.append(result)
            return _computed(result)

        args, kwargs = tree_map_only(DeferredUpConv, computed, (args, kwargs))
        returned = func(*args, **kwargs)
        for result in used:
            if not _was_taken_over(result):
                _follow(result)
        return next((result for result in used if _state_of(result).value is returned), returned)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(DeferredUpConv, _computed_below_autograd, (args, kwargs or {}))
        return func(*args, **kwargs)


def _state_of(result: DeferredUpConv) -> _Deferred:
    with torch._C.DisableTorchFunctionSubclass():
        return result._deferred


def _was_taken_over(result: DeferredUpConv) -> bool:
    """Whether it has another history than is known: of an autograd.Function that returned it, or of C++ code."""
    with torch._C.DisableTorchFunctionSubclass():
        state = result._deferred
        computed_in_cpp = state.raw is not None and state.value is None
        return computed_in_cpp or result.grad_fn is not state.node or (state.node is None and result.requires_grad)


def _computed(result: DeferredUpConv) -> torch.Tensor:
    state = _state_of(result)
    with state.lock:
        if _was_taken_over(result):
            with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
                state.value = _Same.apply(result, lambda: _computed_below_autograd(result).detach())
                state.node = result.grad_fn
        elif state.value is not None:
            _follow(result)
            return state.value
        elif state.node is None:
            state.value = state.call.run()
        else:
            with torch._C.DisableTorchFunctionSubclass(), temporarily_clear_interpreter_stack():
                with state.call.mode.entered():
                    state.value = _Same.apply(result, state.call.run)
        state.value_node = state.followed = state.value.grad_fn
        return state.value


def _follow(result: DeferredUpConv) -> None:
    """Gives it the history of a value that was changed in place, for the callers that do not see the override."""
    state = _state_of(result)
    with torch._C.DisableTorchFunctionSubclass(), state.lock:
        value = state.value
        if not state.value_has_other_history or state.followed is (value.grad_fn or value):
            return
        if not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled()):
            raise RuntimeError(
                "the result of a fused ConvTranspose2d was changed in place through a view, and then given to an "
                "autograd.Function, which cannot see that: give it a clone; or call tokenfusion.unfuse"
            )
        with torch.enable_grad():
            _Changed.apply(result, value)
        state.node, state.followed = result.grad_fn, value.grad_fn or value


def _computed_below_autograd(result: DeferredUpConv) -> torch.Tensor:
    state = _state_of(result)
    with state.lock:
        if state.raw is None:
            state.raw = (state.call.run() if state.value is None else state.value).detach()
        return state.raw


def _with_edges(outputs, inputs, *args, **kwargs):
    """Arguments with which torch.autograd.grad asks for the gradient of the node, not of the value after it."""
    return (outputs, tree_map_only(DeferredUpConv, _edge, inputs), *args), kwargs


def _edge(result: DeferredUpConv) -> torch.Tensor | GradientEdge:
    if _state_of(result).value_has_other_history or not result.requires_grad:
        return _computed(result)
    return GradientEdge(result.grad_fn, result.output_nr)


def _retaining_edge(result: DeferredUpConv) -> torch.Tensor | GradientEdge:
    edge = _edge(result)
    if isinstance(edge, GradientEdge):
        result.retain_grad()
    return edge


def _is_as_called(result: DeferredUpConv) -> bool:
    """Whether nothing was asked of it so far, and a convolution would run now as it would have at the call."""
    state = _state_of(result)
    if state.value is not None or _was_taken_over(result) or not only_runs():
        return False
    return state.call.mode == _Mode(state.call.mode.device)


def _join(tensors=None, dim=0, *, axis=None, out=None) -> torch.Tensor | None:
    """The concatenation as one operator, where it is of a result that is not computed yet and an ordinary tensor."""
    if out is not None or not isinstance(tensors, (tuple, list)) or len(tensors) != 2:
        return None
    if (dim if axis is None else axis) not in (1, -3):
        return None
    skip_first = not isinstance(tensors[0], DeferredUpConv)
    skip, result = tensors if skip_first else reversed(tensors)
    if type(skip) not in _ORDINARY or not _is_as_called(result):
        return None
    call, shape = _state_of(result).call, result.shape
    x, weight, _ = call.tensors.values()
    if (skip.dtype, skip.device, skip.dim()) != (result.dtype, x.device, 4) or skip.numel() == 0:
        return None
    if (skip.shape[0], *skip.shape[2:]) != (shape[0], *shape[2:]):
        return None
    if gives_channels_last(x, skip) != (_result_is_channels_last(x, weight) and _suggests_channels_last(skip)):
        return None
    call.check_unchanged()
    if not call.mode.records:
        return upconv_concat(*call.tensors.values(), skip, skip_first=skip_first)
    with torch._C.DisableTorchFunctionSubclass():
        return _Joined.apply(result, skip, call, skip_first)


def _pad_by_nothing(input, pad, mode="constant", value=None) -> torch.Tensor | None:
    """Another result that is not computed yet, where the padding is zero on all sides."""
    if not isinstance(pad, (tuple, list)) or len(pad) != 4 or any(pad) or not _is_as_called(input):
        return None
    if mode != "constant" and (mode not in ("replicate", "reflect", "circular") or value is not None):
        return None
    state = _state_of(input)
    with torch._C.DisableTorchFunctionSubclass():
        padded = _empty(state.call) if state.node is None else _Same.apply(input, lambda: _empty(state.call))
    return _with_state(padded, state.call)


def only_runs() -> bool:
    """Whether calls just run: not compiled, traced or transformed, and not seen by a mode, such as a counter."""
    return (
        not torch.compiler.is_compiling()
        and dispatch.transform() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and not functions_are_seen()
    )
