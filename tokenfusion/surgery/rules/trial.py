"""Trying out whether a module of somebody else's class computes what its fused form does."""

import contextlib
import copy
import functools
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenfusion.kernels import dispatch
from tokenfusion.layers.drop_in import DropIn
from tokenfusion.layers.found import Agreement
from tokenfusion.layers.watched import UsedParts, attribute, watch_all, why_not_all_as_before

Inputs = tuple[torch.Tensor, ...]
Forward = Callable[..., Any]  # of a module, its inputs and its keywords
_TOLERANCE = 1e-6  # relative, in float64, in which a forward may compute its softmax in float32
_TOLERANCE_OF_FLOAT64 = 1e-11  # of one that does not
_TOLERANCE_OF_FLOAT32 = 1e-4
_TOLERANCE_OF_HALF = 0.1
_LARGE = 1e6
_MOST_NUMBERS = 100
_alone = threading.RLock()
_MARKS = {0.0, 1.0, -1.0, -100.0}  # what a token of padding is made of


class Draws:
    """Normal random numbers in float64, the same in every trial."""

    def __init__(self):
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64, device="cpu")


@contextlib.contextmanager
def without_a_trace() -> Iterator[None]:
    """A trial within takes random numbers from nobody, and needs nothing of its surroundings.

    One at a time: another thread's would change this one's random numbers.
    """
    with _alone:
        of_python, of_numpy = _states()
        try:
            with torch.random.fork_rng(devices=[]), torch.inference_mode(False), dispatch.backend("reference"):
                yield
        finally:
            random.setstate(of_python)
            if of_numpy is not None:
                _numpy().set_state(of_numpy)


def _numpy():
    """Its random numbers, where somebody has imported it."""
    return sys.modules.get("numpy.random")


def _states() -> tuple:
    """Of the random numbers of Python and of NumPy."""
    return random.getstate(), _numpy() and _numpy().get_state()


def _seed() -> None:
    torch.default_generator.manual_seed(0)  # those of GPUs are somebody else's
    random.seed(0)
    if _numpy() is not None:
        _numpy().seed(0)


def with_drawn_parameters(module: nn.Module, drawn: Draws) -> nn.Module:
    """A copy for evaluation, in float64 and without hooks, whose linear layers keep the size of what they take."""
    plain = _without_hooks(copy.deepcopy(module)).to_empty(device="cpu").double().eval()
    for name, tensor in (*plain.named_parameters(), *plain.named_buffers()):  # not all buffers are in the state_dict
        tensor.data.copy_(_drawn_like(tensor, name, drawn))
    return plain.requires_grad_()


def numbers_held(module: nn.Module, used: UsedParts) -> set[float]:
    """What a module, and what is in its attributes, could look for in its tokens, or compare their number with."""
    held = (tree_leaves((then.plain, then.contained, then.frozen)) for then in watch_all(module, used.names))
    numbers = {float(each) for leaves in held for each in leaves if type(each) in (int, float) and abs(each) <= _LARGE}
    return set(sorted(numbers, key=abs)[:_MOST_NUMBERS])


def same(
    got: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | None = None, tolerance: float = _TOLERANCE
) -> bool:
    """scale: of which size the rounding errors are; by default the largest value's."""
    scale = _largest(expected) if scale is None else scale
    return bool(_largest(got - expected) <= tolerance * scale)


def _largest(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, float("inf"))


class _Made(TorchDispatchMode):
    """Sees the tensors that are made in a call."""

    def __init__(self):
        super().__init__()
        self._storages: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = (each for each in tree_leaves(out) if isinstance(each, torch.Tensor))
        self._storages += [StorageWeakRef(each.untyped_storage()) for each in made]
        return out

    def outlives(self, known: tuple) -> bool:
        """Whether one is still there, of which nobody here knows, as in a list that is global."""
        storages = {StorageWeakRef(each.untyped_storage()) for each in known if isinstance(each, torch.Tensor)}
        return any(not each.expired() and each not in storages for each in self._storages)


