"""A process that runs functions for tests, in which Triton compiles and `hosts.launches` runs what it compiled.

Tests have Triton interpret its kernels, which is decided when it is imported: hence another process. It keeps what it
compiled and parsed from one call to the next.
"""

import importlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


class Worker:
    """Compiled kernels stay in the folder `cache` for other workers; none is for one that compiles nothing."""

    def __init__(self, cache: Path = Path(os.devnull)):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ptx.worker"],
            cwd=ROOT,
            env=os.environ | {"TRITON_CACHE_DIR": str(cache)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def call(self, function: Callable, *args, **kwargs):
        """What the function returns there; AssertionError with its traceback where it raises."""
        pickle.dump((function.__module__, function.__qualname__, args, kwargs), self._process.stdin)
        self._process.stdin.flush()
        try:
            result, error = pickle.load(self._process.stdout)
        except EOFError:
            raise AssertionError(f"the worker ended with {self._process.wait()}") from None
        assert error is None, error
        return result

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait()


def _start() -> None:
    """Triton is imported as a compiler, and tokenfusion as if Triton interpreted its kernels on CPU tensors."""
    os.environ.pop("TRITON_INTERPRET", None)
    importlib.import_module("triton")
    os.environ |= {"TRITON_INTERPRET": "1", "TOKENFUSION_TUNING": "0"}
    importlib.import_module("tokenfusion")
    del os.environ["TRITON_INTERPRET"]
    importlib.import_module("torch").set_num_threads(1)
    importlib.import_module("tests.garbage").look_among_what_comes()


def _serve() -> None:
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    _start()
    while True:
        try:
            module, name, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = getattr(importlib.import_module(module), name)(*args, **kwargs), None
        except Exception:
            answer = None, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
