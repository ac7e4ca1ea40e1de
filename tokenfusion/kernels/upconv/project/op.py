"""upconv_concat_project and upconv_add: argument checks, registration, autograd and the public functions."""

from collections.abc import Iterator

import torch

from tokenfusion.kernels import triton_support
from tokenfusion.kernels.checks import autocast, check_floating, check_rank, check_same, symbolic
from tokenfusion.kernels.dispatch import Implementation, register, transform
from tokenfusion.kernels.library import Form, define_differentiable, second_order
from tokenfusion.kernels.upconv import reference
from tokenfusion.kernels.upconv.arguments import (
    CPU_FORMS,
    TRITON_FORMS,
    check_upconv,
    cpu_can_run,
    cuda_can_run,
    triton_can_run,
)
from tokenfusion.kernels.upconv.project import flops
from tokenfusion.kernels.upconv.project.workloads import WORKLOADS, WORKLOADS_OF_ADD
from tokenfusion.kernels.upconv.shapes import empty_gradient, empty_map, empty_sum, gives_channels_last
from tokenfusion.kernels.widened import is_widened

_TENSORS = "Tensor x, Tensor weight, {}Tensor? skip, Tensor? proj_up, Tensor? proj_skip"
_SCHEMA = f"({_TENSORS.format('Tensor? bias, ')}, bool channels_last) -> Tensor"
_BACKWARD_SCHEMA = (
    f"(Tensor grad_out, {_TENSORS.format('')}, bool[6] needed) -> (Tensor grad_x, Tensor grad_weight,"
    " Tensor grad_bias, Tensor grad_skip, Tensor grad_proj_up, Tensor grad_proj_skip)"
)


def _fake(x, weight, bias, skip, proj_up, proj_skip, channels_last):
    return empty_map(x, weight, (weight.shape[1] if proj_up is None else proj_up.shape[0]), channels_last)


def _fake_backward(grad_out, x, weight, skip, proj_up, proj_skip, needed):
    return (
        empty_gradient(x, needed[0]),
        torch.empty_like(weight) if needed[1] else weight.new_empty(0),
        empty_sum(x, grad_out.shape[1], needed[2]),
        empty_gradient(x if skip is None else skip, needed[3]),
        *(
            empty_sum(x, () if proj is None else proj.shape, wanted)
            for proj, wanted in zip((proj_up, proj_skip), needed[4:], strict=True)
        ),
    )


def _save(ctx, inputs, output):
    x, weight, _, skip, proj_up, proj_skip, _ = inputs
    ctx.adds_skip = skip is not None and proj_skip is None
    ctx.save_for_backward(x, weight, None if ctx.adds_skip else skip, proj_up, proj_skip)


def _gradients(ctx, run_backward, grad_out):
    needed, grads = list(ctx.needs_input_grad[:6]), [None] * 6
    if ctx.adds_skip:
        needed[3] = False
    if any(needed):
        grads = list(run_backward(grad_out, *ctx.saved_tensors, needed))
    if ctx.adds_skip:
        grads[3] = grad_out
    return grads


def _save_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _second_gradients(ctx, *grad_grads):
    grad_out, x, weight, *others = ctx.saved_tensors
    inputs = x, weight, x.new_zeros(grad_out.shape[1]), *others  # the bias, whose value does not matter
    grads = second_order(reference.projected_sum_as_products, grad_out, inputs, grad_grads)
    return *grads[:3], *grads[4:]


_FORWARD = Form(_SCHEMA, _fake, flops.forward, _save, _gradients)
_BACKWARD = Form(_BACKWARD_SCHEMA, _fake_backward, flops.backward, _save_backward, _second_gradients)
_BACKENDS = "cpu", "triton", "cuda"
_KERNELS = define_differentiable("upconv_concat_project", _BACKENDS, _FORWARD, _BACKWARD, with_forms=("cpu", "triton"))

