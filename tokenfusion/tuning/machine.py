"""What a measurement holds for: the device, the versions, and the sources of the kernels."""

import functools
import hashlib
import importlib.metadata
import platform
import re
from pathlib import Path

import torch

from tokenfusion.kernels import extension

_KERNELS = Path(extension.__file__).parent


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def name() -> str:
    """Of the GPU, or of the processor's instruction set, as a file name."""
    words = torch.cuda.get_device_name() if device() == "cuda" else " ".join(("cpu", platform.machine(), *_isa()))
    return "-".join("".join(c if c.isalnum() else " " for c in words.lower()).split())


def conditions() -> dict[str, str | int]:
    """What has to be the same for a file to be followed."""
    found = {
        "device": name(),
        "kernels": sources(),
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "triton": _version("triton"),
    }
    if device() == "cuda":
        return found | {"compute capability": "{}.{}".format(*torch.cuda.get_device_capability())}
    return found | {"threads": torch.get_num_threads()}


def noted() -> dict[str, str]:
    """What is written beside them for people to read."""
    found = {"processor": _processor(), "torch": torch.__version__, "python": platform.python_version()}
    return found | {"driver": _driver()} if device() == "cuda" else found


@functools.cache
def sources() -> str:
    """A digest of the kernels: of their Python sources, and of what the extension was built from."""
    digest = hashlib.sha256(str(extension.build_info().get("sources", "")).encode())
    for path in sorted(_KERNELS.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _isa() -> tuple[str, ...]:
    if extension.why_not() is not None:
        return ()
    from tokenfusion import _C

    amx = torch.cpu._is_amx_tile_supported()
    return (_C.capability(), "amx") if amx else (_C.capability(),)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _processor() -> str:
    lines = _lines("/proc/cpuinfo")
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _driver() -> str:
    """Of the GPU, as the kernel's module says it."""
    found = re.search(r"\d+\.\d[\d.]*", "".join(_lines("/proc/driver/nvidia/version")[:1]))
    return found[0] if found else "unknown"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
