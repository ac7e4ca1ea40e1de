"""Launches of single_query_attention's Triton kernels: tile sizes, splits over the tokens, outputs and partial sums."""

import functools

import torch
import triton

from tokenfusion.kernels.single_query_attention import triton_kernels
from tokenfusion.kernels.single_query_attention.shapes import empty_gradients

PROGRAMS_PER_MULTIPROCESSOR = 2
MAX_SPLITS = 32
_INTERPRETER_MULTIPROCESSORS = 132


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETER_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _chunk(channels: int, widest: int) -> int:
    """Width of the chunks of C: the power of two from 16 to `widest` that pads C least, the widest of equals."""
    widths = [width for width in (16, 32, 64, 128, 256) if width <= widest]
    return min(widths, key=lambda width: (triton.cdiv(channels, width) * width, -width))
