"""Runs the hosts of the operators as they are, and takes down what they launch. For a worker of tests.ptx."""

import contextlib
import os
from pathlib import Path
from unittest import mock

import torch
import triton

from benchmarks.gpu_model import machine_code
from benchmarks.gpu_model.beside import pytorch_operations
from benchmarks.gpu_model.cases import Case, named
from benchmarks.gpu_model.devices import DEVICES
from benchmarks.gpu_model.facts import Call
from benchmarks.gpu_model.limits import Launch
from benchmarks.gpu_model.record import Recorder
from tests.ptx import hosts
from tests.ptx.parse import Kernel
from tests.test_install import plan


def call(name: str, capabilities: list[int]) -> Call:
    """Of the case of this name, on the GPUs for which its host does not refuse it."""
    case = named(name)
    described = {name: getattr(case, name) for name in Call.__dataclass_fields__ if name != "launches"}
    counted = {}
    for capability in capabilities:
        with contextlib.suppress(ValueError):  # of the host: more than this GPU has room for
            counted[capability] = launches(case, capability)
    return Call(**described, launches=counted)


def versions() -> dict[str, str]:
    """Of what makes the code that is counted."""
    found = plan.find_nvcc()
    nvcc = {"nvcc": found.version} if found else {}
    return {"torch": torch.__version__, "triton": triton.__version__} | nvcc


def launches(case: Case, capability: int) -> list[Launch]:
    """Of a call, kernels in their order and then what PyTorch does, on GPUs of this compute capability."""
    os.environ.pop("TRITON_INTERPRET", None)  # which the tests' folder sets when imported: here Triton compiles
    return (_triton if case.backend == "triton" else _cuda)(case, capability)


def _triton(case: Case, capability: int) -> list[Launch]:
    texts: dict[str, str] = {}

    def keep(name: str, text: str) -> str:
        texts[name] = text
        return text

    def assemble(kernel: Kernel) -> machine_code.MachineCode:
        return machine_code.assemble(texts[kernel.name], kernel.name, capability, *_tools())

    recorder = Recorder(assemble)
    with mock.patch.object(hosts, "launch", recorder), hosts.launches(capability, case.dtype, change=keep):
        return _run(case, recorder)


def _cuda(case: Case, capability: int) -> list[Launch]:
    from tests.ptx import gpu, sources

    stem = sources.stem_of(case.operator)
    device = next(device for device in DEVICES.values() if device.capability == capability)

    def assemble(kernel: Kernel) -> machine_code.MachineCode:
        text = sources.program(stem).modules[capability][kernel.name]
        return machine_code.assemble(text, kernel.name, capability, *_tools(Path(plan.find_nvcc().home) / "bin"))

    recorder = Recorder(assemble)
    with (
        mock.patch.object(gpu, "launch", recorder),
        gpu.Gpu(stem, capability, device.multiprocessors, device.shared_of_block),
    ):
        return _run(case, recorder)


def _run(case: Case, recorder: Recorder) -> list[Launch]:
    arguments = case.arguments()
    with pytorch_operations() as others:
        case.function(*arguments)
    return [*recorder.launches, *others]


def _tools(*folders: Path) -> tuple[str, str]:
    return machine_code.tool("ptxas", *folders), machine_code.tool("nvdisasm", *folders)
