"""On what a run was made; `python -m benchmarks.measure.environment` prints it as JSON."""

import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

from benchmarks.measure import problem, timing
from tokenfusion import environment, precision

COMMIT = "TOKENFUSION_COMMIT"  # the variable that names the commit of a copy without git
_PACKAGES = (
    "triton",
    "timm",
    "rich",
    "PIL",
    "matplotlib",
    "sklearn",
    "pytest",
    "pytest_benchmark",
    "pytest_timeout",
    "setuptools",
    "ninja",
    "safetensors",
    "monai",
    "segmentation_models_pytorch",
    "dynamic_network_architectures",
    "onnxruntime",
    "hypothesis",
)
_ROOT = Path(__file__).parents[2]


def collect(profile: str) -> dict:
    facts = environment.collect()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "profile": profile,
        "device": _device(),
        "versions": facts["versions"],
        "isa": facts["isa"],
        "commit": os.environ.get(COMMIT) or _commit(),
        "cache": timing.policy(),
        "float32_products": precision.in_force(problem.device()),
        "tools": {"nvcc": _nvcc(), "compute-sanitizer": find_tool("compute-sanitizer")},
        "missing_packages": [name for name in _PACKAGES if not importlib.util.find_spec(name)],
    }


def find_tool(name: str) -> str | None:
    """Path of one of CUDA's tools, on PATH or where CUDA usually lies."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def _device() -> dict:
    gpu = torch.cuda.is_available()
    return {
        "kind": "cuda" if gpu else "cpu",
        "name": torch.cuda.get_device_name() if gpu else _cpu_name(),
        "driver": _smi("driver_version") if gpu else None,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()) if gpu else None,
        "clocks": _smi("clocks.sm,clocks.mem,clocks.max.sm,power.limit") if gpu else None,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _smi(query: str) -> str | None:
    lines = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return lines and lines.splitlines()[0]


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _nvcc() -> str | None:
    nvcc = find_tool("nvcc")
    version = nvcc and re.search(r"release ([\d.]+)", _output(nvcc, "--version") or "")
    return version and version[1]


def _commit() -> str | None:
    """The commit of the checkout, marked where files differ from it."""
    return _output("git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    print(json.dumps(collect(profile="none")))
