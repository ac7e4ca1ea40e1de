import pytest

import tokenfusion
from tests.interpreter import DEVICE


@pytest.fixture
def device(backend):
    """Where the backend's tensors are, while it is the one that runs."""
    with tokenfusion.backend(backend):
        yield DEVICE if backend == "triton" else "cpu"
