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
    _patch_once_a_launch(interpreter)


def _patch_once_a_launch(interpreter) -> None:
    """Within a launch, a further call of a function of the same module finds the language as it needs it."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] | None = None  # modules, of the launch under way

    def patch_once(function):
        if patched is not None and function.__module__ in patched:
            return None
        scope = patch(function)
        if patched is not None:
            patched.add(function.__module__)
        return scope

    def launch_of_its_own(self, *args, **kwargs):
        nonlocal patched
        before, patched = patched, set()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched = before

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_of_its_own
