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
from tokenfusion.kernels.library import define_without_gradient
from tokenfusion.kernels.linear import kernels_may_run, linear

_LARGE_MATRIX = 1 << 17  # bytes; below, and in bfloat16, PyTorch's products of a whole batch are as fast in backward

_write_kernel = define_without_gradient(
    "gated_sum_out_cpu",
    "(Tensor[] branches, Tensor[] weights, Tensor gates, Tensor bias, Tensor? proj_weight, Tensor? proj_bias,"
    " Tensor(a!) out) -> ()",
    flops=flops.forward,
)
_run_kernel_backward = define_without_gradient(
    "gated_sum_backward_cpu",
    "(Tensor grad, Tensor gates, Tensor[] branches, Tensor[] weights)"
    " -> (Tensor grad_gates, Tensor[] grad_weights, Tensor[] grad_branches)",
    flops=flops.backward,
)


def _run_kernel(branches, weights, gates, bias):
    out = branches[0].new_empty(*branches[0].shape[:2], gates.shape[2])
    _write_kernel(branches, weights, gates, bias, None, None, out)
    return out


def _run_reference(branches, weights, gates, bias):
    return reference.of_scaled(branches, reference.scaled(weights, gates), bias)


def _cpu_can_run(branches, weights) -> str | None:
    reason = extension.why_not_tensor(branches[0])
    if reason is not None:
        return reason
    if not kernels_may_run(*branches, *weights):
        return "the call is compiled or recorded, or its tensors are not plain ones"
    if branches[0].dtype not in extension.own_product_dtypes():
        return f"PyTorch's products are faster in {branches[0].dtype}"
    return None


OPERATOR = register(
    "gated_sum",
    Implementation("cpu", _run_kernel, _cpu_can_run),
    Implementation("reference", _run_reference, lambda branches, weights: None),
    supporting=True,
)


class _GatedSum(torch.autograd.Function):
    """Keeps the branches alone: the scaled weights of a batch can take more memory than its activations."""

    @staticmethod
    def forward(ctx, gates, bias, *tensors):
        ctx.save_for_backward(gates, *tensors)
        weights, branches = tensors[: gates.shape[1]], tensors[gates.shape[1] :]
        return OPERATOR.select(branches, weights).run(branches, weights, gates, bias)

    @staticmethod
    def backward(ctx, grad):
        gates, *tensors = ctx.saved_tensors
        weights, branches = tensors[: gates.shape[1]], tensors[gates.shape[1] :]
        large = grad.dtype == torch.float32 and weights[0].nbytes >= _LARGE_MATRIX
        by_kernel = large and OPERATOR.select([grad], weights).backend == "cpu"
        gradients = _run_kernel_backward if by_kernel else reference.gradients
        grad_gates, grad_weights, grad_branches = gradients(grad, gates, branches, weights)
        return grad_gates, grad.sum(1), *grad_weights, *grad_branches


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
    for name, (tensor, shape) in named.items():
        if tensor is not None:
            check_floating(name, tensor)
            check_same(name, tensor, "branches[0]", x)
            check_shape(name, tensor, list(shape), f"for branches[0] {list(x.shape)} and gates {list(gates.shape)}")
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
        _write(branches, weights, gates, bias, proj_weight, proj_bias, out)
        return out
    if dispatch.transform() is None:
        y = _GatedSum.apply(gates, bias, *weights, *branches)
    else:
        y = _run_reference(branches, weights, gates, bias)
    y = y.reshape(batch, tokens, y.shape[2])
    return y if proj_weight is None else F.linear(y, proj_weight, proj_bias)


def _write(branches, weights, gates, bias, proj_weight, proj_bias, out) -> None:
    target = out.view(branches[0].shape[0], -1, out.shape[2]) if out.numel() else out
    tokens, inputs = branches[0].shape[1], sum(weight.shape[1] for weight in weights)
    pays = proj_weight is None or tokens < 2 * inputs
    if pays and OPERATOR.select(branches, weights).backend == "cpu":
        _write_kernel(branches, weights, gates, bias, proj_weight, proj_bias, target)
        return
    matrices, add = reference.scaled(weights, gates), torch.Tensor.baddbmm_
    if proj_weight is None:
        target.copy_(reference.of_scaled(branches, matrices, bias, add))
    elif inputs < tokens:  # then projecting the weights is less work than projecting the tokens
        projected = [matrix @ proj_weight.mT for matrix in matrices]
        target.copy_(reference.of_scaled(branches, projected, F.linear(bias, proj_weight, proj_bias), add))
    else:
        target.copy_(linear(reference.of_scaled(branches, matrices, bias, add), proj_weight, proj_bias))