_MULTIPLICATIONS_PER_MOVE = 16  # in the time in which memory takes or gives a number


def _composing_pays(x: torch.Tensor, weight: torch.Tensor, proj_up: torch.Tensor | None) -> bool:
    """Do P_up U and (P_up U) x take less work than U x and P_up (U x)?

    Multiplications, for each offset (i, j), and P_up U being written, brought into the order of the product and read.
    Backward, both take twice as much, and U x, which is not kept, is computed again.
    """
    if proj_up is None:
        return False
    pixels, projected = x.shape[0] * x.shape[2] * x.shape[3], proj_up.shape[0]
    channels, up_channels = weight.shape[:2]
    trains = torch.is_grad_enabled() and proj_up.requires_grad
    passes, again = (3, pixels * channels * up_channels) if trains else (1, 0)
    composed = channels * up_channels * projected + pixels * channels * projected
    composed += 3 * _MULTIPLICATIONS_PER_MOVE * channels * projected
    return passes * composed < passes * pixels * up_channels * (channels + projected) + again


def _compose(weight, proj_up):
    if weight.device.type != "cpu" or not is_widened(weight.dtype):
        return reference.compose(weight, proj_up)
    with torch.autocast("cpu", enabled=False):
        return reference.compose(weight.float(), proj_up.float()).to(weight.dtype)


def _run_on(backend: str, *form: str, composes: bool | None = None):
    """composes says whether the weight is multiplied by its projection beforehand; None: where that is less work."""

    def run(x, weight, bias, skip, proj_up, proj_skip):
        if proj_up is not None and (_composing_pays(x, weight, proj_up) if composes is None else composes):
            weight, proj_up = _compose(weight, proj_up), None
        return _KERNELS[backend](x, weight, bias, skip, proj_up, proj_skip, gives_channels_last(x, skip), *form)

    return run


def _run_reference(x, weight, bias, skip, proj_up, proj_skip):
    if _composing_pays(x, weight, proj_up):
        weight, proj_up = reference.compose(weight, proj_up), None
    return reference.upconv_projected_sum(x, weight, bias, skip, proj_up, proj_skip)


def _otherwise_composed(composes: bool):
    """Where the built-in rule would not do the same."""

    def can_run(x, weight, bias, skip, proj_up, proj_skip) -> str | None:
        reason = cpu_can_run(x, weight)
        differs = proj_up is not None and _composing_pays(x, weight, proj_up) != composes
        return reason or (None if differs else "it is the built-in way")

    return can_run


def _implementations(*more: Implementation) -> Iterator[Implementation]:
    yield Implementation("cuda", _run_on("cuda", composes=True), cuda_can_run, automatic=False)
    yield Implementation("triton", _run_on("triton"), triton_can_run, automatic=False)
    for form, can_run in TRITON_FORMS.items():
        yield Implementation("triton", _run_on("triton", form), can_run, automatic=False, form=form)
    yield Implementation("cpu", _run_on("cpu"), cpu_can_run)
    for form, can_run in CPU_FORMS.items():
        yield Implementation("cpu", _run_on("cpu", form), can_run, form=form)
    yield from more
    yield Implementation("reference", _run_reference, lambda *call: None)


_COMPOSING = [
    Implementation("cpu", _run_on("cpu", composes=composes), _otherwise_composed(composes), form=form)
    for form, composes in {"composed": True, "apart": False}.items()
]
OPERATOR = register("upconv_concat_project", *_implementations(*_COMPOSING), workloads=WORKLOADS)
_ADD = register("upconv_add", *_implementations(), workloads=WORKLOADS_OF_ADD)
triton_support.implement(__package__, "upconv_concat_project")


