import pytest

from tests.ptx import triton_matrix
from tests.ptx.triton_calls import check
from tests.ptx.worker import Worker


@pytest.fixture(scope="session")
def worker(request, tmp_path_factory):
    """Keeps the kernels that it compiled in pytest's cache, if there is one, for other workers and later runs."""
    cache = getattr(request.config, "cache", None)
    with Worker(cache.mkdir("triton_ptx") if cache else tmp_path_factory.mktemp("triton_ptx")) as worker:
        yield worker


@pytest.fixture
def run(worker):
    """Checks a call of a group on the worker, and that the group's kernels were interpreted there."""

    def run(group, call, capability, **options):
        launches = worker.call(check, call, capability, **options)
        ran = {launch.kernel.rpartition(".")[2] for launch in launches}
        assert ran >= triton_matrix.KERNELS[group], ran
        assert all(launch.running > 0 and launch.capability == capability for launch in launches)
        return launches

    return run
