"""Which backend runs an operator, and why the others do not.

Every operator offers one `Implementation` per backend. Each can say for a given call why it cannot run; the same
answer picks a backend under "auto", explains an error when a backend was asked for by name, and fills
`tokenfusion info`.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace as symbolic_trace
from torch.fx.experimental.symbolic_shapes import has_static_value

from tokenfusion import measure
from tokenfusion.kernels import choices, extension, triton_support
from tokenfusion.kernels.choices import Workload, Workloads

BACKENDS = ("reference", "cpu", "triton", "cuda")
_CHOICES = ("auto", *BACKENDS)
_DTYPES = {dtype: str(dtype).removeprefix("torch.") for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

_log = logging.getLogger("tokenfusion")
_logged: set[tuple[str, str]] = set()
_advised = False


class CannotRun(RuntimeError):
    """The backend asked for by name cannot take a call."""


def _name(backend: str, form: str) -> str:
    return f"{backend}:{form}" if form else backend


@dataclass(frozen=True)
class Implementation:
    """One backend's form of an operator.

    can_run takes the operator's tensors and returns None, or the reason why this backend cannot take them.
    automatic says whether "auto" may pick it without a measurement on this machine (see `choices`): a GPU kernel enters
    once a record in benchmarks/records/ supports it. form names another way of the same backend, which nothing but a
    measurement picks.
    """

    backend: str
    run: Callable
    can_run: Callable[..., str | None]
    automatic: bool = True
    form: str = ""
    name: str = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "name", _name(self.backend, self.form))


@dataclass(frozen=True)
class Operator:
    """An operator's implementations, fastest first; the reference is last and takes every valid call.

    Under a transform it alone runs: PyTorch's own operators can be exported, traced, batched and differentiated anyhow.
    supporting says that the operator is a step of a layer rather than the reason to choose a backend: its reference
    runs where the backend asked for by name cannot. workloads tells its calls apart for `choices`, whose table goes
    before the order.
    """

    name: str
    implementations: tuple[Implementation, ...]
    supporting: bool = False
    workloads: Workloads | None = None

    def select(self, *tensors) -> Implementation:
        """The implementation to run for these tensors under the backend in force.

        Raises:
            CannotRun: the backend asked for by name cannot run them; the message says why.
        """
        choice = _chosen()
        measured = self._measured(tensors) if choice == "auto" and self.workloads is not None else None
        if measured is None:
            return self._first(choice, tensors)
        if not torch.compiler.is_compiling():
            self._tell(measured, [], tensors)
        return measured

    def select_in_order(self, *tensors) -> Implementation:
        """`select`, whatever was measured."""
        return self._first(_chosen(), tensors)

    def _first(self, choice: str, tensors: tuple) -> Implementation:
        """That can run, of those of a backend, or of all."""
        reasons = []
        for implementation in self.implementations:
            if implementation.form:
                continue
            if implementation.backend == choice or (choice == "auto" and implementation.automatic):
                reason = implementation.can_run(*tensors) or self._why_refused(choice, implementation)
                if reason is None:
                    if not torch.compiler.is_compiling():
                        self._tell(implementation, reasons, tensors)
                        if choice == "auto" and not _advised:
                            self._advise(implementation, tensors)
                    return implementation
                reasons.append(f"{implementation.backend}: {reason}")
        if self.supporting:
            return self.implementations[-1]
        if not reasons:
            reasons.append(f"{choice}: {self.name} has no {choice} implementation")
        raise CannotRun(f"tokenfusion.{self.name}: backend {choice!r} cannot run here: {'; '.join(reasons)}")

    def _why_refused(self, choice: str, implementation: Implementation) -> str | None:
        """Of one that was not asked for by name; the reference is what others are compared with."""
        if choice != "auto" or choices.is_empty() or implementation is self.implementations[-1]:
            return None
        refused = choices.is_refused(self.name, implementation.name)
        return "`tokenfusion tune` found it wrong on this machine" if refused else None

    def _measured(self, tensors: tuple) -> Implementation | None:
        """What the table of this machine says, if anything, and if that can run."""
        if choices.is_empty():
            return None
        workload = self.workload(*tensors)
        if torch.compiler.is_compiling():
            name = choices.constant_choice(*workload) if all(map(has_static_value, workload.sizes)) else None
        else:
            name = choices.in_force().choice(workload)
        if name is None:
            return None
        for implementation in self.implementations:
            if implementation.name == name and not choices.is_refused(self.name, name):
                return implementation if implementation.can_run(*tensors) is None else None
        return None

    def _advise(self, chosen: Implementation, tensors: tuple) -> None:
        """Says once in a process that a GPU kernel waits for its proof."""
        global _advised
        if chosen.backend != "reference" or not _on_gpu(tensors):
            return
        waiting = [each.backend for each in self.implementations if not each.automatic and not each.can_run(*tensors)]
        if waiting:
            _advised = True
            kernels = " and ".join(dict.fromkeys(waiting))
            _log.warning(
                "%s: PyTorch's code runs on this GPU, as nobody has proven and timed the %s kernels on it; "
                "`tokenfusion tune` does, and has the faster ones used",
                self.name,
                kernels,
            )

    def workload(self, *tensors) -> Workload:
        """What `choices` goes by, of a call of these tensors."""
        words, sizes = self.workloads.of(*tensors)
        direction = "inference"
        if torch.is_grad_enabled():
            for tensor in tensors:
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    direction = "training"
        return Workload(self.name, (_DTYPES[tensors[0].dtype], direction, *words), sizes)

    def _tell(self, chosen: Implementation, reasons: list[str], tensors: tuple) -> None:
        """Log why faster backends could not run, and note the choice where `observe` asks for it."""
        if reasons:
            _log_once(self.name, chosen.backend, reasons)
        noted = _noted.get()
        if noted is not None:
            why_not = {each.backend: each.can_run(*tensors) for each in self.implementations if not each.form}
            workload = None if self.workloads is None else self.workload(*tensors)
            noted.append(Choice(self.name, chosen.backend, why_not, workload, chosen.form))


@dataclass(frozen=True)
class Choice:
    """The backend that a call of an operator from Python was given to, and for each why it could not have been.

    form is that of the `Implementation`.
    """

    operator: str
    backend: str
    why_not: dict[str, str | None]
    workload: Workload | None = None
    form: str = ""

    @property
    def name(self) -> str:
        """That of the `Implementation`."""
        return _name(self.backend, self.form)


@dataclass(frozen=True)
class Observation:
    """What `observe` saw, in order.

    ran: (operator, backend) of every kernel, in backward passes ("<operator>_backward") and compiled code, too. The
    reference is plain PyTorch and no kernel. choices: of every call from Python, the reference included.
    """

    ran: list[tuple[str, str]] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)


@contextlib.contextmanager
def observe() -> Iterator[Observation]:
    """Sees which backends run in a with-block, in this thread or task; `ran` is filled at its end.

    By PyTorch's profiler, which sees kernels whoever calls them; where code compiles, those of the compiler's trials.
    Without an observer nothing is recorded.
    """
    seen = Observation()
    token = _noted.set(seen.choices)
    try:
        with measure.profiler() as profile:
            yield seen
    finally:
        _noted.reset(token)
    prefix = "tokenfusion::"
    names = [event.name.removeprefix(prefix) for event in profile.function_events if event.name.startswith(prefix)]
    seen.ran.extend((operator, backend) for operator, _, backend in (name.rpartition("_") for name in names))


def transform() -> str | None:
    """What looks at this call rather than just running it: exporting, tracing or a function transform; None for a plain
    call, compiled or not."""
    if torch.compiler._is_exporting_flag:  # is_exporting() says True in compiled code, too, in torch 2.11
        return "torch.export"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return _unguarded_transform()


@torch.compiler.assume_constant_result  # dynamo guards on torch.func by itself, and lets no tracer into compiled code
def _unguarded_transform() -> str | None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    return "torch.fx" if symbolic_trace._is_fx_tracing_flag else None


OPERATORS: dict[str, Operator] = {}


def register(
    name: str, *implementations: Implementation, supporting: bool = False, workloads: Workloads | None = None
) -> Operator:
    OPERATORS[name] = Operator(name, implementations, supporting, workloads)
    return OPERATORS[name]


def _chosen() -> str:
    return get_backend() if transform() is None else "reference"


def _on_gpu(tensors: tuple) -> bool:
    return isinstance(tensors[0], torch.Tensor) and tensors[0].is_cuda


def _log_once(name: str, chosen: str, reasons: list[str]) -> None:
    for reason in reasons:
        if (name, reason) not in _logged:
            _logged.add((name, reason))
            _log.info("%s runs on %s; not on %s", name, chosen, reason)


def _validated(name: str) -> str:
    if name not in _CHOICES:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(map(repr, _CHOICES))}")
    return name


def set_backend(name: str) -> None:
    """Choose the backend of every operator, for the whole process; `backend` goes before it where it is in force.

    Args:
        name: "auto" (the fastest that can run each call), or "reference", "cpu", "triton", "cuda"; one chosen by
            name raises where it cannot run. The variable TOKENFUSION_BACKEND sets the choice at import.

    Raises:
        ValueError: an unknown name.
    """
    global _of_process
    _of_process = _validated(name)


def get_backend() -> str:
    """The backend in force in this thread or task, as `set_backend` takes it."""
    if torch.compiler.is_compiling():  # dynamo traces no ContextVar
        return _while_compiling or _this_module.in_force
    return _in_force()


def process_backend() -> str:
    """What `set_backend` chose."""
    return _of_process


def _in_force() -> str:
    return _of_task.get() or _of_process


def __getattr__(name: str) -> str:
    """in_force, the backend as an attribute: dynamo guards on attributes, looking them up before each call."""
    if name == "in_force":
        return _in_force()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Chooses the backend for the length of a with-block, and for this thread or asyncio task alone.

    A task that the block creates inherits the choice, a thread does not. Nor do those that autograd has for GPUs: where
    layers compute their forward pass again in the backward pass (activation checkpointing), use `set_backend`.

    Args:
        name: as of `set_backend`.

    Raises:
        ValueError: an unknown name.
    """
    global _while_compiling
    _validated(name)
    if torch.compiler.is_compiling():
        previous, _while_compiling = _while_compiling, name
        try:
            yield
        finally:
            _while_compiling = previous
    else:
        token = _of_task.set(name)
        try:
            yield
        finally:
            _of_task.reset(token)


def backends() -> dict[str, str | None]:
    """What can run on this machine: backend name -> None, or the reason why not."""
    return {
        "reference": None,
        "cpu": extension.why_not(),
        "triton": triton_support.why_not(),
        "cuda": extension.why_not_cuda(),
    }


_this_module = sys.modules[__name__]
_of_process = "auto"
_of_task: ContextVar[str | None] = ContextVar("tokenfusion.backend", default=None)
_noted: ContextVar[list[Choice] | None] = ContextVar("tokenfusion.choices", default=None)
_while_compiling: str | None = None  # chosen within the code that dynamo traces
if os.environ.get("TOKENFUSION_BACKEND"):
    try:
        set_backend(os.environ["TOKENFUSION_BACKEND"])
    except ValueError as error:
        raise ValueError(f"environment variable TOKENFUSION_BACKEND: {error}") from None
