"""Has a worker of tests.ptx count calls: Triton compiles there, and tensors of the CPU are for its kernels."""

from benchmarks.gpu_model.facts import Call
from tests.ptx.worker import Worker


def count(worker: Worker, name: str, capabilities: list[int]) -> Call:
    return worker.call(_call, name, capabilities)


def versions(worker: Worker) -> dict[str, str]:
    return worker.call(_versions)


def _call(name: str, capabilities: list[int]) -> Call:
    from benchmarks.gpu_model import measure

    return measure.call(name, capabilities)


def _versions() -> dict[str, str]:
    from benchmarks.gpu_model import measure

    return measure.versions()
