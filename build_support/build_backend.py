"""setuptools' build backend, made to compile against the torch that the package will run beside.

Build isolation hides the installed packages. Where the target interpreter has torch, its search path is appended for
the build; only where it has none does the build ask for a torch of its own.
"""

import importlib.util
import json
import os
import subprocess
import sys

from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist  # noqa: F401  (hooks)

_SHOW_PATH = "import importlib.util, json, sys; print(json.dumps([bool(importlib.util.find_spec('torch')), sys.path]))"


def _find_torch() -> bool:
    """Whether torch can be imported, if need be from the interpreter's own search path without the isolation."""
    if importlib.util.find_spec("torch"):
        return True
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    answer = subprocess.run([sys.executable, "-c", _SHOW_PATH], env=plain, capture_output=True, check=True)
    found, path = json.loads(answer.stdout.splitlines()[-1])  # .pth files may print, too
    if found:
        sys.path += [entry for entry in path if entry and entry not in sys.path]
    return found


def get_requires_for_build_wheel(config_settings=None):
    return [] if _find_torch() else ["torch>=2.10"]


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _find_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _find_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    sys.modules["torch"] = None  # whose import takes seconds and is of no use here
    try:
        return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)
    finally:
        del sys.modules["torch"]


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel
