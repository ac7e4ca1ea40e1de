"""The matrix has every Triton kernel, tile and option that the hosts can choose (python -m tests.ptx.coverage)."""

import pytest

pytest.importorskip("triton")

from tests.ptx import coverage
from tests.ptx.triton_matrix import TARGETS


@pytest.fixture(scope="module")
def possible(worker):
    return [launch for dtype in TARGETS for launch in worker.call(coverage.possible, dtype)]


def test_every_kernel_is_covered(worker, possible):
    assert coverage.missing(possible, worker.call(coverage.reached)) == []


def test_a_tile_without_a_call_is_missed(worker, possible):
    reached = worker.call(coverage.reached)
    few = [launch for launch in reached if launch.tile.get("BC") != 128]
    assert any("BC=128" in line for line in coverage.missing(possible, few))


def test_every_host_is_gone_through(possible):
    """Whatever module of the package has Triton kernels."""
    from pathlib import Path

    import tokenfusion

    root = Path(tokenfusion.__file__).parent / "kernels"
    found = {".".join(path.relative_to(root).with_suffix("").parts) for path in root.rglob("triton_*kernels.py")}
    kernels = {launch.kernel.rpartition(".")[0] for launch in possible}
    assert kernels == found
