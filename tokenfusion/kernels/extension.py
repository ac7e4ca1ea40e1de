"""The compiled extension: loads it, or keeps the reason why it is not there."""

import functools
import json
from pathlib import Path

import torch

_BUILD_INFO = Path(__file__).parent.parent / "_build_info.json"


def build_info() -> dict:
    """What setup.py recorded about the build; empty for an installation that never ran it."""
    return json.loads(_BUILD_INFO.read_text()) if _BUILD_INFO.exists() else {}


def _load() -> str | None:
    info = build_info()
    if not info:
        return "not built: the package is used from its sources without an installation"
    if not info["cpp"]["built"]:
        return f"not built: {info['cpp']['reason']}"
    versions = f"built for torch {info['torch']}, found torch {torch.__version__}"
    if _minor(info["torch"]) != _minor(torch.__version__):  # torch's C++ interface changes with each minor version
        return f"{versions}: install tokenfusion again beside this torch"
    try:
        import tokenfusion._C  # noqa: F401  (registers the operators)
    except ImportError as error:
        return f"{versions}, and cannot load ({error}): install tokenfusion again beside this torch"
    return None


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _load_cuda() -> str | None:
    if _error is not None:
        return _error
    cuda = build_info()["cuda"]
    return None if cuda["built"] else f"not built: {cuda['reason']}"


_error = _load()
_cuda_error = _load_cuda()


def why_not() -> str | None:
    """None when the C++ extension is loaded, otherwise the reason."""
    return _error


def why_not_tensor(tensor: torch.Tensor) -> str | None:
    """None when the extension's kernels can take a tensor where this one is, otherwise the reason."""
    return _error or _why_not_on("cpu", tensor)


@functools.cache
def own_product_dtypes() -> tuple[torch.dtype, ...]:
    """What the product of csrc/cpu/common/gemm.h takes here: nothing without vectors."""
    if _error is not None:
        return ()
    from tokenfusion import _C

    if _C.capability() == "default":
        return ()
    return (torch.float32, torch.bfloat16) if _C.takes_bfloat16() else (torch.float32,)


@torch.compiler.assume_constant_result
def own_product_takes(dtype: torch.dtype) -> bool:
    return dtype in own_product_dtypes()


@torch.compiler.assume_constant_result
def threads() -> int:
    """Of the CPU kernels."""
    return torch.get_num_threads()


@torch.compiler.assume_constant_result
def amx_allowed() -> bool:
    """Whether there are tiles for bfloat16 that the kernels may use."""
    if _error is not None:
        return False
    from tokenfusion import _C

    return _C.amx_allowed()


def why_not_cuda() -> str | None:
    """None when the extension holds CUDA kernels and a GPU is here, otherwise the reason."""
    if _cuda_error is not None:
        return _cuda_error
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    return None


def why_not_cuda_tensor(tensor: torch.Tensor) -> str | None:
    """`why_not_tensor` of the CUDA kernels."""
    return why_not_cuda() or _why_not_on("cuda", tensor)


def _why_not_on(device: str, tensor: torch.Tensor) -> str | None:
    return None if tensor.device.type == device else f"tensors are on {tensor.device.type}, expected {device}"
