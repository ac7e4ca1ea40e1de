"""Inputs for the tests of the up-convolutions, and what to hold results against."""

import torch

from tests.gradients import Tensors, check_frozen, in_float64, with_gradients
from tests.parity import assert_parity, assert_runs, assert_trains
from tokenfusion.kernels import upconv_add, upconv_concat, upconv_concat_project
from tokenfusion.kernels.upconv import reference

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Of x, weight, skip and the gradient of the result.
UNIFORM = [("nchw",) * 4, ("nhwc",) * 4]
MIXED = [("nchw", "nhwc", "nchw", "nhwc"), ("nhwc", "nchw", "nchw", "nchw"), ("nhwc", "nchw", "nhwc", "nchw")]
OPS = {
    "concat": (upconv_concat, reference.upconv_concat),
    "project": (upconv_concat_project, reference.upconv_concat_project),
    "add": (upconv_add, reference.upconv_add),
}
NAMES = ("x", "weight", "bias", "skip", "proj_weight", "proj_bias")


def make_inputs(
    op: str = "concat",
    batch: int = 2,
    channels: tuple[int, int, int] = (5, 3, 4),
    size: tuple[int, int] = (3, 5),
    scale: int = 2,
    *,
    projected: int = 6,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    formats: tuple[str, str, str, str] = ("nchw",) * 4,
    seed: int = 0,
    device: str = "cpu",
) -> Tensors:
    """The op's tensors, which require gradients, and a gradient of its result, in the formats of x, weight, skip and
    that gradient; channels of x, weight and skip, the last one 0 for none."""
    generator = torch.Generator().manual_seed(seed)
    x_channels, up_channels, skip_channels = channels
    height, width = (scale * s for s in size)

    def normal(*shape: int, std: float = 1.0, format: str = "nchw") -> torch.Tensor:
        tensor = (std * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(device, dtype)
        return tensor.contiguous(memory_format=FORMATS[format]) if len(shape) == 4 else tensor

    if op == "add":
        skip_channels = up_channels
    tensors = [
        normal(batch, x_channels, *size, format=formats[0]),
        normal(x_channels, up_channels, scale, scale, std=x_channels**-0.5, format=formats[1]),
        normal(up_channels) if bias else None,
        normal(batch, skip_channels, height, width, format=formats[2]) if skip_channels else None,
    ]
    joined = up_channels + skip_channels
    if op == "project":
        tensors += [normal(projected, joined, std=joined**-0.5), normal(projected) if bias else None]
    out_channels = {"concat": joined, "project": projected, "add": up_channels}[op]
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    return *tensors, normal(batch, out_channels, height, width, format=formats[3])


def check_parity(op: str, inputs: Tensors, **options) -> None:
    """Result and gradients of the op obey the parity rule."""
    function, definition = OPS[op]
    actual = with_gradients(function, inputs, **options)
    unfused = with_gradients(definition, inputs, **options)
    exact = with_gradients(definition, in_float64(inputs), **options)
    names = ["out", *(n for n, t in zip(NAMES, inputs[:-1]) if t is not None)]
    pixels, widest = inputs[-1][:, 0].numel(), max(inputs[1].shape[0], inputs[1][0].numel())
    for name, *tensors in zip(names, actual, unfused, exact, strict=True):
        assert_parity(*tensors, name=name, summands=widest if name in ("out", "x", "skip") else pixels)


def check(op: str, inputs: Tensors, **options) -> None:
    """The backend in force computes result and gradients of the op, and they obey the parity rule."""
    with assert_trains("upconv_concat" if op == "concat" else "upconv_concat_project"):
        check_parity(op, inputs, **options)


def check_out_and_its_slice(inputs: Tensors, backend: str) -> None:
    """The backend in force writes to out, also where the skip is there already."""
    x, weight, bias, skip, _ = (tensor.detach() for tensor in inputs)
    expected = upconv_concat(x, weight, bias, skip)
    out = torch.full_like(expected, torch.nan)
    with assert_runs(f"upconv_concat_out_{backend}"):
        upconv_concat(x, weight, bias, skip, out=out)
    assert torch.equal(out, expected)
    out[:, : weight.shape[1]] = torch.nan
    upconv_concat(x, weight, bias, out[:, weight.shape[1] :], out=out)
    assert torch.equal(out, expected)


def check_frozen_inputs_and_empty_batch(op: str, device: str) -> None:
    function, inputs = OPS[op][0], make_inputs(op, device=device)
    check_frozen(function, inputs, *({i} for i in range(len(inputs) - 1)))
    out, *grads = with_gradients(function, make_inputs(op, batch=0, device=device))
    assert out.shape[0] == 0 and all((grad == 0).all() for grad in grads)
