"""Half precision computed in float32, where PyTorch's own products take 5 to 200 times as long.

oneDNN multiplies bfloat16 and float16 by instructions of AVX-512 and later. On other processors PyTorch's own loops
run, which use no vectors for some orders of the operands. Widened operands give results at least as exact: sums are
float32 either way.
"""

import functools

import torch

FEWEST_ROWS = 8  # with less, to widen a weight takes longer than to multiply by it
_SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@torch.compiler.assume_constant_result
def is_widened(dtype: torch.dtype) -> bool:
    """Whether products of this dtype on a CPU are computed in float32."""
    return dtype in _SUPPORTED and not (torch.backends.mkldnn.enabled and _library_multiplies(dtype))


def bmm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """torch.bmm of [B, M, K] and [B, K, N]; differentiable."""
    widens = x.device.type == "cpu" and x.dtype == weight.dtype and x.shape[1] >= FEWEST_ROWS and is_widened(x.dtype)
    if not widens or torch.is_autocast_enabled("cpu"):
        return torch.bmm(x, weight)
    return torch.bmm(x.float(), weight.float()).to(x.dtype)


@functools.cache
def _library_multiplies(dtype: torch.dtype) -> bool:
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, _SUPPORTED[dtype])()
