"""gated_sum: argument checks, registration, autograd and the public function."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tokenfusion.kernels import dispatch, extension
from tokenfusion.kernels.checks import (
    autocast,
    check_floating,
    check_not_recorded,
    check_rank,
    check_same,
    check_shape,
    symbolic,
)
from tokenfusion.kernels.dispatch import Implementation, register
from tokenfusion.kernels.gated_sum import flops, reference
from tokenfusion.kernels.gated_sum.workloads import WORKLOADS
from tokenfusion.kernels.library import define_without_gradient
from tokenfusion.kernels.linear import is_plain_call, kernels_may_run, linear

_LARGE_MATRIX = 1 << 17  # bytes; below, and in bfloat16, PyTorch's products of a whole batch are as fast in backward

_write_kernel = define_without_gradient(
    "gated_sum_out_cpu",
    "(Tensor[] branches, Tensor[] weights, Tensor gates, Tensor bias, Tensor? proj_weight, Tensor? proj_bias,"
    " Tensor(a!) out) -> ()",
    flops=flops.forward,
    has_forms=True,
)
_run_kernel_backward = define_without_gradient(
    "gated_sum_backward_cpu",
    "(Tensor grad, Tensor gates, Tensor[] branches, Tensor[] weights)"
    " -> (Tensor grad_gates, Tensor[] grad_weights, Tensor[] grad_branches)",
    flops=flops.backward,
)


class _GatedSum(torch.autograd.Function):
    """Keeps the branches alone: the scaled weights of a batch can take more memory than its activations."""

    @staticmethod
    def forward(ctx, form, backward_by_kernel, gates, bias, *tensors):
        """By the kernel in this form, or by PyTorch where form is None."""
        ctx.save_for_backward(gates, *tensors)
        ctx.by_kernel = backward_by_kernel
        branches, weights = _branches_and_weights(gates, tensors)
        if form is None:
            return reference.of_scaled(branches, reference.scaled(weights, gates), bias)
        out = branches[0].new_empty(*branches[0].shape[:2], gates.shape[2])
        _write_kernel(branches, weights, gates, bias, None, None, out, form)
        return out

    @staticmethod
    def backward(ctx, grad):
        gates, *tensors = ctx.saved_tensors
        branches, weights = _branches_and_weights(gates, tensors)
        by_kernel = ctx.by_kernel and kernels_may_run(grad, *weights)
        gradients = _run_kernel_backward if by_kernel else reference.gradients
        grad_gates, grad_weights, grad_branches = gradients(grad, gates, branches, weights)
        return None, None, grad_gates, grad.sum(1), *grad_weights, *grad_branches


def _branches_and_weights(gates, tensors) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Of an implementation's last operands, which are the weights of all branches and then the branches."""
    count = gates.shape[1]
    return tensors[count:], tensors[:count]


def _by_kernel(pays_backward, form=""):
    """An implementation; pays_backward says of the weights whether the kernel makes the gradients, too, and form whose
    products those of the forward pass are."""

    def run(gates, bias, proj_weight, proj_bias, out, *tensors):
        branches, weights = _branches_and_weights(gates, tensors)
        if out is None:
            return _GatedSum.apply(form, pays_backward(weights), gates, bias, *tensors)
        _write_kernel(branches, weights, gates, bias, proj_weight, proj_bias, out, form)
        return out

    return run


def _run_reference(gates, bias, proj_weight, proj_bias, out, *tensors):
    if out is None:
        return _GatedSum.apply(None, False, gates, bias, *tensors)
    branches, weights = _branches_and_weights(gates, tensors)
    matrices, add = reference.scaled(weights, gates), torch.Tensor.baddbmm_
    if proj_weight is None:
        return out.copy_(reference.of_scaled(branches, matrices, bias, add))
    if sum(weight.shape[1] for weight in weights) < branches[0].shape[1]:
        projected = [matrix @ proj_weight.mT for matrix in matrices]  # less work than projecting the tokens
        return out.copy_(reference.of_scaled(branches, projected, F.linear(bias, proj_weight, proj_bias), add))
    return out.copy_(linear(reference.of_scaled(branches, matrices, bias, add), proj_weight, proj_bias))


