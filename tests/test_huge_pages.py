"""Large results on a CPU lie in memory that huge pages were asked for."""

import re
from pathlib import Path

import pytest
import torch

from tokenfusion import kernels

SMAPS, SUPPORT = Path("/proc/self/smaps"), Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = [
    pytest.mark.backend("cpu"),
    pytest.mark.skipif(not (SUPPORT.exists() and SMAPS.exists()), reason="Linux with huge pages alone"),
]


def is_advised(tensor: torch.Tensor) -> bool:
    middle = tensor.data_ptr() + tensor.nbytes // 2
    for region in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text()):
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", region)
        if bounds and int(bounds[1], 16) <= middle < int(bounds[2], 16):
            return " hg" in region
    raise AssertionError("no region holds the tensor")


def weight(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes).div_(sizes[-1] ** 0.5)


CALLS = {  # the operator of the first argument, which gets a gradient as large
    "single_query_attention": lambda x: kernels.single_query_attention(weight(8, 3, 64), x.view(8, -1, 64)),
    "dynamic_mixing": lambda x: kernels.dynamic_mixing(
        x.view(-1, 8, 8, 64), weight(8, 64), weight(8), weight(64, 16), weight(64), segments=4, dim=1
    ),
    "tied_ffn": lambda x: kernels.tied_ffn(x.view(-1, 64), weight(128, 64)),
    "upconv_concat": lambda x: kernels.upconv_concat(
        x.view(4, -1, 128, 128), weight(80, 16, 2, 2), weight(16), weight(4, 8, 256, 256)
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_large_results_and_gradients(name):
    x = torch.randn(5 << 20, requires_grad=True)
    out = CALLS[name](x)
    if out.nbytes > 8 << 20:
        assert is_advised(out)
    grads = []
    out.grad_fn.register_hook(lambda inputs, _: grads.extend(g for g in inputs if g is not None))
    out.sum().backward()
    large = [grad for grad in grads if grad.nbytes > 8 << 20]
    assert large and all(map(is_advised, large))
