"""Launches of upconv_concat_project's Triton kernels. The weight is always composed with its projection.

Backward, the gradients of the composed weight and of x come from upconv_concat's kernels; those of the skip and of the
projections are plain products.
"""

import torch
import triton

from tokenfusion.kernels.upconv.concat import triton_host
from tokenfusion.kernels.upconv.project import triton_kernels
from tokenfusion.kernels.upconv.reference import compose
from tokenfusion.kernels.upconv.shapes import empty_gradient, empty_map


def run_forward(x, weight, bias, skip, proj_up, proj_skip, channels_last, form=""):
    weight = weight if proj_up is None else compose(weight, proj_up)
    inputs, channels, scale = weight.shape[:3]
    out = empty_map(x, weight, channels, channels_last)
    if x.numel() == 0:
        return out
    plan, sizes = triton_host.tile(x.element_size(), form), triton_host.pixel_counts(x)
    blocks_c = triton.cdiv(channels, plan["BN"])
    proj_c, proj_k = (0, 0) if proj_skip is None else proj_skip.stride()
    with torch.cuda.device_of(x):
        triton_kernels.forward_kernel[triton.cdiv(sizes["P"], plan["BP"]) * blocks_c, scale * scale](
            x,
            weight,
            x if bias is None else bias.contiguous(),
            x if skip is None else skip,
            x if proj_skip is None else proj_skip,
            out,
            **sizes,
            blocks_c=blocks_c,
            **triton_host.strides(x=x, w=weight, skip=x if skip is None else skip, out=out),
            p_c=proj_c,
            p_k=proj_k,
            K=inputs,
            C=channels,
            S=scale,
            SKIP=0 if skip is None else skip.shape[1],
            HAS_BIAS=bias is not None,
            HAS_SKIP=skip is not None,
            PROJECTS=proj_skip is not None,
            **plan,
        )
    return out


def run_backward(grad_out, x, weight, skip, proj_up, proj_skip, needed, form=""):
    need_x, need_weight, need_bias, need_skip, need_proj_up, need_proj_skip = needed
    none = x.new_empty(0)
    composed = weight if proj_up is None else compose(weight, proj_up)
    grad_x, grad_composed, grad_bias = triton_host.run_backward(
        grad_out, x, composed, [need_x, need_weight or need_proj_up, need_bias], form
    )
    grad_weight = grad_composed if need_weight else none
    grad_skip = grad_proj_up = grad_proj_skip = none
    if proj_up is not None:
        if need_weight:
            grad_weight = torch.empty_like(weight).copy_(compose(grad_composed, proj_up.t()))
        if need_proj_up:
            by_offset = torch.einsum("kpij,kcij->ijpc", grad_composed, weight)  # one long sum would lose precision
            grad_proj_up = by_offset.sum((0, 1))
    if need_skip:
        grad_skip = empty_gradient(skip, True).copy_(torch.einsum("pc,bpyx->bcyx", proj_skip, grad_out))
    if need_proj_skip:
        grad_proj_skip = torch.einsum("bpyx,bcyx->pc", grad_out, skip).contiguous()
    return grad_x, grad_weight, grad_bias, grad_skip, grad_proj_up, grad_proj_skip
