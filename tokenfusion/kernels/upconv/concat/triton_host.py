"""Launches of the up-convolutions' Triton kernels: tiles, splits over the pixels, outputs and partial sums."""

import torch
import triton

from tokenfusion.kernels.upconv.concat import triton_kernels
from tokenfusion.kernels.upconv.shapes import empty_gradient, empty_map

_COPIED_PER_PROGRAM = 2048
_PROGRAMS = 264  # two for each multiprocessor of an H100
_MAX_SPLITS = 32


def tile(itemsize: int, form: str) -> dict[str, int]:
    """Rows, columns and depth of a product's tile, for which ptxas needs no spill on sm_80 and sm_90.

    Form: "deep" tiles, which wait for memory half as often.
    """
    if itemsize == 4:
        return {"BP": 64, "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 2}
    return {"BP": 64, "BN": 64, "BK": 64 if form == "deep" else 32, "num_warps": 8, "num_stages": 2}


def strides(**tensors: torch.Tensor) -> dict[str, int]:
    """Strides of [B, C, H, W] maps, as x_b, x_c, ...; of a weight [K, C, k, k], as w_k, w_c, w_y, w_x."""
    return {
        f"{name}_{letter}": stride
        for name, tensor in tensors.items()
        for letter, stride in zip("kcyx" if name == "w" else "bcyx", tensor.stride(), strict=True)
    }


def pixel_counts(x: torch.Tensor) -> dict[str, int]:
    batch, _, height, width = x.shape
    return {"P": batch * height * width, "height": height, "width": width}


def channels_fastest(map_: torch.Tensor) -> bool:
    return map_.stride(1) == 1 and map_.shape[1] > 1


def run_forward(x, weight, bias, skip, skip_first, channels_last, form=""):
    out = empty_map(x, weight, weight.shape[1] + (0 if skip is None else skip.shape[1]), channels_last)
    run_out(x, weight, bias, skip, skip_first, out, form)
    return out


def run_out(x, weight, bias, skip, skip_first, out, form=""):
    if x.numel() == 0:
        return
    (inputs, channels, scale), skipped = weight.shape[:3], 0 if skip is None else skip.shape[1]
    up = out.narrow(1, skipped if skip_first else 0, channels)
    to_copy = skipped
    if skip is not None:
        joined = out.narrow(1, 0 if skip_first else channels, skipped)
        if skip.data_ptr() == joined.data_ptr() and skip.stride() == joined.stride():
            to_copy = 0
    else:
        skip = joined = up
    plan, sizes = tile(x.element_size(), form), pixel_counts(x)
    blocks_n = triton.cdiv(channels * scale * scale, plan["BN"])
    products = triton.cdiv(sizes["P"], plan["BP"]) * blocks_n
    copied = to_copy * scale * scale * sizes["P"]
    with torch.cuda.device_of(x):
        triton_kernels.forward_kernel[(products + triton.cdiv(copied, _COPIED_PER_PROGRAM),)](
            x,
            weight,
            x if bias is None else bias.contiguous(),
            skip,
            up,
            joined,
            **sizes,
            blocks_n=blocks_n,
            products=products,
            copied=copied,
            **strides(x=x, w=weight, skip=skip, out=out),
            K=inputs,
            C=channels,
            S=scale,
            SKIP=max(skipped, 1),
            BLOCK=_COPIED_PER_PROGRAM,
            HAS_BIAS=bias is not None,
            CHANNELS_LAST=channels_fastest(out),
            **plan,
        )


def run_backward(grad_up, x, weight, needed, form=""):
    inputs, channels, scale = weight.shape[:3]
    grad_x = empty_gradient(x, needed[0])
    grad_weight, grad_bias = weight.new_empty(0), x.new_empty(0)
    if x.numel() == 0:
        return grad_x, weight.new_zeros(weight.shape) if needed[1] else grad_weight, x.new_zeros(channels)
    sizes = pixel_counts(x)
    shared = {"K": inputs, "C": channels, "S": scale, "CHANNELS_LAST": channels_fastest(grad_up)} | sizes
    with torch.cuda.device_of(x):
        if needed[0]:
            plan = tile(x.element_size(), form)
            blocks_k = triton.cdiv(inputs, plan["BN"])
            triton_kernels.grad_x_kernel[(triton.cdiv(sizes["P"], plan["BP"]) * blocks_k,)](
                grad_up, weight, grad_x, blocks_k=blocks_k, **strides(x=grad_x, w=weight, g=grad_up), **shared, **plan
            )
        if needed[1]:
            plan = tile(x.element_size(), "")  # deeper tiles would spill
            grad_weight = torch.empty_like(weight)
            blocks_n = triton.cdiv(channels * scale * scale, plan["BN"])
            programs = triton.cdiv(inputs, plan["BP"]) * blocks_n
            steps = triton.cdiv(sizes["P"], plan["BK"])
            splits = max(1, min(_PROGRAMS // programs, _MAX_SPLITS, steps))
            rows_per_split = triton.cdiv(steps, splits) * plan["BK"]
            splits = triton.cdiv(sizes["P"], rows_per_split)
            partial = torch.empty_strided(
                (splits, *weight.shape), (weight.numel(), *grad_weight.stride()), dtype=torch.float32, device=x.device
            )
            triton_kernels.grad_weight_kernel[programs, splits](
                grad_up,
                x,
                partial,
                blocks_n=blocks_n,
                rows_per_split=rows_per_split,
                **strides(x=x, w=grad_weight, g=grad_up),
                **shared,
                **plan,
            )
            grad_weight.copy_(partial.sum(0))
    if needed[2]:
        grad_bias = grad_up.sum((0, 2, 3), dtype=torch.float32).to(x.dtype)
    return grad_x, grad_weight, grad_bias
