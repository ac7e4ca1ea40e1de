"""The result of an up-convolution that is computed when it is asked for, and not at all where it is concatenated.

To everybody it is the tensor that the convolution gives. torch.cat of it and one other tensor along the channels runs
upconv_concat; whatever else is asked of it, by a function, a method, an attribute or C++ code, computes the convolution
once, as at the moment of the module's call, and goes on with that.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from tokenfusion.kernels import dispatch, upconv_concat
from tokenfusion.kernels.upconv_concat.shapes import gives_channels_last, is_channels_last

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_ORDINARY = (torch.Tensor, torch.nn.Parameter)

# What the result can tell of itself without being computed.
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


class _Mode:
    """The modes of a moment that a convolution depends on."""

    def __init__(self, device: torch.device):
        self.device = device.type
        self.grad, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.autocast, self.dtype = torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        autocast = torch.autocast(self.device, dtype=self.dtype, enabled=self.autocast)
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad), autocast:
            yield


class _Call:
    """What the module was called with, and when."""

    def __init__(self, tensors: dict[str, torch.Tensor | None], scale: int):
        self.tensors, self.scale = tensors, scale
        self.mode = _Mode(tensors["x"].device)
        self.states = {name: _state(tensor) for name, tensor in tensors.items()}

    def check_unchanged(self) -> None:
        for name, tensor in self.tensors.items():
            if _state(tensor) != self.states[name]:
                what = "input" if name == "x" else name
                raise RuntimeError(
                    f"the {what} of a fused ConvTranspose2d was changed in place after its call and before its result "
                    "was used: use the result, or clone it, before the change; or call tokenfusion.unfuse"
                )
        if self.mode.stream is not None and self.mode.stream != torch.cuda.current_stream(self.mode.stream.device):
            raise RuntimeError(
                "the result of a fused ConvTranspose2d is used on another CUDA stream than that of its call: clone it "
                "there first; or call tokenfusion.unfuse"
            )

    def run(self) -> torch.Tensor:
        self.check_unchanged()
        with contextlib.nullcontext() if _Mode(self.tensors["x"].device) == self.mode else self.mode.entered():
            return F.conv_transpose2d(*self.tensors.values(), stride=self.scale)


def _state(tensor: torch.Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None else (tensor._version, tensor.data_ptr())


class _Node(torch.autograd.Function):
    """The convolution as a node of autograd, for callers that do not see the override of torch functions."""

    @staticmethod
    def forward(ctx, call: _Call, x, weight, bias):
        ctx.scale, ctx.has_bias = call.scale, bias is not None
        ctx.save_for_backward(x, weight)
        return _empty(call)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needed, step = [*ctx.needs_input_grad[1:3], ctx.has_bias and ctx.needs_input_grad[3]], [ctx.scale] * 2
        sizes = [weight.shape[1]] if ctx.has_bias else None
        grads = torch.ops.aten.convolution_backward(
            grad.to(weight.dtype), x.to(weight.dtype), weight, sizes, step, [0, 0], [1, 1], True, [0, 0], 1, needed
        )
        return None, *(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True))


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
    return True in (is_channels_last(x), is_channels_last(weight))


def defer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.conv_transpose2d(x, weight, bias, stride=k) for a weight [Cin, Cout, k, k], computed when it is asked for.

    Args:
        x: [B, Cin, h, w], in the dtype of the weight, or autocast to it.

    Returns:
        a tensor [B, Cout, k h, k w].
    """
    call = _Call({"x": x, "weight": weight, "bias": bias}, weight.shape[2])
    recorded = call.mode.grad and any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias))
    result = _Node.apply(call, x, weight, bias) if recorded else _empty(call)
    with torch._C.DisableTorchFunctionSubclass():
        result._deferred = _Deferred(call, result.grad_fn)
    return result


class _Deferred:
    """What becomes of a result: `value` once Python has asked, `raw` (without a gradient of its own) once C++ has."""

    def __init__(self, call: _Call, node):
        self.call, self.node = call, node
        self.value: torch.Tensor | None = None
        self.raw: torch.Tensor | None = None
        self.lock = threading.RLock()


class DeferredUpConv(torch.Tensor):
    """The result of `defer`."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _CONCATENATIONS:
            joined = _join(*args, **kwargs)
            if joined is not None:
                return joined
        args, kwargs = tree_map_only(DeferredUpConv, _computed, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(DeferredUpConv, _computed_below_autograd, (args, kwargs or {}))
        return func(*args, **kwargs)


def _was_taken_over(result: DeferredUpConv) -> bool:
    """Whether it has another history than at the call: of an autograd.Function that returned it, or of C++ code."""
    with torch._C.DisableTorchFunctionSubclass():
        state = result._deferred
        return state.raw is not None or result.grad_fn is not state.node or (
            state.node is None and result.requires_grad
        )


def _computed(result: DeferredUpConv) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        state = result._deferred
    with state.lock:
        if state.value is None:
            if _was_taken_over(result):
                with torch._C.DisableTorchFunctionSubclass():
                    state.value = torch.ops.aten.alias(result)
            else:
                state.value = state.call.run()
        return state.value


def _computed_below_autograd(result: DeferredUpConv) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        state = result._deferred
    with state.lock:
        if state.raw is None:
            state.raw = (state.call.run() if state.value is None else state.value).detach()
        return state.raw


def _join(tensors=None, dim=0, *, axis=None, out=None) -> torch.Tensor | None:
    """The concatenation as one operator, where it is one of a result that is not computed yet and an ordinary tensor."""
    if out is not None or not isinstance(tensors, (tuple, list)) or len(tensors) != 2:
        return None
    if (dim if axis is None else axis) not in (1, -3):
        return None
    skip_first = not isinstance(tensors[0], DeferredUpConv)
    skip, result = tensors if skip_first else reversed(tensors)
    if type(skip) not in _ORDINARY or not only_runs():
        return None
    with torch._C.DisableTorchFunctionSubclass():
        state, shape, dtype = result._deferred, result.shape, result.dtype
    call = state.call
    x, weight, bias = call.tensors.values()
    if state.value is not None or _was_taken_over(result) or call.mode != _Mode(x.device):
        return None
    if (skip.dtype, skip.device, skip.dim()) != (dtype, x.device, 4) or skip.numel() == 0:
        return None
    if (skip.shape[0], *skip.shape[2:]) != (shape[0], *shape[2:]):
        return None
    both = _result_is_channels_last(x, weight) and is_channels_last(skip) is True
    if gives_channels_last(x, skip) != both:
        return None
    call.check_unchanged()
    return upconv_concat(x, weight, bias, skip, skip_first=skip_first)


def only_runs() -> bool:
    """Whether calls are neither compiled, traced or transformed nor seen by a mode, such as a counter."""
    return (
        not torch.compiler.is_compiling()
        and dispatch.transform() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
    )