def _check_projection(proj_weight, proj_bias, x, weight, skip) -> None:
    if symbolic(x, weight, skip, proj_weight, proj_bias):
        return
    check_floating("proj_weight", proj_weight)
    check_rank("proj_weight", proj_weight, "[Cp, Cout + Cs]")
    check_same("proj_weight", proj_weight, "x", x)
    joined = weight.shape[1] + (0 if skip is None else skip.shape[1])
    if proj_weight.shape[1] != joined or proj_weight.shape[0] == 0:
        raise ValueError(
            f"proj_weight: got shape {list(proj_weight.shape)}, expected [Cp, {joined}] for the channels of weight "
            f"and skip"
        )
    if proj_bias is not None:
        check_floating("proj_bias", proj_bias)
        check_same("proj_bias", proj_bias, "x", x)
        if proj_bias.shape != proj_weight.shape[:1]:
            raise ValueError(f"proj_bias: got shape {list(proj_bias.shape)}, expected [{proj_weight.shape[0]}]")


def upconv_concat_project(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    skip: torch.Tensor | None,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    *,
    skip_first: bool = False,
) -> torch.Tensor:
    """`upconv_concat` followed by a 1x1 convolution, of which neither the concatenation nor the up-sampled map exists.

    F.conv2d(upconv_concat(x, weight, bias, skip), proj_weight[:, :, None, None], proj_bias), as the sum of a projected
    up-convolution and a projected skip. Differentiable in all tensors.

    Args:
        x, weight, bias, skip, skip_first: as of `upconv_concat`.
        proj_weight: [Cp, Cout + Cs], the channels in the order of the concatenation.
        proj_bias: [Cp] or None.

    Returns:
        [B, Cp, k h, k w]; channels_last where x and skip are.

    Raises:
        TypeError, ValueError, RuntimeError: as `upconv_concat`, and ValueError for a projection of the wrong shape.
    """
    x, weight, bias, skip, proj_weight, proj_bias = autocast(x, weight, bias, skip, proj_weight, proj_bias)
    check_upconv(x, weight, bias, skip)
    _check_projection(proj_weight, proj_bias, x, weight, skip)
    if transform() is not None or (skip is not None and skip.shape[1] == 0):  # no product has no summands
        return reference.upconv_concat_project(x, weight, bias, skip, proj_weight, proj_bias, skip_first=skip_first)
    up_channels = weight.shape[1]
    proj_skip = None
    if skip is None:
        proj_up = proj_weight
    elif skip_first:
        proj_skip, proj_up = proj_weight.split((skip.shape[1], up_channels), dim=1)
    else:
        proj_up, proj_skip = proj_weight.split((up_channels, skip.shape[1]), dim=1)
    if bias is not None:
        bias = proj_up @ bias
        bias = bias if proj_bias is None else bias + proj_bias
    else:
        bias = proj_bias
    operands = x, weight, bias, skip, proj_up, proj_skip
    return OPERATOR.select(*operands).run(*operands)


def upconv_add(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, skip: torch.Tensor) -> torch.Tensor:
    """Transposed convolution with kernel = stride, added to a skip connection of as many channels.

    F.conv_transpose2d(x, weight, bias, stride=k) + skip, without the up-sampled map by itself. Differentiable in all
    tensors. Token Fusion's "UpConv + add".

    Args:
        x, weight, bias: as of `upconv_concat`.
        skip: [B, Cout, k h, k w].

    Returns:
        [B, Cout, k h, k w]; channels_last where x and skip are.

    Raises:
        TypeError, ValueError, RuntimeError: as `upconv_concat`, and ValueError for a skip of other channels.
    """
    x, weight, bias, skip = autocast(x, weight, bias, skip)
    check_upconv(x, weight, bias, skip)
    if skip is None or (not symbolic(skip, weight) and skip.shape[1] != weight.shape[1]):
        got = None if skip is None else list(skip.shape)
        raise ValueError(f"skip: got {got}, expected a tensor of the {weight.shape[1]} channels of weight")
    operands = x, weight, bias, skip, None, None
    return _ADD.select(*operands).run(*operands)
