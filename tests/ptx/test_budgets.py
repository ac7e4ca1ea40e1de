"""No GPU kernel gets fatter unseen: instructions, traffic, registers and spills stay within their budgets.

What a kernel issues and moves is counted in the interpreter on few blocks of small calls, in the machine code of sm_90.
"""

import importlib.metadata
import json
from pathlib import Path

import pytest

from benchmarks.gpu_model import budgets, counting
from benchmarks.gpu_model.cases import SMALL_CASES
from tests.ptx.sources import MARKS
from tests.sass import NVCC

BUDGETS = Path(__file__).with_name("budgets.json")
VERSIONS = json.loads(BUDGETS.read_text())["versions"]


def with_marks(case):
    return pytest.param(str(case), marks=MARKS if case.backend == "cuda" else (), id=str(case).replace(" ", "-"))


def compilers() -> dict[str, str]:
    return {"triton": importlib.metadata.version("triton")} | ({"nvcc": NVCC.version} if NVCC else {})


@pytest.mark.parametrize("name", [with_marks(case) for case in SMALL_CASES])
def test_budgets_are_held(worker, name):
    pytest.importorskip("triton")
    compiler = "nvcc" if " cuda " in name else "triton"
    if compilers()[compiler] != VERSIONS[compiler]:
        pytest.skip(f"the budgets are for {compiler} {VERSIONS[compiler]}, here is {compilers()[compiler]}")
    found = budgets.exceeded(counting.count(worker, name, [budgets.CAPABILITY]), BUDGETS)
    assert not found, "\n".join([*found, f"If it has to be so: {budgets.regenerate(BUDGETS)}"])


def test_every_small_call_has_a_budget_and_no_other():
    assert list(json.loads(BUDGETS.read_text())["budgets"]) == list(map(str, SMALL_CASES))
