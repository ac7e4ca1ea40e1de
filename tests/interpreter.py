"""Triton's interpreter beside NumPy 2.4, which Triton before 3.9 does not know; a test of Triton kernels imports this."""

from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_with_index(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # a loop bound is an array [1]


if hasattr(interpreter, "_LangPatchScope"):
    interpreter._patch_lang_tensor = _patch_with_index
