"""The calls that the model is made for: every GPU kernel at its main sizes, with inputs for the kernels to run on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch

from benchmarks.gpu_model import facts
from benchmarks.gpu_model.facts import BACKWARD, FORWARD

_PATTERN = 1 << 16


@dataclass(frozen=True)
class Case:
    """A call of one pass of an operator.

    sizes: as in the cases of benchmarks/ops, so that a record's rows are found again. unit, units: what instructions
    are counted for, and how many of it there are. must_move: bytes of what goes in and comes out. arguments: makes
    those of the operator's pass, on the CPU and full of numbers.
    """

    operator: str
    backend: str
    direction: str
    dtype: str
    sizes: dict[str, int | str]
    unit: str
    units: int
    must_move: int
    arguments: Callable[[], tuple]

    def __str__(self) -> str:
        return facts.name(self)

    @property
    def function(self) -> Callable:
        part = "_backward" if self.direction == BACKWARD else ""
        return getattr(torch.ops.tokenfusion, f"{self.operator}{part}_{self.backend}")


def _numbers(*shape: int, dtype: str, scale: float = 1.0, channels_last: bool = False) -> torch.Tensor:
    """A random pattern again and again: large tensors are made as fast as memory is written."""
    dtype = getattr(torch, dtype)
    pattern = torch.randn(_PATTERN - 1, generator=torch.Generator().manual_seed(0)).mul(scale).to(dtype)
    flat = torch.empty(math.prod(shape), dtype=dtype)
    for first in range(0, len(flat), len(pattern)):
        part = flat[first : first + len(pattern)]
        part.copy_(pattern[: len(part)])
    if not channels_last:
        return flat.view(shape)
    batch, channels, height, width = shape
    return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _bytes(dtype: str, *counts: int) -> int:
    return sum(counts) * getattr(torch, dtype).itemsize


def _single_query_attention(
    backend: str, direction: str, dtype: str, C: int, Q: int, B: int = 256, N: int = 401
) -> Case:
    tokens, small, tensor = B * N * C, B * Q * C, partial(_numbers, dtype=dtype)
    needed = [True, True, False]

    def forward():
        return tensor(B, Q, C, scale=C**-0.5), tensor(B, N, C), None, None, None, True, 1e-6

    def backward():
        inputs = tensor(B, Q, C, scale=C**-0.5), tensor(B, N, C), None, None, None
        log_sum_exp = torch.full((B, Q), math.log(N))
        return tensor(B, Q, C), *inputs, tensor(B, Q, C), log_sum_exp, True, 1e-6, needed

    is_forward = direction == FORWARD
    moved = _bytes(dtype, *((tokens, 2 * small) if is_forward else (2 * tokens, 4 * small)))
    return Case(
        "single_query_attention",
        backend,
        direction,
        dtype,
        {"B": B, "N": N, "C": C, "heads": Q},
        "16 tokens",
        B * -(-N // 16),
        moved,
        forward if is_forward else backward,
    )


def _dynamic_mixing(backend: str, direction: str, dtype: str, N: int, D: int, S: int, d: int = 2, B: int = 64) -> Case:
    tensor = partial(_numbers, dtype=dtype)
    x, z, weight = (B, N, N, D), (B, N, N, S * d), (N * N, N * d)

    def forward():
        scale = (N * d) ** -0.5
        return tensor(*x), tensor(*z), tensor(*weight, scale=scale), tensor(N * N), S, 1, False

    def backward():
        return tensor(*x), None, *forward()[:-1], [True] * 4

    parameters = math.prod(weight) + N * N
    passes = (2, 1, 1) if direction == FORWARD else (3, 2, 2)  # of tokens, compressed tokens and the generator
    elements = (passes[0] * math.prod(x), passes[1] * math.prod(z), passes[2] * parameters)
    return Case(
        "dynamic_mixing",
        backend,
        direction,
        dtype,
        {"B": B, "N": N, "D": D, "S": S, "d": d},
        "row",
        B * N * S,
        _bytes(dtype, *elements),
        forward if direction == FORWARD else backward,
    )


def _tied_ffn(backend: str, direction: str, dtype: str, N: int = 12608, C: int = 384, F: int = 1536) -> Case:
    tensor = partial(_numbers, dtype=dtype)

    def forward():
        return tensor(N, C), tensor(F, C, scale=C**-0.5), tensor(F), tensor(C), "gelu", False

    def backward():
        x, weight, bias, _, activation, _ = forward()
        return tensor(N, C), x, weight, bias, x.new_empty(0), activation, [True] * 4

    elements = (2 * N * C, F * C) if direction == FORWARD else (3 * N * C, 2 * F * C)
    return Case(
        "tied_ffn",
        backend,
        direction,
        dtype,
        {"N": N, "C": C, "F": F, "activation": "gelu"},
        "token",
        N,
        _bytes(dtype, *elements),
        forward if direction == FORWARD else backward,
    )


def _upconv(
    direction: str, format: str, sizes: dict[str, int], backend: str = "triton", dtype: str = "bfloat16"
) -> Case:
    B, Cin, Cout, Cs, size, k, Cp = (sizes[name] for name in ("B", "Cin", "Cout", "Cs", "size", "k", "Cp"))
    image = partial(_numbers, dtype=dtype, channels_last=format == "nhwc")
    tensor = partial(_numbers, dtype=dtype)
    fine = k * size
    is_last = format == "nhwc"

    def operands():
        x, weight = image(B, Cin, size, size), image(Cin, Cout, k, k, scale=Cin**-0.5)
        return x, weight, tensor(Cout), image(B, Cs, fine, fine)

    def projections():
        return (tensor(Cp, each, scale=each**-0.5) for each in (Cout, Cs))

    def forward():
        if Cp:
            return *operands(), *projections(), is_last
        return *operands(), False, is_last

    def backward():
        x, weight, _, skip = operands()
        if Cp:
            return image(B, Cp, fine, fine), x, weight, skip, *projections(), [True] * 6
        return image(B, Cout + Cs, fine, fine)[:, :Cout], x, weight, [True] * 3

    coarse, pixels, weights = B * Cin * size**2, B * fine**2, Cin * Cout * k**2 + Cp * (Cout + Cs)
    if direction == FORWARD:
        elements = coarse, weights, pixels * (Cs + (Cp or Cout + Cs))
    else:
        elements = 2 * coarse, 2 * weights, pixels * (2 * Cs + Cp if Cp else Cout)
    return Case(
        "upconv_concat_project" if Cp else "upconv_concat",
        backend,
        direction,
        dtype,
        {**sizes, "format": format},
        "pixel",
        B * size**2,
        _bytes(dtype, *elements),
        forward if direction == FORWARD else backward,
    )


_PASSES = (FORWARD, BACKWARD)
_BACKENDS = ("triton", "cuda")
_DTYPES = ("bfloat16", "float32")
_FORMATS = ("nhwc", "nchw")
_WIDTHS = ((192, 6), (384, 6), (768, 12))
_MORE = ({"C": 768, "Q": 64}, {"C": 1024, "Q": 64}, {"C": 2048, "Q": 32, "N": 50})  # the last is CLIP's pooling
_STAGES = ({"N": 32, "D": 192, "S": 8}, {"N": 16, "D": 384, "S": 16})  # 1 and 3 of DynaMixer-S
_NARROW = {"N": 65536, "C": 96, "F": 384}  # where Triton keeps the hidden layer on chip
_MAPS = (
    {"B": 64, "Cin": 768, "Cout": 768, "Cs": 768, "size": 7, "k": 2},
    {"B": 16, "Cin": 256, "Cout": 128, "Cs": 128, "size": 64, "k": 2},
)
_JOINED = tuple(sizes | {"Cp": 0} for sizes in _MAPS)
_PROJECTED = _MAPS[0] | {"Cp": 768}, _MAPS[1] | {"Cp": 64}
_SMALL_MAP = {"B": 1, "Cin": 128, "Cout": 64, "Cs": 64, "size": 16, "k": 2}

CASES = (
    *(
        _single_query_attention(backend, direction, dtype, *width)
        for dtype, direction, width, backend in product(_DTYPES, _PASSES, _WIDTHS, _BACKENDS)
    ),
    *(
        _single_query_attention(backend, direction, "bfloat16", **sizes)
        for direction, sizes, backend in product(_PASSES, _MORE, _BACKENDS)
    ),
    *(
        _dynamic_mixing(backend, direction, "bfloat16", **stage)
        for direction, stage, backend in product(_PASSES, _STAGES, _BACKENDS)
    ),
    *(_tied_ffn(backend, direction, dtype) for dtype, direction, backend in product(_DTYPES, _PASSES, _BACKENDS)),
    *(_tied_ffn(backend, direction, "bfloat16", **_NARROW) for direction, backend in product(_PASSES, _BACKENDS)),
    *(
        _upconv(direction, format, sizes, backend)
        for sizes, direction, format, backend in product(_JOINED, _PASSES, _FORMATS, _BACKENDS)
    ),
    *(_upconv(direction, format, sizes) for sizes, direction, format in product(_PROJECTED, _PASSES, _FORMATS)),
)

# What tests hold to its budget: the same kernels and tiles, on less.
SMALL_CASES = (
    *(
        _single_query_attention(backend, direction, dtype, 192, 6, N=97)
        for dtype, direction, backend in product(_DTYPES, _PASSES, _BACKENDS)
    ),
    # Backward alone: forward, what strips cost depends on scores of blocks that do not run.
    _single_query_attention("cuda", "backward", "bfloat16", 2560, 40, B=4, N=50),
    *(
        _dynamic_mixing(backend, direction, "bfloat16", **_STAGES[1], B=4)
        for direction, backend in product(_PASSES, _BACKENDS)
    ),
    *(
        _tied_ffn(backend, direction, dtype, N=256, C=192, F=192)
        for dtype, direction in (("bfloat16", FORWARD), ("bfloat16", BACKWARD), ("float32", FORWARD))
        for backend in _BACKENDS
    ),
    *(
        _upconv(direction, format, _SMALL_MAP | {"Cp": Cp})
        for Cp, direction, format in product((0, 64), _PASSES, _FORMATS)
        if not (Cp and direction == BACKWARD)  # the same kernels as without
    ),
    *(_upconv(direction, format, _SMALL_MAP | {"Cp": 0}, "cuda") for direction, format in product(_PASSES, _FORMATS)),
    *(_upconv(direction, "nchw", _SMALL_MAP | {"Cp": 0, "size": 7}, "cuda") for direction in _PASSES),
)


def named(name: str) -> Case:
    return next(case for case in (*CASES, *SMALL_CASES) if str(case) == name)
