"""Registration with PyTorch's dispatcher, in the one shape that every operator of the package has."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import register_flop_formula

LIBRARY = torch.library.Library("tokenfusion", "DEF")


@dataclass(frozen=True)
class Form:
    """What is the same for an operator on every backend, and for its backward, which is an operator, too.

    schema: arguments and results, as in "(Tensor x) -> Tensor". The last argument of a backward is bool[n] needed:
        which of its n results are wanted; the others are empty.
    fake: returns empty results with the shapes, strides and dtypes of the real ones.
    flops: of the shapes of the arguments, how many floating-point operations the matrix products take; see
        torch.utils.flop_counter.register_flop_formula.

    Where a backend has forms (see `dispatch.Implementation`), `str form` comes after all these arguments, whose default
    is the built-in one, and a backward gets that of its forward. It changes nothing here.
    save: keeps in a context what `gradients` takes, as setup_context in torch.library.register_autograd.
    gradients: those of the first arguments, in their order. An operator's takes its context, its backward as a function
        of the arguments in its schema, and the gradients of its results, None for one that has none and never all
        None; a backward's takes its context and the gradients of its results.
    """

    schema: str
    fake: Callable
    flops: Callable[..., int]
    save: Callable
    gradients: Callable


def define_differentiable(
    name: str, backends: Sequence[str], forward: Form, backward: Form, with_forms: Sequence[str] = ()
) -> dict[str, Callable]:
    """Declares tokenfusion::<name>_<backend> and <name>_backward_<backend> for each backend; devices add kernels.

    with_forms: the backends that have forms.

    Returns:
        The operators by backend, to be called.
    """
    return {backend: _define_pair(name, backend, forward, backward, backend in with_forms) for backend in backends}


def _define_pair(name: str, backend: str, forward: Form, backward: Form, has_forms: bool) -> Callable:
    def save_backward(ctx, inputs, output):
        *arguments, ctx.needed = inputs[:-1] if has_forms else inputs
        ctx.set_materialize_grads(False)
        backward.save(ctx, arguments, output)

    def second_gradients(ctx, *grad_grads):
        wanted = [grad if needed else None for grad, needed in zip(grad_grads, ctx.needed, strict=True)]
        return _of_all_arguments(ctx, backward.gradients(ctx, *wanted))

    def save_forward(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        if has_forms:
            *inputs, ctx.form = inputs
        forward.save(ctx, inputs, output)

    def gradients(ctx, *grads):
        absent = all(grad is None for grad in grads)
        run = functools.partial(_last, run_backward, ctx.form) if has_forms else run_backward
        return _of_all_arguments(ctx, () if absent else forward.gradients(ctx, run, *grads))

    backward_name = f"{name}_backward_{backend}"
    _define(backward_name, backward, save_backward, second_gradients, has_forms)
    run_backward = getattr(torch.ops.tokenfusion, backward_name).default
    return _define(f"{name}_{backend}", forward, save_forward, gradients, has_forms)


def _last(function: Callable, last, *arguments):
    return function(*arguments, last)


def _of_all_arguments(ctx, grads: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    """None for those that none is wanted of, and for the arguments that are no tensors."""
    return tuple(grad if wanted else None for grad, wanted in zip_longest(grads, ctx.needs_input_grad))


def _define(name: str, form: Form, setup_context: Callable, backward: Callable, has_forms: bool) -> Callable:
    call, op = _declare(name, form.schema, form.fake, form.flops, has_forms)
    differentiate = make_autograd_impl(op, Info(backward, setup_context))

    def autograd(keyset, *args):
        _refuse_tangents(op, args)
        return differentiate(keyset, *args)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    return call


def define_without_gradient(
    name: str, schema: str, *, flops: Callable[..., int], fake: Callable = lambda *args: None, has_forms: bool = False
) -> Callable:
    """Declares tokenfusion::name, of which no gradient can be recorded, such as one that writes to its arguments.

    Args:
        schema, fake, flops: as of a `Form`.
        has_forms: as those of the backends `with_forms`.
    """
    call, op = _declare(name, schema, fake, flops, has_forms)

    def autograd(keyset, *args):
        _refuse_tangents(op, args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            raise NotImplementedError(f"{op}: got a tensor that requires a gradient, expected torch.no_grad()")
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    return call


def _declare(name: str, schema: str, fake: Callable, flops: Callable[..., int], has_forms: bool):
    if has_forms:
        count = schema.partition(" -> ")[0].count(",") + 1
        schema = schema.replace(") -> ", ', str form="") -> ')
        fake, flops = _of_first(count, fake), _of_first(count, flops)
    LIBRARY.define(name + schema, tags=(torch.Tag.needs_exact_strides,))
    torch.library.register_fake(f"{LIBRARY.ns}::{name}", fake, lib=LIBRARY)
    packet = getattr(torch.ops.tokenfusion, name)
    register_flop_formula(packet)(lambda *shapes, out_shape, **_: flops(*shapes))
    op = packet.default

    def call(*args):
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():  # saves 6 us of the 11 that a call takes
            return op(*args)

    return call, op


def _of_first(count: int, function: Callable) -> Callable:
    return lambda *arguments: function(*arguments[:count])


def _refuse_tangents(op: torch._ops.OpOverload, args: Sequence) -> None:
    """An operator has no forward-mode derivative; PyTorch would silently take its tangents for zeros."""
    if forward_ad._current_level < 0:
        return
    for leaf in tree_leaves(args):
        if isinstance(leaf, torch.Tensor) and forward_ad.unpack_dual(leaf).tangent is not None:
            raise NotImplementedError(
                f"{op}: got a tensor with a tangent, expected none: the operator has no forward-mode derivative; "
                "the functions in tokenfusion.kernels have one, where all of the result is computed with tangents"
            )


def second_order(
    reference: Callable[..., torch.Tensor],
    grad_output: torch.Tensor,
    inputs: Sequence[torch.Tensor | None],
    grad_grads: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor | None, ...]:
    """Gradient of an operator's backward, by differentiating the reference twice; itself differentiable.

    Args:
        reference: the operator as a function of `inputs`, in plain PyTorch.
        grad_output: the gradient that the backward received.
        inputs: the operator's tensors; None for an optional one that is absent.
        grad_grads: gradients of the gradients of `inputs`; None where nothing is to be propagated.

    Returns:
        The gradients of (grad_output, *inputs).
    """
    recorded = torch.is_grad_enabled()

    def source(tensor: torch.Tensor) -> torch.Tensor:
        """To differentiate with respect to; connected to the tensor where a further derivative is recorded."""
        return tensor.view_as(tensor) if recorded and tensor.requires_grad else tensor.detach().requires_grad_()

    with torch.enable_grad():
        leaves = [None if t is None else source(t) for t in (grad_output, *inputs)]
        present = [t for t in leaves if t is not None]
        grads = torch.autograd.grad(reference(*leaves[1:]), present[1:], present[0], create_graph=True)
        first = iter(grads)
        pairs = [(next(first), gg) for t, gg in zip(leaves[1:], grad_grads, strict=True) if t is not None]
        pairs = [(grad, gg) for grad, gg in pairs if gg is not None]
        outputs, grad_outputs = [grad for grad, _ in pairs], [gg for _, gg in pairs]
        second = iter(torch.autograd.grad(outputs, present, grad_outputs, create_graph=recorded, allow_unused=True))
    return tuple(None if t is None else next(second) for t in leaves)
