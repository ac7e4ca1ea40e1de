"""Registration with PyTorch's dispatcher, in the one shape that every operator of the package has."""

from collections.abc import Callable, Sequence

import torch
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import register_flop_formula

LIBRARY = torch.library.Library("tokenfusion", "DEF")


def define(
    name: str, schema: str, *, fake: Callable, setup_context: Callable, backward: Callable, flops: Callable[..., int]
) -> Callable:
    """Declare tokenfusion::name with its shapes (fake) and its gradient; devices add their kernels to it.

    Args:
        schema: arguments and results, as in "(Tensor x) -> Tensor".
        fake: returns empty results with the shapes, strides and dtypes of the real ones.
        setup_context, backward: as in torch.library.register_autograd.
        flops: as of `define_without_gradient`.

    Returns:
        The operator, to be called.
    """
    call, op = _declare(name, schema, fake, flops)
    differentiate = make_autograd_impl(op, Info(backward, setup_context))

    def autograd(keyset, *args):
        _refuse_tangents(op, args)
        return differentiate(keyset, *args)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    return call


def define_without_gradient(
    name: str, schema: str, *, flops: Callable[..., int], fake: Callable = lambda *args: None
) -> Callable:
    """`define` for an operator that no gradient can be recorded of, such as one that writes to its arguments.

    Args:
        flops: of the shapes of the arguments, how many floating-point operations the matrix products take; see
            torch.utils.flop_counter.register_flop_formula.
    """
    call, op = _declare(name, schema, fake, flops)

    def autograd(keyset, *args):
        _refuse_tangents(op, args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            raise NotImplementedError(f"{op}: got a tensor that requires a gradient, expected torch.no_grad()")
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    return call


def _declare(name: str, schema: str, fake: Callable, flops: Callable[..., int]):
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
