"""What a benchmark is made of: one case, computed in several ways."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

import tokenfusion
from benchmarks.report.table import (  # noqa: F401
    AND_COMPILE,
    AUTOTUNED,
    CHECKPOINTED,
    COMPILED,
    EAGER,
    EPILOGUE,
    FLEX,
    PROJECTIONS,
)
from tokenfusion.kernels.dispatch import OPERATORS

FORWARD = "forward"
TRAINING = "forward + backward"
AUTOMATIC = "auto"
_AUTOTUNE = "max-autotune-no-cudagraphs"  # graphs are left to the timing
without: set[tuple[str, str]] = set()  # (operator, backend) that are not to be run; "upconv" stands for all of them


class CaseBase:
    """What the cases have in common: dataclasses of sizes, with a dtype and a direction beside them."""

    dtype: str
    direction: str

    def __str__(self) -> str:
        words = (f"{name}{value}" if isinstance(value, int) else value for name, value in self.sizes().items())
        return "-".join(words).replace(" + ", "+").replace(" ", "-")

    @property
    def backward(self) -> bool:
        return self.direction == TRAINING

    @property
    def torch_dtype(self) -> torch.dtype:
        return dtype_of(self.dtype)

    def sizes(self) -> dict[str, int | str]:
        return asdict(self)


@dataclass(frozen=True)
class Variant:
    """One way of computing a case.

    call takes one set of inputs and returns a tuple of tensors. backend is the backend of this package that has to
    run, None for code of others, and AUTOMATIC for whatever this machine's table chooses. comparable turns eager's
    results into those of this variant, where they differ.
    A variant that is another network stands beside eager for its time and memory alone: its results are not compared.
    """

    name: str
    call: Callable[..., tuple[torch.Tensor, ...]]
    backend: str | None = None
    comparable: Callable[[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]] = lambda results: results
    another_network: bool = False


@dataclass(frozen=True)
class Problem:
    """One case with everything needed to check and to time it.

    case names the sizes, as the tables show them. make_inputs returns a fresh set of inputs. reference takes such a
    set in float64 and returns what the variants do; it may leave out the end of a batch. The first variant is eager.
    moved is the bytes that must move, written whether some of them are written, flops the arithmetic that must be
    done. make_checked returns the inputs on which results are compared, where they have to be special ones.
    """

    group: str
    case: dict[str, int | str]
    variants: list[Variant]
    make_inputs: Callable[[], tuple[torch.Tensor, ...]]
    reference: Callable[..., tuple[torch.Tensor, ...]]
    moved: int
    written: bool
    flops: int
    make_checked: Callable[[], tuple[torch.Tensor, ...]] | None = None


@dataclass(frozen=True)
class SmallCall:
    """A call of an operator, function(*tensors), on shapes small enough for thousands of repeats and for checkers.

    label says what is special about it. Tensors are on the CPU, None where one is absent; those that require gradients
    get them.
    """

    operator: str
    label: str
    function: Callable[..., torch.Tensor]
    tensors: tuple[torch.Tensor | None, ...]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


def package(backend: str) -> str:
    """The name of this package's variant."""
    return f"tokenfusion ({backend})"


def compiled(function: Callable, mode: str = "default") -> Callable:
    """torch.compile for the shapes of one case."""
    return torch.compile(function, dynamic=False, mode=mode)


def forward(function: Callable) -> Callable[..., tuple[torch.Tensor, ...]]:
    @torch.no_grad()
    def call(*inputs):
        return (function(*inputs),)

    return call


def forward_backward(function: Callable, parameters=()) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A call of (*tensors, gradient of the output) that returns the output and the gradients of all the rest."""
    parameters = list(parameters)

    def call(*inputs):
        *tensors, grad_output = inputs
        output = function(*tensors)
        return output, *torch.autograd.grad(output, [*tensors, *parameters], grad_output)

    return call


def passes(function: Callable, backward: bool, parameters: Iterable[torch.Tensor] = ()) -> Callable:
    """`forward` of a function, or `forward_backward` with gradients of the parameters, a module's own among them."""
    if isinstance(function, nn.Module):
        parameters = [*function.parameters(), *parameters]
    return forward_backward(function, parameters) if backward else forward(function)


def on_reference(call: Callable) -> Callable:
    """A call whose operators of this package are its plain PyTorch ones."""

    def with_reference(*inputs):
        with tokenfusion.backend("reference"):
            return call(*inputs)

    return with_reference


def variants(
    timed: Callable[[Callable], Callable],
    eager: Callable,
    fused: Callable,
    backends: Sequence[str],
    *,
    compiles: Collection[str],
    others: Sequence[Variant] = (),
) -> list[Variant]:
    """What stands beside each other in most cases: eager, torch.compile of it, others, and this package's.

    Args:
        timed: makes of a function or module what is timed.
        backends: this package's function runs on each.
        compiles: of "eager" and "fused" those that are measured under torch.compile, too; "autotuned" is eager under
            it where it tunes, for minutes.
    """
    found = [Variant(EAGER, timed(eager))]
    if "eager" in compiles:
        found.append(Variant(COMPILED, timed(compiled(eager))))
    if "autotuned" in compiles:
        found.append(Variant(AUTOTUNED, timed(compiled(eager, _AUTOTUNE))))
    found += others
    for backend in backends:
        found.append(Variant(package(backend), timed(fused), backend))
        if "fused" in compiles:
            found.append(Variant(package(backend) + AND_COMPILE, timed(compiled(fused)), backend))
    return found


def backends_for(operator: str, *tensors: torch.Tensor) -> list[str]:
    """The backends that can run an operator on these tensors, fastest first."""
    built_in = (each for each in OPERATORS[operator].implementations if not each.form)
    can_run = (each.backend for each in built_in if each.can_run(*tensors) is None)
    return [backend for backend in can_run if not is_left_out(operator, backend)]


def is_left_out(operator: str, backend: str) -> bool:
    return any(operator.startswith(name) and backend == other for name, other in without)


def kernels_for(operator: str, *tensors: torch.Tensor) -> list[str]:
    """The backends with a kernel of their own, or the reference where there is none."""
    return [name for name in backends_for(operator, *tensors) if name != "reference"] or ["reference"]
