import importlib

import pytest

import tokenfusion
from tests.conftest import ROOT
from tests.training.small import painted

EXAMPLES = str(ROOT / "examples")


@pytest.fixture
def program(monkeypatch):
    """A program among the examples, as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module
    tokenfusion.set_backend("auto")


@pytest.fixture
def folder(tmp_path):
    return painted(tmp_path / "images")
