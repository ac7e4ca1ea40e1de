"""Compiles what a Triton host would launch, ahead of time and without a GPU.

`compile` runs this module as a program, with no TRITON_INTERPRET: it reads a JSON list of calls from stdin and prints a
JSON list, for each call its launches, one record a kernel.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Hashable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_MATRIX = r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b"


_SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def tensor(*shape: int, dtype: str) -> dict:
    """An argument of a call."""
    return dict(shape=shape, dtype=dtype)


def call(host: str, function: str, capability: int, arguments: list) -> dict:
    """A call of the function of the module `host`, on a GPU of this compute capability."""
    return dict(host=host, call=function, capability=capability, arguments=arguments)


def compile(calls: dict[Hashable, list[dict]]) -> dict[Hashable, list[dict]]:
    """The records of the kernels that the calls under each key launch, all compiled by one process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot"],
        input=json.dumps([call for each in calls.values() for call in each]),
        cwd=Path(__file__).parent.parent,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    launches = iter(json.loads(done.stdout))
    return {key: [kernel for _ in each for kernel in next(launches)] for key, each in calls.items()}


def check(kernel: dict, capability: int, dtype: str, spilled: int = 0) -> None:
    """The kernel spills at most so many bytes, fits into shared memory, and uses matrix units below float32."""
    assert kernel["spilled"] <= spilled, kernel
    assert kernel["shared"] <= _SHARED_MEMORY[capability], kernel
    assert bool(kernel["matrix"]) == (dtype != "float32"), kernel


class _Driver:
    """Stands in for a GPU of compute capability `device`; nothing is launched."""

    device = 90

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.device, 32)


def _loop(ptx: str) -> str:
    """The body of the kernel's longest loop."""
    labels = {match[1]: match.start() for match in re.finditer(r"^(\$L\w+):", ptx, re.MULTILINE)}
    branches = [(labels[match[1]], match.start()) for match in re.finditer(r"\bbra(?:\.uni)?\s+(\$L\w+);", ptx)]
    start, end = max(branches, key=lambda branch: branch[1] - branch[0], default=(0, 0))
    return ptx[start:end]


def _loads(code: str) -> list[int]:
    """Bytes that one thread reads from global memory by each of these instructions."""
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*\],\s*(0x[0-9a-f]+|\d+)", code)
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)\s", code)
    return [int(size, 0) for size in copies] + [int(vector or 1) * int(bits) // 8 for vector, bits in loads]


def _describe(kernel) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([_CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    loads = _loads(_loop(ptx))
    return dict(
        name=kernel.metadata.name,
        registers=used["REG"],
        spilled=used["STACK"] + used["LOCAL"],
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        matrix=sorted(set(re.findall(_MATRIX, ptx))),
        loop_bytes=sum(loads) * 32 * kernel.metadata.num_warps,
        narrowest_load=min(loads, default=0),
    )


def _argument(value):
    if isinstance(value, dict):
        return torch.empty(value["shape"], dtype=getattr(torch, value["dtype"]), device="meta")
    return value


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    driver = _Driver()
    triton.runtime.driver.set_active(driver)
    launches = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        constants = {name: value for name, value in kwargs.items() if isinstance(value, (int, float, bool))}
        launches.append(_describe(run(self, *args, grid=grid, warmup=True, **kwargs)) | dict(arguments=constants))

    JITFunction.run = compile_only
    results = []
    for call in json.load(sys.stdin):
        driver.device = call["capability"]
        launches.clear()
        getattr(importlib.import_module(call["host"]), call["call"])(*map(_argument, call["arguments"]))
        results.append(list(launches))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
