"""DynaMixer's generating weights for another number of tokens.

A generator maps the compressed features z of N tokens to logits G[source, target]. Tokens are cells of an image whose
extent stays the same, so on N' tokens

    G' = R G(D z') R^T

with D [N, N'] and R [N', N] the bicubic resampling of N' values to N and of N values to N': the logits that the old
generator gives for the features brought to its grid, brought to the new grid. This is linear in z', so it is again a
generator,

    W'[(i', j'), (n', k)] = sum_ijn R[i', i] R[j', j] W[(i, j), (n, k)] D[n, n'],     b' = R b R^T.

Rows of D and R sum to one: constant features give the same logits as before, and a bias that is the same for all
sources still drops out of the softmax. That normalises over the sources, of which there are N' / N as many: each target
spreads its weights over the image as before, and one source has N / N' of the weight that it had. The weights of all
other layers are of single tokens and stay as they are.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tokenfusion.layers import DynaMixerOp


def resampling_matrix(old: int, new: int) -> torch.Tensor:
    """[new, old], float64: bicubic resampling of a line of cells, antialiased where they get fewer."""
    identity = torch.eye(old, dtype=torch.float64)
    if old == new:
        return identity
    image = identity[None, None]
    return F.interpolate(image, size=(new, old), mode="bicubic", align_corners=False, antialias=True)[0, 0]


def resampled(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A checkpoint with the generators of every DynaMixerOp of model brought to its number of tokens.

    What is of no generator, or does not look like one, stays as it is.
    """
    state_dict = dict(state_dict)
    for prefix, op in model.named_modules():
        if isinstance(op, DynaMixerOp):
            for name, resample in _RESAMPLE[op.generator].items():
                name = f"{prefix}.{name}"
                value = state_dict.get(name)
                if isinstance(value, torch.Tensor):
                    state_dict[name] = resample(value, op)
    return state_dict


def _generate_weight(weight: torch.Tensor, op: DynaMixerOp) -> torch.Tensor:
    """[N * N, N * d]."""
    old, new = isqrt(len(weight)), op.seq_len
    if old == new or weight.ndim != 2 or weight.shape != (old * old, old * op.reduced_dim):
        return weight
    weight = weight.unflatten(1, (old, -1)).unflatten(0, (old, old))  # [source, target, n, k]
    back = resampling_matrix(new, old).T
    return _along(weight, resampling_matrix(old, new), resampling_matrix(old, new), back).flatten(2).flatten(0, 1)


def _generate_bias(bias: torch.Tensor, op: DynaMixerOp) -> torch.Tensor:
    """[N * N]."""
    old, new = isqrt(bias.numel()), op.seq_len
    if old == new or bias.shape != (old * old,):
        return bias
    return _along(bias.unflatten(0, (old, old)), *[resampling_matrix(old, new)] * 2).flatten()


def _random_logits(logits: torch.Tensor, op: DynaMixerOp) -> torch.Tensor:
    """[S, N, N]."""
    if logits.ndim != 3 or logits.shape[1] != logits.shape[2] or logits.shape[1] == op.seq_len:
        return logits
    matrix = resampling_matrix(logits.shape[1], op.seq_len)
    return _along(logits.movedim(0, -1), matrix, matrix).movedim(-1, 0)


def _dense_rows(rows: torch.Tensor, op: DynaMixerOp) -> torch.Tensor:
    """[S * N, D] or [S * N]: the logits of a target's N sources."""
    old, rest = divmod(len(rows), op.num_head)
    if rest or old == op.seq_len:
        return rows
    rows = rows.unflatten(0, (op.num_head, old)).movedim(1, 0)  # [source, S, ...]
    return _along(rows, resampling_matrix(old, op.seq_len)).movedim(0, 1).flatten(0, 1)


_RESAMPLE = {
    "dynamic": {"generate.weight": _generate_weight, "generate.bias": _generate_bias},
    "random": {"logits": _random_logits},
    "dense": {"generate.fc2.weight": _dense_rows, "generate.fc2.bias": _dense_rows},
}


def _along(tensor: torch.Tensor, *matrices: torch.Tensor) -> torch.Tensor:
    """The leading dimensions of a tensor, each by its matrix; in float64, rounded once."""
    result = tensor.double()
    for dim, matrix in enumerate(matrices):
        result = torch.tensordot(matrix.to(result.device), result, dims=([1], [dim])).movedim(0, dim)
    return result.to(tensor.dtype).contiguous()
