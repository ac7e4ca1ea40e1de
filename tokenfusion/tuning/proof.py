"""Whether an implementation is right on this machine: parity with float64, the same bits again, memory left alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tokenfusion import precision
from tokenfusion.kernels.choices import Workload, Workloads
from tokenfusion.kernels.dispatch import Implementation, Operator
from tokenfusion.tuning import parity

_GUARD = 256  # elements of NaN before and behind every operand


class Maker:
    """Makes operands of a workload, the same ones again for the same seed, each between guards."""

    def __init__(self, dtype: torch.dtype, device: str, trains: bool):
        self.dtype, self.device, self.trains = dtype, device, trains
        self.guards: list[torch.Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    def __call__(
        self,
        *shape: int,
        scale: float = 1.0,
        gradient: bool = True,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> torch.Tensor:
        values = (scale * torch.randn(shape, generator=self._generator)).contiguous(memory_format=memory_format)
        memory = torch.full((values.numel() + 2 * _GUARD,), torch.nan, dtype=self.dtype, device=self.device)
        self.guards += memory[:_GUARD], memory[-_GUARD:]
        operand = memory.as_strided(values.shape, values.stride(), _GUARD).copy_(values)
        return operand.detach().requires_grad_(self.trains and gradient)

    @property
    def intact(self) -> bool:
        return all(guard.isnan().all() for guard in self.guards)


@dataclass(frozen=True)
class Call:
    """A call of an operator's implementations; selecting are those operands by which they are selected."""

    operands: tuple
    selecting: tuple
    maker: Maker

    def run(self, implementation: Implementation) -> tuple[torch.Tensor, ...]:
        """The result, and in training the gradients."""
        results = self._forward(implementation)
        if self.maker.trains:
            return self._backward(results, self._gradients(results))
        return tuple(result.clone() for result in results)  # an operand may be where it is written to

    def timed(self, implementation: Implementation) -> Callable[[], object]:
        """`run` as often as wanted, with gradients that are there beforehand."""
        if not self.maker.trains:
            return lambda: self._forward(implementation)
        gradients = self._gradients(self._forward(implementation))
        return lambda: self._backward(self._forward(implementation), gradients)

    def in_float64(self) -> "Call":
        return replace(self, operands=tuple(map(_in_float64, self.operands)))

    def _forward(self, implementation: Implementation) -> tuple[torch.Tensor, ...]:
        with torch.set_grad_enabled(self.maker.trains):
            out = implementation.run(*self.operands)
        return tuple(each for each in (out if isinstance(out, tuple) else (out,)) if each.numel())

    def _backward(self, results: tuple, gradients: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        tensors = [each for each in self.operands if isinstance(each, torch.Tensor) and each.requires_grad]
        return *(result.detach() for result in results), *torch.autograd.grad(results, tensors, gradients)

    def _gradients(self, results: tuple) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(r.shape, generator=generator).to(self.maker.dtype).to(r.device, r.dtype) for r in results]


def call_of(operator: Operator, workload: Workload, device: str) -> Call:
    """
    Raises:
        ValueError: a workload that the operator cannot have.
    """
    dtype, direction, *words = workload.kind
    maker = Maker(getattr(torch, dtype), device, direction == "training")
    workloads: Workloads = operator.workloads
    operands = workloads.example(tuple(words), workload.sizes, maker)
    return Call(operands, operands[: workloads.selecting], maker)


@dataclass(frozen=True)
class Expected:
    """What the reference gives for a call, and what it gives in float64."""

    eager: tuple[torch.Tensor, ...]
    exact: tuple[torch.Tensor, ...]


def expected(call: Call, reference: Implementation) -> Expected:
    """All products in IEEE float32, whatever is in force."""
    with precision.ieee():
        return Expected(call.run(reference), call.in_float64().run(reference))


def why_wrong(call: Call, implementation: Implementation, expected: Expected) -> str | None:
    """What is wrong with an implementation, or None; all products in IEEE float32, whatever is in force.

    Raises:
        RuntimeError, MemoryError: there is too little memory for it, which says nothing about its results.
    """
    try:
        with precision.ieee():
            results = call.run(implementation)
            again = call.run(implementation)
    except Exception as error:  # noqa: BLE001  (whatever a broken kernel raises, it is refused)
        if ran_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
    if not all(map(_same_bits, results, again)):
        return "it gives other bits when it is called again"
    if not call.maker.intact:
        return "it writes outside of its operands"
    found = parity.compare(results, expected.eager, expected.exact)
    if not found.passes:
        return f"relative error {found.error:.1e}, allowed {found.allowed:.1e}"
    return None


def ran_out_of_memory(error: Exception) -> bool:
    """PyTorch's allocator for CPUs raises a RuntimeError like any other."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _in_float64(operand):
    if not isinstance(operand, torch.Tensor) or not operand.is_floating_point():
        return operand
    return operand.detach().double().requires_grad_(operand.requires_grad)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
