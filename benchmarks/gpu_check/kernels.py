"""Every GPU kernel on small shapes, each operator as its benchmarks' cases.small_calls say.

python -m benchmarks.gpu_check.kernels once: each kernel once in each dtype and direction, for memory and race checkers.
python -m benchmarks.gpu_check.kernels repeats: the same call again and again has to give the same bits.

A line for each call; the exit status is 1 where one fails.
"""

import argparse
import importlib
import itertools
import pkgutil
import time
from collections.abc import Callable
from functools import partial

import torch

import tokenfusion
from benchmarks import ops
from benchmarks.gpu_check import program
from benchmarks.measure.problem import SmallCall
from benchmarks.report.table import GPU_BACKENDS
from tokenfusion.kernels import triton_support
from tokenfusion.kernels.dispatch import OPERATORS, CannotRun

DEVICE = "cpu" if triton_support.INTERPRET else "cuda"
DTYPES = (torch.float32, torch.float16, *([] if triton_support.INTERPRET else [torch.bfloat16]))
_COMPARED_AT_ONCE = 100
_MOST_SECONDS = 30  # of the repeats of a call


def small_calls(dtype: torch.dtype) -> list[SmallCall]:
    """The small calls of every operator that has some, in benchmarks/ops/<op>/cases.py."""
    folders = [module.name for module in pkgutil.iter_modules(ops.__path__)]
    modules = [importlib.import_module(f"{ops.__name__}.{name}.cases") for name in folders]
    return list(itertools.chain(*(module.small_calls(dtype) for module in modules)))


def without_small_calls() -> list[str]:
    """Operators with a GPU kernel and no small calls, which nothing here would check."""
    covered = {call.operator for call in small_calls(torch.float32)}
    return [name for name in OPERATORS if name not in covered and gpu_backends(name)]


def gpu_backends(operator: str) -> list[str]:
    built_in = [each for each in OPERATORS[operator].implementations if not each.form]
    return [each.backend for each in built_in if each.backend in GPU_BACKENDS]


def on_device(call: SmallCall) -> tuple[torch.Tensor | None, ...]:
    """The tensors of a call, on the GPU, with the strides that they have; a slice stays a slice."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor.detach() if tensor._base is None else tensor._base.detach()
        copied = base.to(DEVICE).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return copied.requires_grad_(tensor.requires_grad)

    return tuple(None if t is None else moved(t) for t in call.tensors)


def with_gradients(call: SmallCall, tensors: tuple[torch.Tensor | None, ...], grad: torch.Tensor | None = None):
    """The result, and the gradients of what requires them for a gradient of the result that varies with its place."""
    result = call.function(*tensors)
    if grad is None:
        grad = torch.linspace(-1, 1, result.numel(), device=result.device).view_as(result).to(result.dtype)
    present = [t for t in tensors if t is not None and t.requires_grad]
    return [result.detach(), *torch.autograd.grad(result, present, grad)]


def why_not(operator: str, backend: str) -> str | None:
    """None where a backend can run an operator here, otherwise the reason."""
    if backend not in gpu_backends(operator):
        return f"{operator} has no {backend} implementation"
    return tokenfusion.backends()[backend]


def once(call: SmallCall, tensors, seconds: float) -> str:
    with_gradients(call, tensors)
    _synchronize()
    return "ran"


def repeats(call: SmallCall, tensors, count: int, seconds: float) -> str:
    """Bit by bit; as many repeats as asked for, or as the time allows.

    Raises:
        AssertionError: a repeat differs.
    """
    first = with_gradients(call, tensors)
    differing = torch.zeros((), dtype=torch.int64, device=first[0].device)
    end = time.monotonic() + seconds
    for done in range(1, count + 1):
        for tensor, expected in zip(with_gradients(call, tensors), first, strict=True):
            differing += (tensor != expected).any()
        if done % _COMPARED_AT_ONCE == 0 and time.monotonic() > end:
            break
    assert differing == 0, f"{differing.item()} results of {done} repeats differ"
    return f"{done} repeats, all bit-equal"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _checks(args: argparse.Namespace) -> dict[str, Callable[[int], str]]:
    """The time that is left is shared by the calls that are left."""
    end = time.monotonic() + args.seconds
    action = once if args.what == "once" else partial(repeats, count=args.count)

    def check(call: SmallCall, backend: str, left: int) -> str:
        reason = why_not(call.operator, backend)
        if reason is not None:
            raise program.Skipped(reason)
        try:
            with tokenfusion.backend(backend):
                return action(call, on_device(call), seconds=min((end - time.monotonic()) / left, _MOST_SECONDS))
        except CannotRun as obstacle:
            raise program.Skipped(str(obstacle)) from None

    return {
        f"{call.operator}, {backend}, {dtype}, {call.label}": partial(check, call, backend)
        for dtype in DTYPES
        for call in small_calls(dtype)
        for backend in gpu_backends(call.operator)
        if program.is_chosen(args, call.operator, backend)
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.kernels")
    parser.add_argument("what", choices=("once", "repeats"))
    parser.add_argument("--count", type=int, default=10_000, help="repeats of a call (default: 10000)")
    parser.add_argument("--seconds", type=float, default=60, help="for all repeats together (default: 60)")
    program.add_options(parser)
    args = parser.parse_args(arguments)
    return program.run(args, _checks(args))


if __name__ == "__main__":
    raise SystemExit(main())
