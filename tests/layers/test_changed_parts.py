"""Whatever is done to a part that a fused layer reads past has the effect that it has on the plain formula."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.surgery.changes import Halving
from tokenfusion.layers import DynaMixerBlock, DynaMixerOp, SingleQueryAttention, TiedFFN, UpConvConcatProject

LAYERS = {
    "block": (lambda: DynaMixerBlock(16, 4, 4), [(2, 4, 4, 16)]),
    "op": (lambda: DynaMixerOp(16, 4, 4), [(2, 4, 16)]),
    "upconv": (lambda: UpConvConcatProject(6, 5, 3, 4), [(2, 6, 4, 4), (2, 3, 8, 8)]),
    "tied": (lambda: TiedFFN(8, 16), [(2, 5, 8)]),
}
OF_BLOCK = [f"{mix}.{part}" for mix in ("mix_h", "mix_w") for part in ("compress", "generate", "out")]
PARTS = [("block", part) for part in ("mix_h", "mix_w", "mlp_c", "reweight", "proj", *OF_BLOCK)]
PARTS += [("op", part) for part in ("compress", "generate", "out")]
PARTS += [("upconv", "up"), ("upconv", "proj"), ("tied", "act")]


class Adapted(nn.Module):
    def __init__(self, part: nn.Module):
        super().__init__()
        self.part, self.factor = part, nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x) * self.factor


def hook(layer: nn.Module, part: str) -> None:
    layer.get_submodule(part).register_forward_hook(lambda module, inputs, output: output * 1.5)


def adapter(layer: nn.Module, part: str) -> None:
    layer.set_submodule(part, Adapted(layer.get_submodule(part)))


def _run(layer: nn.Module, method: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = getattr(layer, method)(*inputs)
    return [out, *torch.autograd.grad(out.square().sum(), [*inputs, *layer.parameters()])]


@pytest.mark.parametrize("change", [hook, adapter])
@pytest.mark.parametrize("kind, part", PARTS)
def test_changed_part(kind, part, change):
    torch.manual_seed(0)
    make, shapes = LAYERS[kind]
    layer, inputs = make(), [torch.randn(shape) for shape in shapes]
    untouched = copy.deepcopy(layer)
    change(layer, part)
    results, expected = _run(layer, "__call__", inputs), _run(layer, "plain_forward", inputs)
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(*inputs), expected[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(untouched(*inputs), expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind, name",
    [("block", "linear"), ("op", "linear"), ("tied", "linear"), ("tied", "gelu"), ("upconv", "conv_transpose2d")],
)
def test_a_replaced_function(kind, name, monkeypatch):
    torch.manual_seed(0)
    make, shapes = LAYERS[kind]
    layer, inputs, function = make(), [torch.randn(shape) for shape in shapes], getattr(F, name)
    monkeypatch.setattr(F, name, lambda *args, **options: 1.5 * function(*args, **options))
    for got, want in zip(_run(layer, "__call__", inputs), _run(layer, "plain_forward", inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [*LAYERS, "attention"])
def test_inputs_of_a_subclass(kind):
    attention = lambda: SingleQueryAttention(8, 2), [(2, 5, 8), (2, 1, 8)]
    torch.manual_seed(0)
    make, shapes = LAYERS.get(kind, attention)
    layer, inputs = make(), [torch.randn(shape).as_subclass(Halving) for shape in shapes]
    with torch.no_grad():
        got, want = layer(*inputs), layer.plain_forward(*inputs)
    assert type(got) is type(want)
    torch.testing.assert_close(*(each.as_subclass(torch.Tensor) for each in (got, want)), rtol=1e-4, atol=1e-5)
