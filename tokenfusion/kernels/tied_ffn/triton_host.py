"""Launches of tied_ffn's Triton kernels: tiles, splits over the tokens, outputs and partial sums."""

import torch
import triton

from tokenfusion.kernels.tied_ffn import triton_kernels
from tokenfusion.kernels.tied_ffn.shapes import empty_gradients, empty_outputs

NARROW = 128  # channels up to which both products run back to back, and the hidden layer is never written
ROWS_PER_SPLIT = 1024  # tokens of one partial sum of the weight's gradient, at least
MAX_SPLITS = 16


def _options(itemsize: int, form: str, accumulators: int = 1) -> dict[str, int]:
    """Tile sizes in the order rows, columns, depth of a product, and how they run; none spills on sm_80 to sm_100.

    Forms: "small" tiles, of which there are more where the tokens are few, and "deep" ones, which wait for memory half
    as often.
    """
    if itemsize == 4:
        return {"rows": 32, "columns": 32, "depth": 16, "num_warps": 4, "num_stages": 2}
    if form == "small":
        return {"rows": 64, "columns": 64, "depth": 64, "num_warps": 4, "num_stages": 3}
    depth = 64 if form == "deep" else 32
    return {"rows": 128 // accumulators, "columns": 128, "depth": depth, "num_warps": 8, "num_stages": 3}


def _linear(x, weight, bias, out, form: str, *, transposed: bool, activation: str = "identity", held=None) -> None:
    """out = activation(x weight^T + bias) where transposed, else of x weight + bias; held gets its argument."""
    rows, depth = x.shape
    columns = out.shape[1]
    tile = _options(x.element_size(), form)
    triton_kernels.linear_kernel[(triton.cdiv(columns, tile["columns"]) * triton.cdiv(rows, tile["rows"]),)](
        x,
        weight,
        weight if bias is None else bias,
        out if held is None else held,
        out,
        rows,
        N=columns,
        K=depth,
        BM=tile["rows"],
        BN=tile["columns"],
        BK=tile["depth"],
        TRANSPOSED=transposed,
        HAS_BIAS=bias is not None,
        HOLD=held is not None,
        ACTIVATION=activation,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def run_forward(x, weight, bias_in, bias_out, activation, hold, form=""):
    bias_in, bias_out = _contiguous(bias_in), _contiguous(bias_out)
    y, hidden = empty_outputs(x, weight, hold)
    if y.numel() == 0:
        return y, hidden
    features, channels = weight.shape
    rows, weight, flat_y = _flat(x), weight.contiguous(), y.view(-1, channels)
    with torch.cuda.device_of(x):
        if channels <= NARROW and not hold:
            block_c = max(16, triton.next_power_of_2(channels))
            wide = x.element_size() == 4
            block_m = 32 if wide else 64
            triton_kernels.narrow_forward_kernel[(triton.cdiv(len(rows), block_m),)](
                rows,
                weight,
                weight if bias_in is None else bias_in,
                weight if bias_out is None else bias_out,
                y,
                len(rows),
                F=features,
                C=channels,
                BM=block_m,
                BF=16 if wide else 64,
                BC=block_c,
                HAS_BIAS_IN=bias_in is not None,
                HAS_BIAS_OUT=bias_out is not None,
                ACTIVATION=activation,
                num_warps=4,
                num_stages=2,
            )
        else:
            activated = x.new_empty(len(rows), features)
            held = hidden.view(-1, features) if hold else None
            _linear(rows, weight, bias_in, activated, form, transposed=True, activation=activation, held=held)
            _linear(activated, weight, bias_out, flat_y, form, transposed=False)
    return y, hidden


def _contiguous(bias):
    return None if bias is None else bias.contiguous()


def run_backward(grad_y, x, weight, bias_in, hidden, activation, needed, form=""):
    bias_in, hidden = _contiguous(bias_in), hidden.contiguous()
    grads = empty_gradients(x, weight, needed)
    if x.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    features, channels = weight.shape
    rows, grad_rows, weight = _flat(x), _flat(grad_y), weight.contiguous()
    grad_x, grad_weight, grad_bias_in, grad_bias_out = grads
    activated, grad_hidden = x.new_empty(2, len(rows), features)
    with torch.cuda.device_of(x):
        if any(needed[:3]):
            _hidden_backward(rows, grad_rows, weight, bias_in, hidden, activated, grad_hidden, activation, form)
        if needed[0]:
            _linear(grad_hidden, weight, None, grad_x.view(-1, channels), form, transposed=False)
        if needed[1]:
            grad_weight.copy_(_grad_weight(rows, grad_rows, activated, grad_hidden, form).sum(0))
        if needed[2]:
            grad_bias_in.copy_(grad_hidden.sum(0, dtype=torch.float32))
        if needed[3]:
            grad_bias_out.copy_(grad_rows.sum(0, dtype=torch.float32))
    return grads


def _hidden_backward(x, grad_y, weight, bias_in, hidden, activated, grad_hidden, activation, form) -> None:
    features, channels = weight.shape
    held = hidden.numel() > 0
    tile = _options(x.element_size(), form, accumulators=2)
    programs = triton.cdiv(features, tile["columns"]) * triton.cdiv(len(x), tile["rows"])
    triton_kernels.hidden_backward_kernel[(programs,)](
        x,
        grad_y,
        weight,
        weight if bias_in is None else bias_in,
        hidden if held else x,
        activated,
        grad_hidden,
        len(x),
        F=features,
        C=channels,
        BM=tile["rows"],
        BF=tile["columns"],
        BC=tile["depth"],
        HAS_BIAS=bias_in is not None,
        HELD=held,
        ACTIVATION=activation,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )


def _grad_weight(x, grad_y, activated, grad_hidden, form) -> torch.Tensor:
    """Partial sums [splits, F, C] over consecutive tokens, in float32."""
    (count, channels), features = x.shape, activated.shape[1]
    tile = _options(x.element_size(), form)
    rows_per_split = max(ROWS_PER_SPLIT, triton.cdiv(triton.cdiv(count, MAX_SPLITS), tile["depth"]) * tile["depth"])
    splits = triton.cdiv(count, rows_per_split)
    partial = x.new_empty(splits, features, channels, dtype=torch.float32)
    programs = triton.cdiv(features, tile["rows"]) * triton.cdiv(channels, tile["columns"]) * splits
    triton_kernels.grad_weight_kernel[(programs,)](
        x,
        grad_y,
        activated,
        grad_hidden,
        partial,
        count,
        rows_per_split,
        F=features,
        C=channels,
        BM=tile["depth"],
        BF=tile["rows"],
        BC=tile["columns"],
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )
    return partial
