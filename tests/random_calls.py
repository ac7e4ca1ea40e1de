"""Calls of the operators with random sizes, dtypes and layouts of every operand."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tokenfusion import kernels
from tokenfusion.kernels import gated_sum
from tokenfusion.kernels.attention import attention
from tokenfusion.kernels.linear import linear
from tokenfusion.kernels.mlp import mlp

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LAYOUTS = ("contiguous", "offset", "sliced", "stepped", "permuted", "expanded")


@dataclass(frozen=True)
class Call:
    """function(*tensors) with gradients where `differentiable`. innermost: operands that kernels read in rows alone."""

    function: Callable[..., torch.Tensor]
    shapes: tuple[tuple[int, ...] | None, ...]
    innermost: tuple[int, ...] = ()
    differentiable: bool = True


def laid_out(values: torch.Tensor, layout: str, pick: random.Random, rows: bool = False) -> torch.Tensor:
    """The values in memory of that layout, with NaN around them; expanded, those of one index stand for its dimension.

    rows: the innermost dimension stays contiguous.
    """
    if rows and layout in ("stepped", "permuted"):
        layout = "sliced"
    if layout == "expanded":
        dim = pick.randrange(values.dim() - rows)
        return laid_out(values.narrow(dim, 0, min(1, values.shape[dim])), "offset", pick, rows).expand(
            [-1 if i != dim or not size else size for i, size in enumerate(values.shape)]
        )
    shape, order = list(values.shape), list(range(values.dim()))
    if layout == "permuted":
        pick.shuffle(order)
    step = 2 if layout == "stepped" else 1
    room = [step * size + 2 * (layout == "sliced") for size in (shape[i] for i in order)]
    offset = 0 if layout == "contiguous" else pick.randrange(1, 5)
    memory = torch.full((offset + torch.Size(room).numel(),), float("nan"), dtype=values.dtype)[offset:].view(room)
    if layout == "sliced":
        memory = memory[tuple(slice(1, size - 1) for size in room)]
    placed = memory[tuple(slice(None, None, step) for _ in room)].permute([order.index(i) for i in range(len(order))])
    placed.copy_(values)
    return placed


def random_call(pick: random.Random, operator: str) -> Call:
    return _OPERATORS[operator](pick)


def _single_query_attention(pick):
    batch, tokens, queries = pick.choice((0, 1, 2, 3)), pick.choice((1, 2, 7, 16, 33, 64)), pick.choice((1, 3, 6, 17))
    channels = pick.choice((8, 16, 24, 64, 96))
    normalize, extra = pick.random() < 0.5, pick.random() < 0.5
    counts = [pick.randint(0, tokens) for _ in range(batch)]
    lengths = torch.tensor(counts, dtype=torch.int64) if pick.random() < 0.5 else None
    shapes = (batch, queries, channels), (batch, tokens, channels), (batch, channels) if extra else None
    options = dict(normalize=normalize, eps=1e-5)
    if pick.random() < 0.3:
        return _packed_single_query_attention(pick, shapes, counts, options)

    def run(query, tokens, extra_token):
        return kernels.single_query_attention(query, tokens, extra_token, lengths=lengths, **options)

    return Call(run, shapes, innermost=(1,))


def _packed_single_query_attention(pick, shapes, room, options):
    offsets = torch.tensor([pick.randint(0, 3), *room]).cumsum(0)
    lengths = torch.tensor([pick.randint(0, each) for each in room]) if room and pick.random() < 0.5 else None

    def run(query, values, extra_token):
        tokens = torch.nested.nested_tensor_from_jagged(values, offsets, lengths)
        return kernels.single_query_attention(query, tokens, extra_token, **options)

    query, (_, _, channels), extra_token = shapes
    return Call(run, (query, (int(offsets[-1]) + pick.randint(0, 3), channels), extra_token), innermost=(1,))


def _dynamic_mixing(pick):
    dim, segments, reduced = pick.choice((1, 2)), pick.choice((1, 2, 3)), pick.choice((1, 2, 3, 4))
    sizes = [pick.choice((1, 3, 4, 8, 16)), pick.choice((1, 2, 5))]
    length, channels = sizes[0], segments * pick.choice((1, 3, 8, 16))
    height, width = sizes if dim == 1 else reversed(sizes)

    def run(*tensors):
        return kernels.dynamic_mixing(*tensors, segments=segments, dim=dim)

    rows = segments * reduced
    generate = (length**2, length * reduced), (length**2,)
    return Call(
        run, ((pick.choice((0, 1, 2)), height, width, channels), (rows, channels), (rows,), *generate), innermost=(0,)
    )


def _tied_ffn(pick):
    channels, features = pick.choice((1, 5, 8, 33, 64)), pick.choice((1, 7, 16, 64))
    leading = pick.choice(((1,), (7,), (300,), (2, 3), (2, 67, 2), (0, 3)))
    activation, recompute = pick.choice(("gelu", "gelu_tanh", "relu", "silu", "identity")), pick.random() < 0.5

    def run(*tensors):
        return kernels.tied_ffn(*tensors, activation=activation, recompute=recompute)

    biases = [size if pick.random() < 0.8 else None for size in ((features,), (channels,))]
    return Call(run, ((*leading, channels), (features, channels), *biases))


def _upconv_shapes(pick):
    scale = pick.choice((2, 2, 4, 8))
    batch, channels, up = pick.choice((0, 1, 2, 3)), pick.choice((1, 3, 16, 33)), pick.choice((1, 4, 16, 24))
    height, width = pick.choice((1, 3, 5)), pick.choice((1, 2, 7, 41))
    skip = (batch, pick.choice((1, 5, 16)), scale * height, scale * width)
    bias = (up,) if pick.random() < 0.8 else None
    return (batch, channels, height, width), (channels, up, scale, scale), bias, skip


def _upconv_concat(pick):
    x, weight, bias, skip = _upconv_shapes(pick)
    skip_first = pick.random() < 0.5

    def run(x, weight, bias, skip):
        return kernels.upconv_concat(x, weight, bias, skip, skip_first=skip_first)

    return Call(run, (x, weight, bias, skip if pick.random() < 0.8 else None))


def _upconv_concat_out(pick):
    x, weight, bias, skip = _upconv_shapes(pick)
    channels_last = pick.random() < 0.5

    def run(x, weight, bias, skip):
        shape = x.shape[0], weight.shape[1] + skip.shape[1], *skip.shape[2:]
        room = torch.full((shape[0], shape[1] + 3, shape[2] + 2, shape[3]), float("nan"), dtype=x.dtype)
        room = room.contiguous(memory_format=torch.channels_last) if channels_last else room
        out = room[:, 1 : 1 + shape[1], 1 : 1 + shape[2]]
        kernels.upconv_concat(x, weight, bias, skip, out=out)
        out = out.clone()
        room[:, 1 : 1 + shape[1], 1 : 1 + shape[2]] = float("nan")
        assert room.isnan().all(), "it wrote around out"
        return out

    return Call(run, (x, weight, bias, skip), differentiable=False)


def _upconv_concat_project(pick):
    x, weight, bias, skip = _upconv_shapes(pick)
    projected, skip_first = pick.choice((1, 6, 16)), pick.random() < 0.5
    skip = skip if pick.random() < 0.8 else None

    def run(*tensors):
        return kernels.upconv_concat_project(*tensors, skip_first=skip_first)

    joined = weight[1] + (skip[1] if skip else 0)
    proj_bias = (projected,) if pick.random() < 0.8 else None
    return Call(run, (x, weight, bias, skip, (projected, joined), proj_bias))


def _upconv_add(pick):
    x, weight, bias, skip = _upconv_shapes(pick)
    return Call(kernels.upconv_add, (x, weight, bias, (skip[0], weight[1], *skip[2:])))


def _linear(pick):
    rows, channels, features = pick.choice((1, 5, 130, 256)), pick.choice((1, 7, 16, 64)), pick.choice((1, 5, 32))
    activation = pick.choice((None, "gelu"))

    def run(x, weight, bias):
        return linear(x, weight, bias, activation)

    bias = (features,) if pick.random() < 0.8 else None
    return Call(run, ((rows, channels), (features, channels), bias), differentiable=False)


def _attention(pick):
    batch, heads, channels = pick.choice((1, 2)), pick.choice((1, 3)), pick.choice((5, 16, 32, 64))
    queries, tokens = pick.choice((1, 17, 40)), pick.choice((1, 16, 50, 130))
    shapes = [(batch, heads, count, channels) for count in (queries, tokens, tokens)]
    return Call(attention, tuple(shapes), differentiable=False)


def _mlp(pick):
    rows, channels = pick.choice((1, 5, 70, 150)), pick.choice((1, 7, 16, 64))
    features, outputs = pick.choice((1, 5, 40, 96)), pick.choice((1, 5, 32, 50))
    bias_in, bias_out = ((size,) if pick.random() < 0.8 else None for size in (features, outputs))
    shapes = (rows, channels), (features, channels), bias_in, (outputs, features), bias_out
    return Call(mlp, shapes, differentiable=False)


def _gated(pick):
    count, batch, tokens = pick.choice((1, 2, 3)), pick.choice((1, 2)), pick.choice((1, 5, 40))
    inputs, outputs = pick.choice((3, 16, 48)), pick.choice((5, 16, 64))
    shapes = [(batch, tokens, inputs)] * count + [(outputs, inputs)] * count + [(outputs,)] * count
    return count, tuple(shapes), (batch, count, outputs), outputs


def _gated_sum(pick):
    count, shapes, gates, _ = _gated(pick)

    def run(gates, *tensors):
        return gated_sum(tensors[:count], tensors[count : 2 * count], tensors[2 * count :], gates)

    return Call(run, (gates, *shapes), differentiable=pick.random() < 0.7)


def _gated_sum_out(pick):
    count, shapes, gates, outputs = _gated(pick)

    def run(gates, proj_weight, proj_bias, *tensors):
        out = tensors[0].new_full((*tensors[0].shape[:2], outputs), float("nan"))
        layers = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        return gated_sum(*layers, gates, proj_weight, proj_bias, out=out)

    return Call(run, (gates, (outputs, outputs), (outputs,), *shapes), differentiable=False)


_OPERATORS = {
    "single_query_attention": _single_query_attention,
    "dynamic_mixing": _dynamic_mixing,
    "tied_ffn": _tied_ffn,
    "upconv_concat": _upconv_concat,
    "upconv_concat, out": _upconv_concat_out,
    "upconv_concat_project": _upconv_concat_project,
    "upconv_add": _upconv_add,
    "linear": _linear,
    "attention": _attention,
    "mlp": _mlp,
    "gated_sum": _gated_sum,
    "gated_sum, out": _gated_sum_out,
}
OPERATORS = tuple(_OPERATORS)
