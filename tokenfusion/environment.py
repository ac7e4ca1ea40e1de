"""Versions, what was built, what can run here and why the rest cannot, as plain data."""

import importlib.metadata
import platform

import torch

import tokenfusion
from tokenfusion.kernels import dispatch, extension
from tokenfusion.tuning import files


def collect() -> dict:
    """What `tokenfusion info` shows."""
    return {
        "versions": {
            "tokenfusion": tokenfusion.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _installed("triton"),
            "timm": _installed("timm"),
            "CUDA of torch": torch.version.cuda,
            "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "build": extension.build_info(),
        "isa": _isa(),
        "backend": dispatch.get_backend(),
        "backend of the process": dispatch.process_backend(),
        "backends": {name: {"runs": why is None, "reason": why} for name, why in tokenfusion.backends().items()},
        "tuning": _tuning(),
        "operators": {operator.name: _implementations(operator) for operator in dispatch.OPERATORS.values()},
    }


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _isa() -> str | None:
    """Instruction set of the C++ kernels that run here; None when the extension is not loaded."""
    if extension.why_not() is not None:
        return None
    from tokenfusion import _C

    return _C.capability()


def _tuning() -> dict:
    loaded = files.loaded()
    return {
        "file": None if loaded.path is None else str(loaded.path),
        "digest": loaded.digest or None,
        "choices": len(loaded.table.choices),
        "ignored": list(loaded.ignored),
        "remark": loaded.remark,
    }


def _implementations(operator: dispatch.Operator) -> dict[str, dict]:
    here = tokenfusion.backends()
    return {
        implementation.backend: {
            "runs": here[implementation.backend] is None,
            "automatic": implementation.automatic,
            "reason": here[implementation.backend],
        }
        for implementation in operator.implementations
        if not implementation.form
    }
