"""An up-convolution and its fused twin: everything that a use of the one gives, the other has to give."""

import copy
from collections.abc import Callable

import torch
from torch import nn

import tokenfusion
from tokenfusion.kernels import dispatch


def upconv(k: int = 2, **changes) -> nn.ConvTranspose2d:
    torch.manual_seed(0)
    return nn.ConvTranspose2d(6, 4, k, k, **changes)


def fused_copy(plain: nn.Module) -> nn.Module:
    """An up-convolution is fused as a part of a model, so that it defers."""
    fused = copy.deepcopy(plain)
    tokenfusion.fuse(nn.ModuleList([fused]) if isinstance(fused, nn.ConvTranspose2d) else fused, strict=True)
    return fused


def inputs(scale: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """x and skip."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 6, 3, 5, generator=generator)
    return x.requires_grad_(), torch.randn(2, 3, 3 * scale, 5 * scale, generator=generator).requires_grad_()


def outcome(use: Callable, up: nn.Module, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """What use(up, *tensors) returns, what autograd says of it, and every gradient of the sum of its squares."""
    tensors = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    torch.manual_seed(1)
    returned = use(up, *tensors)
    results = returned if isinstance(returned, (tuple, list)) else [returned]
    found = {f"{i} {fact}": torch.tensor(getattr(r, fact)) for i, r in enumerate(results) for fact in _FACTS}
    recorded = [result for result in results if result.requires_grad and result.grad_fn is not None]
    if recorded:
        sum(result.square().sum() for result in recorded).backward()
    found |= {f"result {i}": result.detach() for i, result in enumerate(results)}
    named = {f"input {i}": t for i, t in enumerate(tensors)} | dict(up.named_parameters())
    found |= {f"gradient of {name}": t.grad.clone() for name, t in named.items() if t.grad is not None}
    up.zero_grad()
    return found


_FACTS = ("requires_grad", "is_leaf")


def check(use: Callable, *tensors, up: nn.Module | None = None, runs: bool | None = True, tolerance: float = 1e-5):
    """use(up, *tensors) gives the same with up as it is and fused; runs: the operator does or not, None to not look."""
    plain = upconv() if up is None else up
    fused, tensors = fused_copy(plain), tensors or inputs()
    expected = outcome(use, plain, *tensors)
    if runs is None:
        actual = outcome(use, fused, *tensors)
    else:
        with dispatch.observe() as seen:
            actual = outcome(use, fused, *tensors)
        assert (("upconv_concat", "cpu") in seen.ran) == runs
    assert list(actual) == list(expected)
    for name, value in expected.items():
        stride = name.startswith("result")
        scale = tolerance * max(1.0, value.abs().max().item()) if value.is_floating_point() else 0
        limits = {"rtol": 0, "atol": scale, "check_stride": stride, "equal_nan": True}
        torch.testing.assert_close(actual[name], value, **limits, msg=lambda text, name=name: f"{name}: {text}")
