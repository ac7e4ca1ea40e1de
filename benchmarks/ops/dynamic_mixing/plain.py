"""DynaMixer as its authors run it: sequences made by copies, mixed in the last dimension, three maps weighted and added."""

import torch

from tokenfusion import layers


def mixed(x, compress_weight, compress_bias, generate_weight, generate_bias, *, segments: int) -> torch.Tensor:
    """Mixes the tokens of sequences x [B, N, D]."""
    batch, length, channels = x.shape
    weights = torch.nn.functional.linear(x, compress_weight, compress_bias)
    weights = weights.reshape(batch, length, segments, -1).permute(0, 2, 1, 3).reshape(batch, segments, -1)
    weights = torch.nn.functional.linear(weights, generate_weight, generate_bias)
    weights = weights.reshape(batch, segments, length, length).softmax(dim=-2)
    tokens = x.reshape(batch, length, segments, channels // segments).permute(0, 2, 3, 1)
    return torch.matmul(tokens, weights).permute(0, 3, 1, 2).reshape(batch, length, channels)


def along(x: torch.Tensor, dim: int, function) -> torch.Tensor:
    """function of the sequences along dimension dim of x [B, H, W, D]."""
    x = x.transpose(1, 2) if dim == 1 else x
    out = function(x.reshape(-1, *x.shape[2:])).reshape(x.shape)
    return out.transpose(1, 2) if dim == 1 else out


class PlainBlock(layers.DynaMixerBlock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def apply(op, dim):
            weights = op.compress.weight, op.compress.bias, op.generate.weight, op.generate.bias
            return along(x, dim, lambda sequences: op.out(mixed(sequences, *weights, segments=op.num_head)))

        parts = apply(self.mix_h, 1), apply(self.mix_w, 2), self.mlp_c(x)
        mean = sum(parts).mean(dim=(1, 2))
        shares = self.reweight(mean).reshape(len(x), self.dim, 3).permute(2, 0, 1).softmax(0)[:, :, None, None]
        return self.proj(sum(part * share for part, share in zip(parts, shares, strict=True)))
