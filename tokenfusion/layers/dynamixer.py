"""DynaMixer's operation and block (arXiv:2201.12083) around dynamic_mixing, with the official parameter names."""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn

from tokenfusion.kernels import dynamic_mixing, gated_sum
from tokenfusion.kernels.checks import autocast, check_sizes, symbolic
from tokenfusion.kernels.dynamic_mixing.op import mix
from tokenfusion.kernels.dynamic_mixing.reference import apply_mixing
from tokenfusion.kernels.linear import linear
from tokenfusion.layers.block_inference import are_plain
from tokenfusion.layers.drop_in import why_not_linear, why_not_part, within
from tokenfusion.layers.own_layer import OwnLayer

GENERATORS = ("dynamic", "random", "dense")
_PIECE_BYTES = 4 << 20  # of the input of a block in inference, whose parts then stay in the cache


class DynaMixerOp(OwnLayer, nn.Module):
    """Mixes the tokens of a sequence, DynaMixer's Eq. 5 to 7: compress, generate, softmax over sources, mix, project.

    Args:
        dim: channels D of a token.
        seq_len: tokens N of a sequence.
        num_head: segments S of the channels, each mixed by a matrix of its own.
        reduced_dim: numbers d a token is compressed to for each segment.
        generator: where the matrices come from: "dynamic", from all tokens of the sequence; or a generator of
            Synthesizer (arXiv:2005.00743; DynaMixer's Table 6), "random": parameters, the same for every input;
            "dense": the row of a target from that token alone, by two linear layers.

    Raises:
        ValueError: num_head does not divide dim; an unknown generator; a size below 1.
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        num_head: int,
        reduced_dim: int = 2,
        *,
        generator: str = "dynamic",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(dim=dim, seq_len=seq_len, num_head=num_head, reduced_dim=reduced_dim)
        if dim % num_head:
            raise ValueError(f"num_head: got {num_head}, expected a divisor of dim = {dim}")
        if generator not in GENERATORS:
            raise ValueError(f"generator: got {generator!r}, expected one of {', '.join(map(repr, GENERATORS))}")
        made = dict(device=device, dtype=dtype)
        self.dim, self.seq_len, self.num_head, self.reduced_dim = dim, seq_len, num_head, reduced_dim
        self.generator = generator
        if generator == "dynamic":
            self.compress = nn.Linear(dim, num_head * reduced_dim, **made)
            self.generate = nn.Linear(seq_len * reduced_dim, seq_len * seq_len, **made)
        elif generator == "random":
            self.logits = nn.Parameter(torch.empty(num_head, seq_len, seq_len, **made))
            nn.init.trunc_normal_(self.logits, std=0.02)
        else:
            self.generate = Mlp(dim, dim, num_head * seq_len, act_layer=nn.ReLU, **made)
        self.out = nn.Linear(dim, dim, **made)

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        if module.generator != "dynamic":
            return None  # those call all their parts
        parts, length, compressed = module._modules, module.seq_len, module.reduced_dim
        return why_not_linear(
            parts.get("compress"), "compress", module.num_head * compressed, module.dim
        ) or why_not_linear(parts.get("generate"), "generate", length * length, length * compressed)

    def mix(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Mixes along dimension dim of x [B, H, W, D], 1 or 2, without the output projection.

        Raises:
            ValueError: another number of tokens or channels than the layer was made for.
        """
        self._check(x, dim)
        if self.generator == "dynamic" and self.fuses(x):
            return mixed(self, x, dim, self.num_head)
        x = x.movedim(dim, 2)
        return apply_mixing(x, self.matrices(x)).movedim(2, dim)

    def matrices(self, x: torch.Tensor) -> torch.Tensor:
        """Mixing matrices [..., S, source, target] of lines x [..., N, D], which sum to one over the sources."""
        if hasattr(self, "compress"):
            compressed = self.compress(x).unflatten(-1, (self.num_head, self.reduced_dim)).transpose(-3, -2)
            logits = self.generate(compressed.flatten(-2)).unflatten(-1, (self.seq_len, self.seq_len))
            return logits.softmax(dim=-2)
        if hasattr(self, "logits"):
            return self.logits.softmax(dim=-2)
        logits = self.generate(x).unflatten(-1, (self.num_head, self.seq_len))  # [..., target, S, source]
        return logits.softmax(dim=-1).transpose(-3, -2).transpose(-2, -1)

    def plain_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(apply_mixing(x, self.matrices(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, D] -> [B, N, D]."""
        if torch.jit.is_scripting():
            return self.plain_forward(x)
        return self.out(self.mix(x.unsqueeze(1), 2).squeeze(1))

    def _check(self, x: torch.Tensor, dim: int) -> None:
        if not symbolic(x) and (x.shape[dim] != self.seq_len or x.shape[3] != self.dim):
            raise ValueError(
                f"x: got shape {list(x.shape)}, expected N = {self.seq_len} tokens along dimension {dim} and "
                f"D = {self.dim} channels"
            )


class DynaMixerBlock(OwnLayer, nn.Module):
    """Mixes tokens along columns and rows, and channels, and adds up the three with weights of their own.

    DynaMixer's block (Fig. 2 and 3.2) with its reweighting: of the mean over positions of the sum of the parts, a
    two-layer network makes a softmax over the parts for each channel. It has no outputs for parts that are left out.

    Args:
        dim: channels D.
        resolution: tokens (H, W) of an image, or one number for both.
        num_head, reduced_dim, generator: as in `DynaMixerOp`.
        row_mixing, column_mixing, channel_mixing: which parts there are (Table 8). Row mixing is along W (`mix_w`),
            column mixing along H (`mix_h`), channel mixing a linear layer (`mlp_c`).
        reweighting: weigh the parts; False is the plain sum, Eq. 9.
        shared: one operation, `mix_h`, for both directions.

    Raises:
        ValueError: as DynaMixerOp; no part at all; shared for a resolution that is not square or without both
            directions.
    """

    shared: Final[bool]

    def __init__(
        self,
        dim: int,
        resolution: int | tuple[int, int] = 32,
        num_head: int = 8,
        reduced_dim: int = 2,
        *,
        generator: str = "dynamic",
        row_mixing: bool = True,
        column_mixing: bool = True,
        channel_mixing: bool = True,
        reweighting: bool = True,
        shared: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        parts = row_mixing + column_mixing + channel_mixing
        if parts == 0:
            raise ValueError("row_mixing, column_mixing, channel_mixing: got False for all, expected one at least")
        if shared and (height != width or not (row_mixing and column_mixing)):
            raise ValueError(
                f"shared: got True for resolution {(height, width)}, row_mixing {row_mixing} and column_mixing "
                f"{column_mixing}, expected H = W and both directions"
            )
        made = dict(device=device, dtype=dtype)

        def op(length: int) -> DynaMixerOp:
            return DynaMixerOp(dim, length, num_head, reduced_dim, generator=generator, **made)

        self.dim, self.resolution, self.shared = dim, (height, width), shared
        self.mix_h = op(height) if column_mixing else None
        self.mix_w = op(width) if row_mixing and not shared else None
        self.mlp_c = nn.Linear(dim, dim, bias=False, **made) if channel_mixing else None
        self.reweight = Mlp(dim, dim // 4, dim * parts, **made) if reweighting and parts > 1 else None
        self.proj = nn.Linear(dim, dim, **made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, D] -> [B, H, W, D]; under autocast in its dtype.

        Raises:
            ValueError: another number of tokens or channels than the block was made for.
        """
        if torch.jit.is_scripting():
            return self.plain_forward(x)
        self._check(x)
        if self.fuses(x):
            return self._fused(x)
        return self.plain_forward(x)

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        parts, dim = module._modules, module.dim
        reason = why_not_linear(parts.get("proj"), "proj", dim, dim)
        if reason is None and module.mlp_c is not None:
            reason = why_not_linear(parts.get("mlp_c"), "mlp_c", dim, dim)
        for name in ("mix_h", "mix_w"):
            op = parts.get(name)
            if reason is None and op is not None:
                reason = why_not_part(op, name, DynaMixerOp) or within(
                    name, DynaMixerOp.why_not(op) or why_not_linear(op._modules.get("out"), "out", dim, dim)
                )
        return reason

    def plain_forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = self.resolution
        parts: list[torch.Tensor] = []
        if self.mix_h is not None:
            columns = x.transpose(1, 2).flatten(0, 1)
            parts.append(self.mix_h(columns).unflatten(0, (-1, width)).transpose(1, 2))
        if self.shared:
            parts.append(self.mix_h(x.flatten(0, 1)).unflatten(0, (-1, height)))
        elif self.mix_w is not None:
            parts.append(self.mix_w(x.flatten(0, 1)).unflatten(0, (-1, height)))
        if self.mlp_c is not None:
            parts.append(self.mlp_c(x))
        stacked = torch.stack(parts, dim=-1)
        if self.reweight is not None:
            shares = self.reweight(stacked.sum(dim=-1).mean(dim=(1, 2))).unflatten(-1, (self.dim, len(parts)))
            stacked = stacked * shares.softmax(dim=-1)[:, None, None]
        return self.proj(stacked.sum(dim=-1))

    def _check(self, x: torch.Tensor) -> None:
        if not symbolic(x) and (x.dim() != 4 or x.shape[1:] != (*self.resolution, self.dim)):
            raise ValueError(
                f"x: got shape {list(x.shape)}, expected [B, {self.resolution[0]}, {self.resolution[1]}, {self.dim}]"
            )

    def _fused(self, x: torch.Tensor) -> torch.Tensor:
        along_w = self.mix_h if self.shared else self.mix_w
        mixings = [Mixing(op, op.num_head, dim) for op, dim in ((self.mix_h, 1), (along_w, 2)) if op is not None]
        branches = Branches(tuple(mixings), self.mlp_c, self.reweight, self.proj)
        return run_block(branches, x, lambda: are_plain(self.reweight))


class Mixing(NamedTuple):
    """An operation, of this package or of somebody else's class, and the dimension that it mixes along."""

    op: nn.Module
    segments: int
    dim: int


class Branches(NamedTuple):
    """What the fused form of a block reads and calls."""

    mixings: tuple[Mixing, ...]
    mlp_c: nn.Linear | None
    reweight: nn.Module | None
    proj: nn.Linear


def mixed(op: nn.Module, x: torch.Tensor, dim: int, segments: int) -> torch.Tensor:
    """x [B, H, W, D] mixed along dimension dim by an operation, without its output projection."""
    weights = op.compress.weight, op.compress.bias, op.generate.weight, op.generate.bias
    return dynamic_mixing(x, *weights, segments=segments, dim=dim)


def run_block(branches: Branches, x: torch.Tensor, in_pieces: Callable[[], bool]) -> torch.Tensor:
    """in_pieces: whether the reweighting gives the same for a few images at a time, without anybody seeing it."""
    x, *tensors = autocast(x, *_tensors(branches))
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _run(branches, x, *tensors)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    images = max(1, _PIECE_BYTES // max(1, x[:1].nbytes))
    if branches.reweight is None or (images < len(x) and not in_pieces()):
        images = max(1, len(x))
    for piece, target in zip(x.split(images), out.split(images)):
        _run(branches, piece, *tensors, out=target.flatten(1, 2))
    return out


def _tensors(branches: Branches) -> tuple[torch.Tensor | None, ...]:
    """The projection's weight and bias, then those of the branches' linear layers, first all weights."""
    linears = [mixing.op.out for mixing in branches.mixings] + ([] if branches.mlp_c is None else [branches.mlp_c])
    weights, biases = ([getattr(linear, name) for linear in linears] for name in ("weight", "bias"))
    return branches.proj.weight, branches.proj.bias, *weights, *biases


def _run(branches: Branches, x, proj_weight, proj_bias, *of_linears, out=None) -> torch.Tensor:
    """The block in the dtype of x; where no gradient is recorded, into `out`."""
    reweight, dim = branches.reweight, x.shape[-1]
    parts = _mix_all(branches.mixings, x, reweight is not None)
    if branches.mlp_c is not None:
        parts.append((x, None if reweight is None else _mean(x)))
    count = len(parts)
    weights, biases = of_linears[:count], of_linears[count:]
    if reweight is None:
        gates = x.new_ones(1, count, dim)
    else:  # the mean of a linear layer's output is that of its mean input
        mean = sum(map(F.linear, (mean for _, mean in parts), weights, biases))
        gates = reweight(mean).unflatten(-1, (dim, count)).softmax(dim=-1)
        gates = gates.transpose(1, 2).to(mean.dtype).contiguous()
    inputs = [part.flatten(1, 2) for part, _ in parts]
    return gated_sum(inputs, weights, biases, gates, proj_weight, proj_bias, out=out).view(x.shape)


def _mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean(dim=(1, 2))


def _mix_all(
    mixings: tuple[Mixing, ...], x: torch.Tensor, with_mean: bool
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """x mixed along each direction, and its mean where wanted; one product compresses the tokens for all of them."""
    if any(isinstance(op, DynaMixerOp) and op.generator != "dynamic" for op, *_ in mixings):
        parts = [op.mix(x, dim) for op, _, dim in mixings]
        return [(part, _mean(part) if with_mean else None) for part in parts]
    if not mixings:
        return []
    ops = list(dict.fromkeys(op for op, *_ in mixings))
    of_ops = ([getattr(op.compress, name) for op in ops] for name in ("weight", "bias"))
    weight, bias = (torch.cat(autocast(x, *each)[1:]) for each in of_ops)  # torch.cat refuses the other half precision
    compressed = linear(x, weight, bias).chunk(len(ops), dim=-1)
    outs = []
    for op, segments, dim in mixings:
        _, *generate = autocast(x, op.generate.weight, op.generate.bias)
        of_op = compressed[ops.index(op)]
        outs.append(mix(x, of_op, *generate, segments=segments, dim=dim, with_mean=with_mean))
    return outs
