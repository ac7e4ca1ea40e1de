"""The CUDA kernels of dynamic_mixing on a CPU, in the emulated GPU of tests/cuda_emulation."""

import ctypes
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tests.emulation import DTYPES, Guarded, compile_library

KERNELS = ("forward", "grad_x", "grad_compressed", "grad_weight")  # numbered as in DynamicMixingKernel


class _View(ctypes.Structure):
    """DynamicMixingView."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("line_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("aligned", ctypes.c_int32),
    ]


class _Params(ctypes.Structure):
    """DynamicMixingParams."""

    _fields_ = [
        ("x", _View),
        ("compressed", _View),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("lines", "tokens", "channels", "segments", "reduced", "weight_pitch")),
        ("mixed", _View),
        ("line_sums", ctypes.c_void_p),
        ("grad_mixed", _View),
        ("grad_mean", ctypes.c_void_p),
        ("weight_columns", ctypes.c_void_p),
        ("grad_x", _View),
        ("grad_compressed", _View),
        ("grad_weight", ctypes.c_void_p),
        ("grad_bias", ctypes.c_void_p),
        ("splits", ctypes.c_int32),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = compile_library("dynamic_mixing")
    library.plan_dynamic_mixing.restype = ctypes.c_int64
    return library


def plan(tokens: int, width: int, reduced: int, dtype: torch.dtype, kernel: str, most: int) -> tuple[int, int]:
    """Shared memory of a block and the channels that are in it together, where there are `most` bytes."""
    params = _Params(tokens=tokens, channels=width, segments=1, reduced=reduced, rows=1, lines=1, splits=1)
    chunk = ctypes.c_int32()
    numbers = dtype.itemsize, KERNELS.index(kernel), ctypes.c_int64(most)
    return _library().plan_dynamic_mixing(ctypes.byref(params), *numbers, ctypes.byref(chunk)), chunk.value


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@dataclass
class Emulated:
    """dynamic_mixing on the emulated GPU, with the way in which a launch is cut up and scheduled.

    splits: blocks among which the rows are divided for the gradients of the generator; most_bytes: shared memory of a
    block. backwards, one_warp_ahead, late_copies: as in single_query_attention's.
    """

    splits: int = 1
    most_bytes: int = 227 * 1024
    backwards: bool = False
    one_warp_ahead: bool = False
    late_copies: bool = False

    def __call__(self, x, compress_weight, compress_bias, generate_weight, generate_bias, *, segments, dim):
        compressed = F.linear(x, compress_weight, compress_bias)
        return self.mix(x, compressed, generate_weight, generate_bias, segments=segments, dim=dim)[0]

    def mix(self, x, compressed, generate_weight, generate_bias, *, segments, dim):
        """mixed, and its mean over H and W."""
        mixed, sums = _Function.apply(self, x, compressed, generate_weight, generate_bias, segments, dim)
        return mixed, (sums.sum(1) / (x.shape[1] * x.shape[2])).to(x.dtype)


class _Call:
    """A call with its parameters; what they point to lives as long."""

    def __init__(self, emulated, x, compressed, weight, bias, segments, dim):
        self.emulated, self.dtype, self.dim = emulated, x.dtype, dim
        length, reduced = x.shape[dim], compressed.shape[3] // segments
        unit = 16 // x.element_size()
        self.kept = [F.pad(weight, (0, -weight.shape[1] % unit)).contiguous(), bias.contiguous()]
        columns = weight.view(length, length, -1).permute(2, 0, 1)
        columns = F.pad(columns, (0, -length % 16, 0, length % 2)).unflatten(2, (-1, 16)).transpose(1, 2).contiguous()
        self.kept.append(columns)
        self.params = _Params(
            x=self.view(x, segments),
            compressed=self.view(compressed, segments),
            weight=self.kept[0].data_ptr(),
            bias=self.kept[1].data_ptr(),
            weight_columns=columns.data_ptr(),
            rows=x.shape[0] * x.shape[3 - dim] * segments,
            lines=x.shape[3 - dim],
            tokens=length,
            channels=x.shape[3],
            segments=segments,
            reduced=reduced,
            weight_pitch=self.kept[0].shape[1],
            splits=emulated.splits,
        )

    def view(self, tensor, segments) -> _View:
        strides = tensor.stride(0), tensor.stride(3 - self.dim), tensor.stride(self.dim)
        steps = [s for s, size in zip(tensor.stride(), tensor.shape) if size > 1] + [tensor.shape[3] // segments]
        bytes_ = [step * tensor.element_size() for step in steps[:-2] + steps[-1:]] + [tensor.data_ptr()]
        return _View(tensor.data_ptr(), *strides, aligned=all(b % 16 == 0 for b in bytes_))

    def run(self, kernel: str, **outputs) -> None:
        for name, value in outputs.items():
            setattr(self.params, name, value)
        e = self.emulated
        numbers = DTYPES.index(self.dtype), KERNELS.index(kernel), ctypes.c_int64(e.most_bytes)
        schedule = e.backwards, e.one_warp_ahead, e.late_copies
        _library().run_dynamic_mixing(ctypes.byref(self.params), *numbers, *map(int, schedule))


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, emulated, x, compressed, weight, bias, segments, dim):
        call, guarded = _Call(emulated, x, compressed, weight, bias, segments, dim), Guarded()
        mixed = guarded.empty(*x.shape, dtype=x.dtype)
        sums = guarded.empty(x.shape[0], x.shape[3 - dim], x.shape[3], dtype=torch.float32)
        call.run("forward", mixed=call.view(mixed, segments), line_sums=sums.data_ptr())
        guarded.check()
        ctx.save_for_backward(x, compressed, weight, bias)
        ctx.options = emulated, segments, dim
        ctx.set_materialize_grads(False)
        return mixed.clone(), sums.clone()

    @staticmethod
    def backward(ctx, grad_mixed, grad_sums):
        x, compressed, weight, bias = ctx.saved_tensors
        emulated, segments, dim = ctx.options
        _, *needed, _, _ = ctx.needs_input_grad
        call, guarded = _Call(emulated, x, compressed, weight, bias, segments, dim), Guarded()
        grad_mixed = torch.zeros_like(x) if grad_mixed is None else grad_mixed
        grad_mixed = grad_mixed if grad_mixed.stride(3) == 1 else grad_mixed.contiguous()
        call.params.grad_mixed = call.view(grad_mixed, segments)
        if grad_sums is not None:  # the same for all lines of an image
            grad_mean = grad_sums[:, 0].contiguous()
            call.params.grad_mean = grad_mean.data_ptr()
        grad_x, grad_compressed = (guarded.empty(*t.shape, dtype=t.dtype) for t in (x, compressed))
        partial = [guarded.empty(emulated.splits, *t.shape, dtype=torch.float32) for t in (weight, bias)]
        if needed[0]:
            call.run("grad_x", grad_x=call.view(grad_x, segments))
        if needed[1]:
            call.run("grad_compressed", grad_compressed=call.view(grad_compressed, segments))
        if needed[2] or needed[3]:
            call.run("grad_weight", grad_weight=partial[0].data_ptr(), grad_bias=partial[1].data_ptr())
        guarded.check()
        grads = grad_x.clone(), grad_compressed.clone(), *(p.sum(0).to(x.dtype) for p in partial)
        return None, *(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)), None, None
