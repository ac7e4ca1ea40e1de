"""Launches of dynamic_mixing's Triton kernels: tiles, outputs and partial sums."""

import torch
import triton

from tokenfusion.kernels.dynamic_mixing import triton_kernels
from tokenfusion.kernels.dynamic_mixing.shapes import empty_gradients, empty_mean

ROWS = 16  # tl.dot's least
TARGETS = 16
INPUTS = 16  # of the N * d of a row, whose gradients a program makes
WEIGHT_SPLITS = 32  # programs among which the rows are divided for the gradient of the generator's weight
# itemsize: padded number of tokens: warps; of the kernels forward, grad_x, grad_compressed and grad_weight
_WARPS = {
    2: {16: (4, 4, 4, 8), 32: (8, 16, 8, 8), 64: (16, 16, 16, 16)},
    4: {16: (8, 8, 16, 16), 32: (16, 16, 16, 16), 64: (32, 32, 32, 32)},
}


def _power_of_two(size: int, most: int) -> int:
    return min(max(16, triton.next_power_of_2(size)), most)


def _strides(tensor: torch.Tensor, dim: int) -> tuple[int, int, int]:
    """Of images, lines and tokens."""
    return tensor.stride(0), tensor.stride(3 - dim), tensor.stride(dim)


def _plan(x, compressed, segments, dim) -> dict:
    """What all kernels take."""
    length, width, reduced = x.shape[dim], x.shape[3] // segments, compressed.shape[3] // segments
    padded = _power_of_two(length, 64)
    return dict(
        R=x.shape[0] * x.shape[3 - dim] * segments,
        lines=x.shape[3 - dim],
        N=length,
        S=segments,
        WIDTH=width,
        REDUCED=reduced,
        BR=ROWS,
        BT=TARGETS,
        NP=padded,
        BC=_power_of_two(width, 32 if padded < 64 and x.element_size() < 4 else 16),
        BK=_power_of_two(length * reduced, 32 if x.element_size() < 4 else 16),
        num_stages=1,
    )


def run_forward(x, compressed, generate_weight, generate_bias, segments, dim, with_mean):
    mixed = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return mixed, empty_mean(x, with_mean)
    plan = _plan(x, compressed, segments, dim)
    blocks = triton.cdiv(plan["N"], plan["BT"])
    sums = x.new_empty(blocks, x.shape[0], plan["lines"], x.shape[3], dtype=torch.float32) if with_mean else x
    with torch.cuda.device_of(x):
        triton_kernels.forward_kernel[triton.cdiv(plan["R"], plan["BR"]), blocks](
            x,
            compressed,
            generate_weight.contiguous(),
            generate_bias.contiguous(),
            mixed,
            sums,
            **plan,
            **_named("x", x, dim),
            **_named("z", compressed, dim),
            **_named("o", mixed, dim),
            WITH_SUMS=with_mean,
            num_warps=_WARPS[x.element_size()][plan["NP"]][0],
        )
    if not with_mean:
        return mixed, empty_mean(x, with_mean)
    return mixed, (sums.sum(dim=(0, 2)) / (x.shape[1] * x.shape[2])).to(x.dtype)


def _named(letter: str, tensor: torch.Tensor, dim: int) -> dict[str, int]:
    return dict(zip((f"stride_{letter}b", f"stride_{letter}l", f"stride_{letter}t"), _strides(tensor, dim)))


def run_backward(grad_mixed, grad_mean, x, compressed, generate_weight, generate_bias, segments, dim, needed):
    grads = empty_gradients((x, compressed, generate_weight, generate_bias), needed)
    if x.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    grad_mixed = grad_mixed if grad_mixed.stride(3) == 1 else grad_mixed.contiguous()
    has_mean = grad_mean is not None
    mean = (grad_mean.float() / (x.shape[1] * x.shape[2])).contiguous() if has_mean else grad_mixed
    weights = generate_weight.contiguous(), generate_bias.contiguous()
    plan = _plan(x, compressed, segments, dim) | dict(HAS_MEAN=has_mean)
    plan |= _named("z", compressed, dim) | _named("g", grad_mixed, dim)
    of_x = _named("x", x, dim)
    inputs = plan["N"] * plan["REDUCED"]
    row_blocks = triton.cdiv(plan["R"], plan["BR"])
    _, *warps = _WARPS[x.element_size()][plan["NP"]]
    with torch.cuda.device_of(x):
        if needed[0]:
            plan_of_x = plan | dict(BC=min(plan["BC"], 512 // plan["NP"]))  # its sums stay in registers
            triton_kernels.grad_x_kernel[row_blocks, triton.cdiv(plan["WIDTH"], plan_of_x["BC"])](
                compressed, *weights, grad_mixed, mean, grads[0], **plan_of_x, **_named("o", grads[0], dim),
                num_warps=warps[0],
            )  # fmt: skip
        if needed[1]:
            triton_kernels.grad_compressed_kernel[row_blocks, triton.cdiv(inputs, INPUTS)](
                x, compressed, *weights, grad_mixed, mean, grads[1], **plan, **of_x, **_named("o", grads[1], dim),
                BO=INPUTS, num_warps=warps[1],
            )  # fmt: skip
        if needed[2] or needed[3]:
            grads = (
                *grads[:2],
                *_weight_gradients(x, compressed, *weights, grad_mixed, mean, plan | of_x, needed[2:], warps[2]),
            )
    return grads


def _weight_gradients(x, compressed, weight, bias, grad_mixed, mean, plan, needed, num_warps):
    """Partial sums over a part of the rows each, added in a fixed order."""
    row_blocks = triton.cdiv(plan["R"], plan["BR"])
    blocks_per_split = triton.cdiv(row_blocks, WEIGHT_SPLITS)
    splits = triton.cdiv(row_blocks, blocks_per_split)
    partials = [x.new_empty(splits, *tensor.shape, dtype=torch.float32) for tensor in (weight, bias)]
    grid = triton.cdiv(plan["N"], plan["BT"]), triton.cdiv(weight.shape[1] + 1, INPUTS), splits
    triton_kernels.grad_weight_kernel[grid](
        x, compressed, weight, bias, grad_mixed, mean, *partials, **plan, blocks_per_split=blocks_per_split, BO=INPUTS,
        num_warps=num_warps,
    )  # fmt: skip
    return [p.sum(0).to(x.dtype) if wanted else x.new_empty(0) for p, wanted in zip(partials, needed, strict=True)]