class Trial:
    """A call of a module of somebody else's class, and its result."""

    def __init__(self, module: nn.Module, inputs: Inputs, used: UsedParts, keywords: dict | None = None):
        self.module, self.inputs, self.used = module, inputs, used
        self.keywords = keywords or {}
        self.comparable = False  # whether a fused form gave a result of the same size
        each, made = _copy(module), _Made()
        with torch.no_grad(), made:
            self.expected = self._run(_original, each, inputs)
        del each
        self.keeps = made.outlives((*inputs, *module.parameters(), *module.buffers(), *tree_leaves(self.expected)))

    def agrees(self, fused: Forward) -> bool:
        try:
            with torch.no_grad():
                got = self._run(fused, self.module, self.inputs)
        except (RuntimeError, ValueError):  # sizes that do not fit
            return False
        return self._same(got, self.expected)

    def agrees_in_all(self, fused: Forward, training: bool, backward: bool = True) -> bool:
        """With gradients and without, in random numbers, what the parts are given that are called, and what is kept."""
        got, expected = (self._seen(forward, training, backward) for forward in (fused, _original))
        return len(got) == len(expected) and all(map(_alike, got, expected))

    def agrees_for_special_values(self, fused: Forward) -> bool:
        """Which a class may leave out, replace, limit or refuse."""
        module = _copy(self.module)
        for inputs in _special(self.inputs, _MARKS | numbers_held(self.module, self.used)):
            got, expected = (self._outcome(forward, module, inputs) for forward in (fused, _original))
            if got is None or expected is None:
                agrees = got is expected
            else:
                agrees = type(got) is type(expected) and _same_where_finite(_result(got), _result(expected))
            if not agrees:
                return False
        return True

    def agrees_in_float64(self, fused: Forward) -> bool:
        with torch.no_grad():
            got = _result(self._run(fused, self.module, self.inputs))
        return same(got, _result(self.expected), tolerance=_TOLERANCE_OF_FLOAT64)

    def agrees_in_float32(self, fused: Forward) -> bool:
        """Autocast in a forward leaves float64 alone, and gives another dtype here, or rounds more."""
        got, expected = self._in(torch.float32, fused)
        return got.dtype == expected.dtype and same(got, expected, tolerance=_TOLERANCE_OF_FLOAT32)

    def agrees_in_half(self, fused: Forward, dtype: torch.dtype, autocast: bool = False) -> bool:
        """In the dtype, and roughly in values: a forward may do something else where it meets half precision."""
        try:
            got, expected = self._in(dtype, fused, autocast)
        except RuntimeError:
            return False
        return got.dtype == expected.dtype and same(*(x.float() for x in (got, expected)), tolerance=_TOLERANCE_OF_HALF)

    def modes(self) -> tuple[str, ...]:
        """The paths of the parts that change the result when they alone are in training."""
        module, paths = _copy(self.module), []
        for then in watch_all(module, self.used.names)[1:]:
            each = attribute(module, then.path)
            each.training = True
            with torch.no_grad():
                if not self._same(self._run(_original, module, self.inputs), self.expected):
                    paths.append(then.path)
            each.training = False
        return (*paths, *filter(None, [self.used.dropout]))  # whatever its rate is today

    def _run(self, forward: Forward, module: nn.Module, inputs: Inputs):
        return forward(module, *inputs, **self.keywords)

    @torch.no_grad()
    def _outcome(self, forward: Forward, module: nn.Module, inputs: Inputs):
        """None for an exception; attention of torch as it is defined, as its CPU kernel loses NaN in queries."""
        try:
            with sdpa_kernel(SDPBackend.MATH):
                return self._run(forward, module, inputs)
        except Exception:  # noqa: BLE001  (whatever a class raises)
            return None

    @torch.no_grad()
    def _in(self, dtype: torch.dtype, fused: Forward, autocast: bool = False) -> list[torch.Tensor]:
        module, inputs = copy.deepcopy(self.module).to(dtype), _each(lambda x: x.to(dtype), self.inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return [_result(self._run(forward, module, inputs)) for forward in (fused, _original)]

    def _same(self, got, expected) -> bool:
        if type(got) is not type(expected) or _result(got).shape != _result(expected).shape:
            return False
        self.comparable = True
        rest, others = ([each is None for each in out] if isinstance(out, tuple) else [] for out in (got, expected))
        return rest == others and same(_result(got), _result(expected))

    def _seen(self, forward: Forward, training: bool, backward: bool) -> list:
        """All that somebody outside can see of a call, of dropout at a rate of one half."""
        module, seen = _copy(self.module).train(training), []
        called = [attribute(module, name) for name in self.used.called]
        hooks = [part.register_forward_pre_hook(functools.partial(_given, seen)) for part in called]
        dropout = self.used.dropout and attribute(module, self.used.dropout)
        if isinstance(dropout, nn.Dropout):
            dropout.p = 0.5
        _seed()
        before, numbers = watch_all(module), pickle.dumps(_states())
        inputs = _each(lambda x: x.clone().requires_grad_(), self.inputs)
        with _Made() as made:
            with torch.no_grad():
                seen.append(_result(self._run(forward, module, inputs)))
            if backward:
                seen += self._with_gradients(forward, module, inputs)
        seen.append(made.outlives((*inputs, *module.parameters(), *module.buffers(), *tree_leaves(seen))))
        seen += [torch.get_rng_state(), pickle.dumps(_states()) == numbers]
        for hook in hooks:
            hook.remove()
        return [*seen, *module.buffers(), why_not_all_as_before(module, before)]

    def _with_gradients(self, forward: Forward, module: nn.Module, inputs: Inputs) -> list:
        with torch.enable_grad():
            out = _result(self._run(forward, module, inputs))
            leaves = (*dict.fromkeys(inputs), *module.parameters())
            gradient = _LARGE * torch.randn_like(out)  # which a hook may clip
            return [out.detach(), torch.autograd.grad(out, leaves, gradient, allow_unused=True)]


def found_out(trials: list[Trial], fused: Forward, of_values: Iterable[Trial] = ()) -> Agreement | None:
    """None where the fused form is another than the class's own; every second trial is one of few tokens.

    of_values: further ones, without gradients.
    """
    if not all(trial.agrees(fused) for trial in trials) or any(trial.keeps for trial in trials):
        return None
    if not all(trial.agrees_in_all(fused, training=False) for trial in trials):
        return None
    if not all(trial.agrees_for_special_values(fused) for trial in trials[::2]):
        return None
    if not trials[0].agrees_in_float32(fused):
        return None
    if not all(trials[0].agrees_in_half(fused, dtype) for dtype in (torch.bfloat16, torch.float16)):
        return None
    in_training = all(trial.agrees_in_all(fused, training=True) for trial in trials)
    for trial in of_values:
        if not trial.agrees(fused):
            return None
        in_training = in_training and trial.agrees_in_all(fused, training=True, backward=False)
    return Agreement(
        in_training,
        in_float64=all(trial.agrees_in_float64(fused) for trial in trials),
        in_autocast=trials[0].agrees_in_half(fused, torch.float32, autocast=True),
        modes=trials[0].modes(),
    )


def agree_in_its_place(trials: list[Trial], fused: type[DropIn]) -> bool:
    """Whether the class's own forward, of a module of the fused class, is what it was."""
    forward = functools.partial(_in_its_place, fused)
    modes = (False, True)
    return all(trial.agrees(forward) and all(trial.agrees_in_all(forward, mode) for mode in modes) for trial in trials)


def _in_its_place(fused: type[DropIn], module: nn.Module, *inputs: torch.Tensor, **keywords):
    """A class's own forward in the fused class, which is another for a forward that asks for its own."""
    kind = type(module)
    module.__class__ = fused
    try:
        return fused.original.forward(module, *inputs, **keywords)
    finally:
        module.__class__ = kind


def _original(module: nn.Module, *inputs: torch.Tensor, **keywords):
    return type(module).forward(module, *inputs, **keywords)


def _given(seen: list, part: nn.Module, args: tuple) -> None:
    seen.append(None if isinstance(part, nn.BatchNorm1d) else args[0].detach())  # whose channels are elsewhere


def _result(out) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def _each(change: Callable[[torch.Tensor], torch.Tensor], inputs: Inputs) -> Inputs:
    """What is one tensor stays one."""
    changed = {x: change(x) for x in dict.fromkeys(inputs)}
    return tuple(changed[x] for x in inputs)


def _special(inputs: Inputs, marks: set[float]) -> Iterator[Inputs]:
    """Each tensor by itself, small, large and with an infinite value, with NaN, or with a mark in a row, an image, or
    everywhere."""
    for each in dict.fromkeys(inputs):
        small, large, unknown = each / _LARGE, _LARGE * each, each.clone()
        _rows(large[-1])[-1, :1] = torch.inf
        _rows(unknown[-1])[-1, :1] = torch.nan
        marked = (where for mark in sorted(marks) for where in _marked(each, mark))
        for special in (small, large, unknown, *marked):
            yield tuple(special if x is each else x for x in inputs)


def _marked(x: torch.Tensor, mark: float) -> tuple[torch.Tensor, ...]:
    row, image = x.clone(), x.clone()
    _rows(row[0])[-1] = mark
    image[0] = mark
    return row, image, torch.full_like(x, mark)


def _rows(image: torch.Tensor) -> torch.Tensor:
    return image.flatten(0, -2)


def _same_where_finite(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """And NaN and infinities in the same places."""
    kinds = (torch.isnan, torch.isposinf, torch.isneginf)
    if got.shape != expected.shape or not all(torch.equal(kind(got), kind(expected)) for kind in kinds):
        return False
    return same(*(each.nan_to_num(0.0, 0.0, 0.0) for each in (got, expected)))


def _copy(module: nn.Module) -> nn.Module:
    """With the same parameters, which a trial only reads."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def _alike(got, expected) -> bool:
    if isinstance(expected, tuple):  # gradients, of which those of keys' biases are what rounding leaves of zero
        scale = max(each.abs().max() for each in expected if each is not None)
        return all(
            one is other is None or (None not in (one, other) and same(one, other, scale))
            for one, other in zip(got, expected, strict=True)
        )
    if not isinstance(got, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return got is expected or got == expected
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    return got.shape == expected.shape and same(got, expected)


def failed(error: Exception) -> str:
    return f"its forward cannot be tried out: {type(error).__name__}: {error}".splitlines()[0]


def _drawn_like(tensor: torch.Tensor, name: str, drawn: Draws) -> torch.Tensor:
    if not tensor.is_floating_point():
        return torch.zeros_like(tensor)
    values = drawn(*tensor.shape) / max(tensor[:1].numel(), 1) ** 0.5 if tensor.dim() else drawn()
    return values.square() + 0.5 if name.endswith("running_var") else values


def _without_hooks(module: nn.Module) -> nn.Module:
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    return module
