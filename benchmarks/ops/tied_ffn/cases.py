"""The sizes at which tied_ffn is measured."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.measure.problem import TRAINING, CaseBase, SmallCall
from tokenfusion.kernels import tied_ffn
from tokenfusion.kernels.tied_ffn import reference


@dataclass(frozen=True)
class Case(CaseBase):
    N: int
    C: int
    F: int
    dtype: str = "float32"
    direction: str = "forward"
    activation: str = "gelu"

    def moved(self) -> int:
        """Bytes that must move: x, the weight and y; again, with their gradients, for the backward pass."""
        elements = 2 * self.N * self.C + self.F * self.C
        return elements * self.torch_dtype.itemsize * (3 if self.backward else 1)

    def flops(self) -> int:
        """Of the matrix products that must be done, two forward and four backward; computing again is one more."""
        return (6 if self.backward else 2) * 2 * self.N * self.C * self.F


_KINDS = [(dtype, direction) for dtype in ("float32", "bfloat16") for direction in ("forward", TRAINING)]
_SMOKE = [Case(70, 16, 40), Case(70, 16, 40, direction=TRAINING)]
_NAMED = [*(Case(3152, 384, 1536, *kind) for kind in _KINDS), Case(197, 384, 1536)]  # 16 images and one, as in DeiT-S


def _full() -> list[Case]:
    lengths = [Case(n, 384, 1536, *kind) for kind in _KINDS for n in (1024, 4096, 16384, 65536)]
    widths = [Case(12608, c, 4 * c, *kind) for kind in _KINDS for c in (96, 192, 384, 768, 1024)]
    return list(dict.fromkeys((*_NAMED, *lengths, *widths)))


def _gpu_full() -> list[Case]:
    """64 images of DeiT-S, the narrow layers that a back-to-back kernel is for, and what fills a large GPU."""
    kinds = _KINDS[::-1]
    named = [Case(12608, 384, 1536, *kind) for kind in kinds]
    sizes = [(65536, 96), (65536, 128), (12608, 192), (32768, 768), (32768, 1024), (1024, 384)]
    tanh = Case(12608, 384, 1536, "bfloat16", activation="gelu_tanh")  # which cuBLASLt has, too
    return [*named, tanh, *(Case(n, c, 4 * c, *kind) for n, c in sizes for kind in kinds[:2])]


_HEADLINE = [Case(12608, 384, 1536, "bfloat16", TRAINING)]
_GPU = [
    *_HEADLINE,
    Case(12608, 384, 1536, "bfloat16"),
    Case(65536, 96, 384, "bfloat16", TRAINING),
    Case(12608, 384, 1536),
]
CASES = {
    "smoke": _SMOKE,
    "quick": _NAMED[1:2],
    "full": _full(),
    "headline": _HEADLINE,
    "gpu": _GPU,
    "gpu-full": _gpu_full(),
}


def small_calls(dtype: torch.dtype) -> Iterator[SmallCall]:
    """Calls that reach every GPU kernel: narrow and wide, sizes that fill a tile and not, with what is held, and each
    activation."""
    for label, tokens, channels, features, recompute, activation in (
        ("narrow", 70, 16, 40, True, "gelu"),
        ("wide", 50, 136, 72, True, "gelu"),
        ("held", 33, 24, 64, False, "gelu"),
        *((activation, 21, 8, 19, True, activation) for activation in reference.ACTIVATIONS if activation != "gelu"),
    ):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, generator=generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator).div(shape[-1] ** 0.5).to(dtype).requires_grad_()

        x = torch.randn(tokens, channels, generator=generator).to(dtype).requires_grad_()
        tensors = x, normal(features, channels), normal(features), normal(channels)
        call = partial(tied_ffn, recompute=recompute, activation=activation)
        yield SmallCall("tied_ffn", label, call, tensors)
