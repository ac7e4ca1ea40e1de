"""The sizes at which single_query_attention and the layer around it are measured."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.measure.problem import TRAINING, CaseBase, SmallCall
from tokenfusion.kernels import single_query_attention


@dataclass(frozen=True)
class Case(CaseBase):
    B: int
    N: int
    C: int
    heads: int
    dtype: str = "float32"
    direction: str = "forward"

    def moved(self, shared: int, per_image: int) -> int:
        """Bytes that must move: the tokens once a pass, their gradient once, and the small tensors.

        The backward pass starts after the whole forward pass, so it reads what that read again, and writes a gradient
        for it. Args: elements that a batch shares, and elements of an image beside its tokens.
        """
        elements = shared + self.B * (self.N * self.C + per_image)
        return elements * self.torch_dtype.itemsize * (3 if self.backward else 1)


_SMOKE = [Case(2, 65, 64, 2), Case(2, 65, 64, 2, direction=TRAINING)]
_LENGTHS = (65, 197, 401, 1025, 4097, 16385)
_PASSES = (("float32", "forward"), ("float32", TRAINING), ("bfloat16", "forward"), ("bfloat16", TRAINING))


_QUICK = [Case(64, 401, 384, 6)]


def _full() -> list[Case]:
    passes = [Case(64, 401, 384, 6, *kind) for kind in _PASSES[:3]]
    lengths = [Case(8, n, 384, 6, *kind) for kind in _PASSES for n in _LENGTHS]
    widths = [
        Case(batch, 401, channels, heads, *kind)
        for kind in _PASSES[:3]
        for channels, heads in ((192, 6), (384, 6), (768, 12))
        for batch in (64, 8, 1)
    ]
    return list(dict.fromkeys((*passes, Case(1, 401, 384, 6), *lengths, *widths)))


def _gpu_full() -> list[Case]:
    """A GPU's: CrossViT-15's two branches in batches that fill it, the smaller batches, and lengths for the plots."""
    branches = [Case(256, n, c, 6, *kind) for kind in reversed(_PASSES) for n, c in ((401, 192), (197, 384))]
    batches = [Case(batch, 401, 192, 6, "bfloat16") for batch in (1, 8, 64)]
    lengths = [Case(64, n, 384, 6, *kind) for kind in _PASSES[2:] for n in _LENGTHS]
    return [*branches, *batches, *lengths]


_HEADLINE = [Case(256, 401, 192, 6, "bfloat16", direction) for direction in ("forward", TRAINING)]
_GPU = [
    *_HEADLINE,
    *(Case(256, 197, 384, 6, *kind) for kind in _PASSES[2:]),
    *(Case(256, 401, 192, 6, *kind) for kind in _PASSES[:2]),
    Case(8, 401, 192, 6, "bfloat16"),
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
    """Calls that reach every GPU kernel: with and without splits over the tokens, blocks of queries, unaligned rows."""
    for label, batch, queries, length, channels, extra, normalize, first in (
        ("split over the tokens", 2, 6, 197, 96, True, True, 0),
        ("no split", 300, 3, 20, 16, False, False, 0),
        ("many queries", 1, 24, 18, 512, True, True, 0),
        ("blocks of queries", 1, 40, 18, 272, True, True, 0),
        ("unaligned rows", 2, 3, 50, 24, True, False, 4),
        ("many channels", 2, 20, 50, 1104, True, True, 0),
    ):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, generator=generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        query = (normal(batch, queries, channels) / channels**0.5).to(dtype).requires_grad_()
        tokens = normal(batch, length, channels + first).to(dtype)[..., first:].requires_grad_()
        extra_token = normal(batch, channels).to(dtype).requires_grad_() if extra else None
        function = partial(single_query_attention, normalize=normalize)
        yield SmallCall("single_query_attention", label, function, (query, tokens, extra_token))
