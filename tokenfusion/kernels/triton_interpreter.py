"""Triton's interpreter, which runs kernels on a CPU where TRITON_INTERPRET=1, with what it lacks beside NumPy 2.4."""

import functools


@functools.cache
def mend() -> None:
    """Let a loop in a kernel end at a number that the kernel computed, as Triton 3.9 does by itself.

    The interpreter holds that number as an array of one element, of which NumPy 2.4 makes no index. And it looks
    through the whole language at each call of a function in a kernel, which takes as long as what the kernel does.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch_lang_tensor = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)


def _once_a_launch(patch):
    """patch, called once for the functions of a module until what the launch's first call returned is restored."""
    seen = set()

    def patch_once(function):
        if function.__module__ in seen:
            return None
        scope, first = patch(function), not seen
        seen.add(function.__module__)
        if first:
            restore = scope.restore

            def restore_and_forget():
                seen.clear()
                restore()

            scope.restore = restore_and_forget
        return scope

    return patch_once