def _kernel_can_run(gates, bias, proj_weight, proj_bias, out, *tensors) -> str | None:
    reason = extension.why_not_tensor(gates)
    if reason is not None:
        return reason
    if not is_plain_call(*tensors):
        return "the call is compiled or recorded, or its tensors are not plain ones"
    if gates.dtype not in extension.own_product_dtypes():
        return f"its product does not take {gates.dtype} on this processor"
    return None


def _projecting_pays(gates, proj_weight, tensors) -> bool:
    """Whether the kernel is likely to be the faster one: of many tokens PyTorch projects the weights instead."""
    branches, weights = _branches_and_weights(gates, tensors)
    return proj_weight is None or branches[0].shape[1] < 2 * sum(weight.shape[1] for weight in weights)


def _backward_pays(weights) -> bool:
    return weights[0].dtype == torch.float32 and weights[0].nbytes >= _LARGE_MATRIX


def _cpu_can_run(gates, bias, proj_weight, proj_bias, out, *tensors) -> str | None:
    reason = _kernel_can_run(gates, bias, proj_weight, proj_bias, out, *tensors)
    if reason is not None or _projecting_pays(gates, proj_weight, tensors):
        return reason
    return "of so many tokens PyTorch's products are faster"


def _projecting_can_run(gates, bias, proj_weight, proj_bias, out, *tensors) -> str | None:
    reason = _kernel_can_run(gates, bias, proj_weight, proj_bias, out, *tensors)
    return reason or _unless(not _projecting_pays(gates, proj_weight, tensors))


def _backward_can_run(gates, bias, proj_weight, proj_bias, out, *tensors) -> str | None:
    reason = _kernel_can_run(gates, bias, proj_weight, proj_bias, out, *tensors)
    if reason is not None:
        return reason
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (gates, bias, *tensors))):
        return "there is no backward pass"
    if gates.dtype != torch.float32:
        return f"the kernel's gradients are float32, not {gates.dtype}"
    return None


def _library_can_run(*call) -> str | None:
    reason = _kernel_can_run(*call)
    if reason is None and call[0].dtype != torch.float32:
        return "sums of the library's products would be rounded to 16 bits"
    return reason


def _library_backward_can_run(*call) -> str | None:
    return _backward_can_run(*call) or _unless(_backward_pays(_branches_and_weights(call[0], call[5:])[1]))


def _kernel_backward_can_run(*call) -> str | None:
    return _backward_can_run(*call) or _unless(not _backward_pays(_branches_and_weights(call[0], call[5:])[1]))


def _unless(differs: bool) -> str | None:
    return None if differs else "it is the built-in way"


OPERATOR = register(
    "gated_sum",
    Implementation("cpu", _by_kernel(_backward_pays), _cpu_can_run),
    Implementation("cpu", _by_kernel(_backward_pays), _projecting_can_run, form="projecting"),
    Implementation("cpu", _by_kernel(lambda weights: True), _kernel_backward_can_run, form="own backward"),
    Implementation("cpu", _by_kernel(lambda weights: False), _library_backward_can_run, form="library backward"),
    Implementation("cpu", _by_kernel(lambda weights: False, "library"), _library_can_run, form="library"),
    Implementation("reference", _run_reference, lambda *call: None),
    supporting=True,
    workloads=WORKLOADS,
)


