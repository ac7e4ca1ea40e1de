"""Triton's interpreter, which runs kernels on a CPU where TRITON_INTERPRET=1, with what it lacks beside NumPy 2.4."""

import functools


@functools.cache
def mend() -> None:
    """Let a loop in a kernel end at a number that the kernel computed, as Triton 3.9 does by itself.

    The interpreter holds that number as an array of one element, of which NumPy 2.4 makes no index.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch_lang_tensor = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index
