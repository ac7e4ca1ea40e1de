"""Where a test of Triton kernels runs them: on a GPU, or in the interpreter."""

import torch

from tokenfusion.kernels import triton_support

DEVICE = "cpu" if triton_support.INTERPRET else "cuda"
DTYPES = (torch.float32, torch.float16, *([] if triton_support.INTERPRET else [torch.bfloat16]))  # wrong there
