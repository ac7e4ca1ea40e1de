"""Where a test of Triton kernels runs them: on a GPU, or in the interpreter."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch

from tokenfusion.kernels import triton_support

DEVICE = "cpu" if triton_support.INTERPRET else "cuda"
DTYPES = (torch.float32, torch.float16, *([] if triton_support.INTERPRET else [torch.bfloat16]))  # wrong there


@contextlib.contextmanager
def rounding_as_a_gpu(seed: int) -> Iterator[None]:
    """The interpreter rounds in float32 as compiled kernels do.

    NumPy adds up products in some order, and has exact functions. A GPU without matrix units adds one product after
    the other, each rounded once with the sum; of ex2.approx and rsqrt.approx the PTX ISA says how wrong they may be.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    generator = np.random.default_rng(seed)

    def fused(x, y, z):
        return (x.astype(np.float64) * y + z).astype(np.float32)

    def off(values, by):
        return (values * (1 + by * generator.choice((-1.0, 1.0), values.shape))).astype(np.float32)

    def dot(self, a, b, d, *options):
        if d.data.dtype != np.float32 or a.data.dtype != np.float32:
            return exact_dot(self, a, b, d, *options)
        total = d.data
        for k in range(a.data.shape[-1]):
            total = fused(a.data[..., k : k + 1], b.data[..., k : k + 1, :], total)
        return TensorHandle(total, d.dtype.scalar)

    def fma(self, x, y, z):
        return TensorHandle(fused(x.data, y.data, z.data), z.dtype.scalar)

    def exp(self, x):
        return TensorHandle(off(np.exp2(x.data * np.float32(np.log2(np.e))), 2.0**-22), x.dtype.scalar)

    def rsqrt(self, x):
        return TensorHandle(off(1 / np.sqrt(x.data.astype(np.float64)), 2.0**-22.9), x.dtype.scalar)

    exact_dot = InterpreterBuilder.create_dot
    rounded = dict(create_dot=dot, create_fma=fma, create_exp=exp, create_rsqrt=rsqrt)
    with mock.patch.multiple(InterpreterBuilder, **rounded):
        yield
