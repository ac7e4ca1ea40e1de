"""python -m tests.gpu_check.fake_run: a check whose programs are all `fake_program`, with two kernels and two files."""

import os
import sys
from pathlib import Path

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import process, runner, steps

FAKE = Path(os.environ["FAKE"])
PROGRAM = "tests.gpu_check.fake_program"


def put_fakes_in_place() -> None:
    steps.python = lambda *arguments: [sys.executable, "-m", PROGRAM, *arguments]
    steps.gpu_kernels = lambda: [("one", "cuda"), ("two", "triton")]
    steps.gpu_tests = lambda: ["tests/one/test_cuda.py", "tests/two/test_triton.py"]
    steps.suites = lambda: ["one", "two"]
    steps._is_built = lambda check: (FAKE / "built").exists()
    steps._build_info = lambda: {part: {"built": (FAKE / "built").exists(), "reason": None} for part in ("cpp", "cuda")}
    process._POLL_SECONDS = 0.01
    runner._LEAST_SECONDS = gpu_check._LEAST_SECONDS = 0.1


if __name__ == "__main__":
    put_fakes_in_place()
    sys.exit(gpu_check.main())
