"""The sizes at which dynamic_mixing and DynaMixer's block are measured: images of N x N tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.measure.problem import TRAINING, CaseBase, SmallCall
from tokenfusion.kernels import dynamic_mixing


@dataclass(frozen=True)
class Case(CaseBase):
    B: int
    N: int
    D: int
    S: int
    d: int = 2
    dtype: str = "float32"
    direction: str = "forward"

    @property
    def tokens(self) -> int:
        return self.B * self.N**2

    def moved(self, shared: int, outputs: int) -> int:
        """Bytes that must move: the tokens and what a pass makes of them.

        The backward pass reads the tokens again, and the gradient of the output, and writes that of the tokens. Args:
        elements that a batch shares, and how many tensors of the size of the tokens the forward pass writes.
        """
        elements = shared + self.tokens * self.D * (1 + outputs)
        if self.backward:
            elements += 2 * shared + self.tokens * self.D * (2 + outputs)
        return elements * self.torch_dtype.itemsize

    def mixing_flops(self) -> int:
        """One direction after the compression: generate and mix; in training again, and the gradients of both."""
        generate, mix = 2 * self.tokens * self.S * self.N**2 * self.d, 2 * self.tokens * self.N * self.D
        return 4 * generate + 3 * mix if self.backward else generate + mix

    def linear_flops(self, outputs: int) -> int:
        """A linear layer from D to `outputs` on every token."""
        return (3 if self.backward else 1) * 2 * self.tokens * self.D * outputs


_SMALL_1, _SMALL_2 = Case(8, 32, 192, 8), Case(32, 16, 384, 16)
_SMOKE = [Case(2, 7, 24, 3), Case(2, 7, 24, 3, direction=TRAINING)]
_QUICK = [_SMALL_1]


def _full() -> list[Case]:
    kinds = [(dtype, direction) for dtype in ("float32", "bfloat16") for direction in ("forward", TRAINING)]
    stages = [_SMALL_1, _SMALL_2, Case(8, 32, 256, 8, 8), Case(32, 16, 512, 16, 8)]
    every = [replace(case, dtype=dtype, direction=direction) for case in stages for dtype, direction in kinds]
    lengths = [replace(_SMALL_1, N=n) for n in (7, 14, 20, 33, 64)]
    others = [replace(_SMALL_1, S=s) for s in (1, 2, 4)] + [replace(_SMALL_1, d=d) for d in (1, 4, 8)]
    batches = [replace(case, B=b) for case in (_SMALL_1, _SMALL_2) for b in (1, 64)]
    return list(dict.fromkeys((*every, *lengths, *others, *batches)))


def _gpu_full() -> list[Case]:
    """The stages of DynaMixer-S and -L in batches that fill a GPU, one image, and lengths."""
    passes = [(dtype, direction) for dtype in ("bfloat16", "float32") for direction in ("forward", TRAINING)]
    stages = [Case(64, 32, 192, 8), Case(64, 16, 384, 16), Case(64, 32, 256, 8, 8), Case(64, 16, 512, 16, 8)]
    named = [replace(case, dtype=dtype, direction=way) for dtype, way in passes for case in stages[:2]]
    large = [replace(case, dtype="bfloat16", direction=way) for _, way in passes[:2] for case in stages[2:]]
    batches = [replace(stages[0], B=b, dtype="bfloat16") for b in (1, 8, 256)]
    lengths = [replace(stages[0], B=16, N=n, dtype="bfloat16") for n in (7, 14, 20, 33, 64)]
    return [*named, *large, *batches, *lengths]


_HEADLINE = [Case(64, 32, 192, 8, dtype="bfloat16", direction=direction) for direction in ("forward", TRAINING)]
_GPU = [
    *_HEADLINE,
    *(Case(64, 16, 384, 16, dtype="bfloat16", direction=direction) for direction in ("forward", TRAINING)),
    Case(64, 32, 192, 8),
]
CASES = {
    "smoke": _SMOKE,
    "quick": _QUICK,
    "full": _full(),
    "headline": _HEADLINE,
    "gpu": _GPU,
    "gpu-full": _gpu_full(),
}
OF_BLOCK = CASES | {"headline": _HEADLINE[:1], "gpu": _HEADLINE}


def small_calls(dtype: torch.dtype) -> Iterator[SmallCall]:
    """Calls that reach every GPU kernel: both directions, N that fills a tile and not, wide and narrow segments."""
    for label, height, width, channels, segments, reduced, dim in (
        ("columns", 16, 5, 48, 3, 2, 1),
        ("rows, N not a power of two", 3, 7, 24, 4, 1, 2),
        ("one segment, d 16", 4, 20, 32, 1, 16, 2),
    ):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, generator=generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator).div(shape[-1] ** 0.5).to(dtype).requires_grad_()

        length = (height, width)[dim - 1]
        x = torch.randn(2, height, width, channels, generator=generator).to(dtype).requires_grad_()
        compress = normal(segments * reduced, channels), normal(segments * reduced)
        generate = normal(length**2, length * reduced), normal(length**2)
        function = partial(dynamic_mixing, segments=segments, dim=dim)
        yield SmallCall("dynamic_mixing", label, function, (x, *compress, *generate))
