"""Launches of dynamic_mixing's Triton kernels: tiles, outputs and partial sums."""

import torch
import triton

from tokenfusion.kernels.dynamic_mixing import triton_kernels
from tokenfusion.kernels.dynamic_mixing.shapes import empty_gradients, empty_mean

ROWS = 16  # tl.dot's least
TARGETS = 16
WEIGHT_SPLITS = 32  # programs among which the rows are divided for the gradient of the generator's weight
_WARPS = {16: 4, 32: 8, 64: 16}  # for each padded number of tokens


def _power_of_two(size: int, most: int) -> int:
    return min(max(16, triton.next_power_of_2(size)), most)


def _strides(tensor: torch.Tensor, dim: int) -> tuple[int, int, int]:
    """Of images, lines and tokens."""
    return tensor.stride(0), tensor.stride(3 - dim), tensor.stride(dim)


def _plan(x, compressed, segments, dim) -> dict:
    """Arguments and options that all kernels share."""
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
        BC=_power_of_two(width, 32 if padded < 64 else 16),
        BK=_power_of_two(length * reduced, 32 if x.element_size() < 4 else 16),
        num_warps=_WARPS[padded],
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
    block_o = _power_of_two(inputs, 32)
    row_blocks = triton.cdiv(plan["R"], plan["BR"])
    with torch.cuda.device_of(x):
        if needed[0]:
            triton_kernels.grad_x_kernel[row_blocks, triton.cdiv(plan["WIDTH"], plan["BC"])](
                compressed, *weights, grad_mixed, mean, grads[0], **plan, **_named("o", grads[0], dim)
            )
        if needed[1]:
            triton_kernels.grad_compressed_kernel[row_blocks, triton.cdiv(inputs, block_o)](
                x, compressed, *weights, grad_mixed, mean, grads[1], **plan, **of_x, **_named("o", grads[1], dim),
                BO=block_o,
            )  # fmt: skip
        if needed[2] or needed[3]:
            blocks_per_split = triton.cdiv(row_blocks, WEIGHT_SPLITS)
            splits = triton.cdiv(row_blocks, blocks_per_split)
            partial_weight = x.new_empty(splits, *generate_weight.shape, dtype=torch.float32)
            partial_bias = x.new_empty(splits, *generate_bias.shape, dtype=torch.float32)
            grid = triton.cdiv(plan["N"], plan["BT"]), triton.cdiv(inputs, block_o), splits
            triton_kernels.grad_weight_kernel[grid](
                x, compressed, *weights, grad_mixed, mean, partial_weight, partial_bias, **plan, **of_x,
                blocks_per_split=blocks_per_split, BO=block_o,
            )  # fmt: skip
            grads = (
                *grads[:2],
                *(
                    partial.sum(0).to(x.dtype) if wanted else grad
                    for partial, wanted, grad in zip((partial_weight, partial_bias), needed[2:], grads[2:])
                ),
            )
    return grads
