"""Every GPU kernel on small shapes, each operator as its benchmarks' cases.small_calls say.

python -m benchmarks.gpu_check.kernels once: each kernel once in each dtype and direction, for memory and race checkers.
python -m benchmarks.gpu_check.kernels repeats: the same call again and again has to give the same bits.

A line for each call; the exit status is 1 where one fails, or where an operator has no small calls.
"""

import argparse
import importlib
import itertools
import pkgutil
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

import tokenfusion
from benchmarks import ops
from benchmarks.measure.problem import SmallCall
from tokenfusion.kernels import triton_support
from tokenfusion.kernels.dispatch import OPERATORS, CannotRun

GPU_BACKENDS = ("triton", "cuda")
DEVICE = "cpu" if triton_support.INTERPRET else "cuda"
DTYPES = (torch.float32, torch.float16, *([] if triton_support.INTERPRET else [torch.bfloat16]))
_COMPARED_AT_ONCE = 100


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


def _runnable() -> Iterator[tuple[str, str, SmallCall]]:
    """(name, backend, call) of what can run here; prints what cannot."""
    obstacles = {(name, backend): why_not(name, backend) for name in OPERATORS for backend in gpu_backends(name)}
    for (name, backend), reason in obstacles.items():
        if reason is not None:
            print(f"{name}, {backend}: not run: {reason}")
    for dtype in DTYPES:
        for call in small_calls(dtype):
            for backend in gpu_backends(call.operator):
                if obstacles[call.operator, backend] is None:
                    yield f"{call.operator}, {backend}, {dtype}, {call.label}", backend, call


def _check(action: Callable[..., str], seconds: float) -> int:
    """Every call; the time that is left is shared by those that are left."""
    failures = [f"{name}: no small_calls in benchmarks/ops/*/cases.py" for name in without_small_calls()]
    end = time.monotonic() + seconds
    calls, ran = list(_runnable()), 0
    for i, (name, backend, call) in enumerate(calls):
        try:
            with tokenfusion.backend(backend):
                result = action(call, on_device(call), seconds=(end - time.monotonic()) / (len(calls) - i))
            print(f"{name}: {result}", flush=True)
            ran += 1
        except CannotRun as reason:
            print(f"{name}: not run: {reason}")
        except Exception as error:  # noqa: BLE001  (one kernel that fails leaves the others to be checked)
            failures.append(f"{name}: {type(error).__name__}: {error}")
    print("\n".join([*failures, f"{ran} calls of kernels ran, {len(failures)} failed"]))
    return 1 if failures or not ran else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.kernels")
    parser.add_argument("what", choices=("once", "repeats"))
    parser.add_argument("--count", type=int, default=10_000, help="repeats of a call (default: 10000)")
    parser.add_argument("--seconds", type=float, default=60, help="for all repeats together (default: 60)")
    args = parser.parse_args(arguments)
    return _check(once if args.what == "once" else partial(repeats, count=args.count), args.seconds)


if __name__ == "__main__":
    raise SystemExit(main())