def _check(branches, weights, biases, gates, proj_weight, proj_bias, out) -> None:
    tensors = [*branches, *weights, *biases, gates, proj_weight, proj_bias, out]
    if symbolic(*tensors):
        return
    count = len(branches)
    if not count == len(weights) == len(biases) > 0:
        raise ValueError(
            f"branches, weights, biases: got {count}, {len(weights)} and {len(biases)}, expected one of each or more, "
            "and of all as many"
        )
    x = branches[0]
    check_floating("branches[0]", x)
    check_rank("branches[0]", x, "[B, T, D_in]")
    channels = gates.shape[-1]
    named = {f"branches[{k}]": (branch, (*x.shape[:2], branch.shape[-1])) for k, branch in enumerate(branches)}
    named |= {f"weights[{k}]": (weight, (channels, branches[k].shape[-1])) for k, weight in enumerate(weights)}
    named |= {f"biases[{k}]": (bias, (channels,)) for k, bias in enumerate(biases)}
    named["gates"] = gates, (1 if len(gates) == 1 else len(x), count, channels)
    rows = channels if proj_weight is None else len(proj_weight)
    named["proj_weight"], named["proj_bias"] = (proj_weight, (rows, channels)), (proj_bias, (rows,))
    named["out"] = out, (*x.shape[:2], rows)
    others = f"for branches[0] {list(x.shape)} and gates {list(gates.shape)}"
    for name, (tensor, shape) in named.items():
        if tensor is not None:
            check_floating(name, tensor)
            check_same(name, tensor, "branches[0]", x)
            check_shape(name, tensor, list(shape), others)
    if out is not None and not out.is_contiguous():
        raise ValueError(f"out: got strides {list(out.stride())}, expected a contiguous tensor")
    check_not_recorded("out", out, tensors)


def gated_sum(
    branches: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    gates: torch.Tensor,
    proj_weight: torch.Tensor | None = None,
    proj_bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A sum of linear layers of different inputs, scaled for every image and channel; and a linear layer after it.

    sum_k gates[:, k] * F.linear(branches[k], weights[k], biases[k]), as the reweighted sum of a DynaMixer block's three
    branches and its projection (arXiv:2201.12083, 3.2), without the outputs of the layers. `reference.py` has the
    algebra. Differentiable in all tensors, with the branches kept for the backward pass and nothing else of their size.

    Args:
        branches: K tensors [B, T, D_in].
        weights: K tensors [D_out, D_in]; biases: K tensors [D_out] or None.
        gates: [B, K, D_out]; or [1, K, D_out], the same for all images.
        proj_weight: [D_p, D_out] or None; proj_bias: [D_p] or None.
        out: where to write, for inference: [B, T, D_p], contiguous.

    All of one device and of one dtype: float16, bfloat16, float32 or float64. Under autocast they are cast to its
    dtype, as for a matrix product.

    Returns:
        [B, T, D_out]; [B, T, D_p] with a projection.

    Raises:
        TypeError: a dtype that is not floating point, or differing dtypes.
        ValueError: mismatching numbers of tensors or sizes, tensors on different devices; an out that is not
            contiguous, or while a gradient is recorded.
    """
    count = len(branches)
    tensors = autocast(*branches, *weights, *biases, gates, proj_weight, proj_bias)
    branches, weights, biases = tensors[:count], tensors[count : 2 * count], tensors[2 * count : -3]
    gates, proj_weight, proj_bias = tensors[-3:]
    _check(branches, weights, biases, gates, proj_weight, proj_bias, out)
    batch, tokens = branches[0].shape[0], branches[0].shape[1]
    if not symbolic(gates) and gates.shape[0] == 1:  # then all images are one
        branches = [branch.flatten(0, 1).unsqueeze(0) for branch in branches]
    bias = reference.gated_bias(biases, gates)
    if out is not None:
        target = out.view(branches[0].shape[0], -1, out.shape[2]) if out.numel() else out
        _run(gates, bias, proj_weight, proj_bias, target, *weights, *branches)
        return out
    if dispatch.transform() is None:
        y = _run(gates, bias, None, None, None, *weights, *branches)
    else:
        y = reference.of_scaled(branches, reference.scaled(weights, gates), bias)
    y = y.reshape(batch, tokens, y.shape[2])
    return y if proj_weight is None else F.linear(y, proj_weight, proj_bias)


def _run(*call) -> torch.Tensor:
    return OPERATOR.select(*call).run(*call)
