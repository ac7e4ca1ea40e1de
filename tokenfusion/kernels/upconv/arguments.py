"""What the up-convolutions have in common: checks of their arguments, and which backend can take them."""

import torch

from tokenfusion.kernels import extension, triton_support
from tokenfusion.kernels.checks import check_floating, check_rank, check_same, symbolic

SCALES = (2, 4, 8, 16, 32)
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_upconv(x, weight, bias, skip) -> None:
    """What both operators ask of their common arguments."""
    if symbolic(x, weight, bias, skip):
        return
    check_floating("x", x)
    check_floating("weight", weight)
    check_rank("x", x, "[B, Cin, h, w]")
    check_rank("weight", weight, "[Cin, Cout, k, k]")
    check_same("weight", weight, "x", x)
    channels, out_channels, scale, other = weight.shape
    if scale != other:
        raise ValueError(f"weight: got a kernel of {scale} x {other}, expected a square one, k x k with stride k")
    if x.shape[1] != channels:
        raise ValueError(
            f"weight: got shape {list(weight.shape)}, expected [{x.shape[1]}, Cout, k, k] to match x {list(x.shape)}"
        )
    if 0 in (channels, out_channels, scale, x.shape[2], x.shape[3]):
        raise ValueError(f"x, weight: got shapes {list(x.shape)}, {list(weight.shape)}, expected no size of 0 but B")
    if bias is not None:
        check_floating("bias", bias)
        check_same("bias", bias, "x", x)
        if bias.shape != (out_channels,):
            raise ValueError(f"bias: got shape {list(bias.shape)}, expected [{out_channels}], the channels of weight")
    if skip is not None:
        check_floating("skip", skip)
        check_rank("skip", skip, "[B, Cs, k h, k w]")
        check_same("skip", skip, "x", x)
        batch, _, height, width = x.shape
        if (skip.shape[0], *skip.shape[2:]) != (batch, scale * height, scale * width):
            raise ValueError(
                f"skip: got shape {list(skip.shape)}, expected [{batch}, Cs, {scale * height}, {scale * width}], "
                f"{scale} times the size of x {list(x.shape)}"
            )


def _why_not_kernel(x: torch.Tensor, weight: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """What the kernels of every backend ask of an up-convolution."""
    if x.dtype not in dtypes:
        return f"dtype {x.dtype} is not supported"
    if weight.shape[2] not in SCALES:
        return f"k = {weight.shape[2]} is not one of {', '.join(map(str, SCALES))}"
    return None


def cpu_can_run(x: torch.Tensor, weight: torch.Tensor, *others) -> str | None:
    return extension.why_not_tensor(x) or _why_not_kernel(x, weight, _CPU_DTYPES)


def _library_can_run(x: torch.Tensor, weight: torch.Tensor, *others) -> str | None:
    reason = cpu_can_run(x, weight)
    return reason or (None if extension.own_product_takes(x.dtype) else "every product is the library's")


def _tiles_can_run(x: torch.Tensor, weight: torch.Tensor, *others) -> str | None:
    reason = _library_can_run(x, weight)
    return reason or (None if x.dtype == torch.float32 else "it differs in float32 alone")


CPU_FORMS = {"library": _library_can_run, "tiles": _tiles_can_run}  # see csrc/cpu/upconv_gemm.h


def triton_can_run(x: torch.Tensor, weight: torch.Tensor, *others) -> str | None:
    return triton_support.why_not_tensor(x) or _why_not_kernel(x, weight, _GPU_DTYPES) or _why_not_image(x, weight)


def _why_not_image(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Kernels count the pixels of an image in 32 bits; there may be more in a batch."""
    pixels = x.shape[2] * x.shape[3] * weight.shape[2] ** 2
    return None if pixels < 1 << 31 else f"an image of the result has {pixels} pixels, expected fewer than 2^31"


def _deep_can_run(x: torch.Tensor, weight: torch.Tensor, *others) -> str | None:
    reason = triton_can_run(x, weight)
    return reason or ("there is one size of tiles in float32" if x.dtype == torch.float32 else None)


TRITON_FORMS = {"deep": _deep_can_run}  # see concat/triton_host.py


def cuda_can_run(x: torch.Tensor, weight: torch.Tensor, *others) -> str | None:
    return extension.why_not_cuda_tensor(x) or _why_not_kernel(x, weight, _GPU_DTYPES) or _why_not_numbers(x, weight)


def _why_not_numbers(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """These kernels count the numbers of an image in 32 bits."""
    numbers = weight.shape[1] * x.shape[2] * x.shape[3] * weight.shape[2] ** 2
    return None if numbers < 1 << 31 else f"an up-sampled image has {numbers} numbers, expected fewer than 2^31"
