"""Where a test of Triton kernels runs them: on a GPU, or in the interpreter, mended for NumPy 2.4 before Triton 3.9."""

import torch
from triton.runtime import interpreter

from tokenfusion.kernels import triton_support

DEVICE = "cpu" if triton_support.INTERPRET else "cuda"
DTYPES = (torch.float32, torch.float16, *([] if triton_support.INTERPRET else [torch.bfloat16]))  # wrong there

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_with_index(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # a loop bound is an array [1]


if hasattr(interpreter, "_LangPatchScope"):
    interpreter._patch_lang_tensor = _patch_with_index
