"""The parity rule where PyTorch rounds as it does on other processors, on a telling handful of its tests."""

import os
import platform
import subprocess
import sys

import pytest

from tests.conftest import ROOT

TESTS = [
    "tests/models/test_crossvit.py::test_gradients_are_those_of_timm",
    "tests/surgery/test_families.py::test_drop_in[dtype0-False-cait]",
    "tests/single_query_attention/test_cpu.py::test_any_channels",
    "tests/upconv/test_cpu.py::test_both_orders_of_the_projection",
    "tests/dynamic_mixing/test_cpu.py::test_any_segments",
    "tests/tied_ffn/test_cpu.py::test_any_widths",
]
SETTINGS = [("ATEN_CPU_CAPABILITY", "default"), ("ATEN_CPU_CAPABILITY", "avx2"), ("ONEDNN_MAX_CPU_ISA", "AVX2")]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the instruction sets are those of x86")
@pytest.mark.parametrize("variable, value", SETTINGS)
def test_parity(variable, value):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
        cwd=ROOT,
        env=os.environ | {variable: value},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
