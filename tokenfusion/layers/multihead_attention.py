"""nn.MultiheadAttention of few queries over many tokens, with the key and value projections absorbed.

A subclass of torch's module that changes the forward pass alone: same parameters, same state_dict, same results up to
rounding, same random numbers.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tokenfusion.kernels.checks import symbolic
from tokenfusion.layers.attention_weights import additive, as_lengths
from tokenfusion.layers.drop_in import PLAIN, DropIn, within
from tokenfusion.layers.single_query_attention import (
    Projection,
    absorbed_attention,
    attention_with_weights,
)

_LEAST_WORTHWHILE = 3 << 20  # multiplications of the key projection; with fewer, what precedes the kernel takes longer
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")


class MultiheadAttention(DropIn, nn.MultiheadAttention):
    """Attention whose keys and values are never written where a call has few queries.

    Takes and holds what nn.MultiheadAttention does. One class serves self-attention, too, so each call decides: the
    fused form runs where key and value are one tensor and the query another, with fewer queries (heads x L) than half
    of the channels and more than a few tokens. A call that asks for the weights, as is the default, has a mask, or
    drops weights in training computes them in plain PyTorch; but on a CPU, where nobody asks for weights, a
    key_padding_mask of the last tokens of each image stands for their number, and these are not read. Any other call,
    and one with a part that was changed, runs torch's forward.
    """

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        channels = module.embed_dim
        if module.bias_k is not None or module.bias_v is not None:
            return "it has bias_k and bias_v, one more key and value for all images"
        if module.add_zero_attn:
            return "add_zero_attn is set: a key and value of zeros"
        parts, out = module._parameters, module._modules.get("out_proj")
        of_out = within("out_proj", _why_not_tensors(out._parameters, "weight", "bias"))
        reason = _why_not_tensors(parts, *_PROJECTIONS) or of_out
        if reason is not None:
            return reason
        if module.kdim != module.vdim:
            return f"kdim: {module.kdim} and vdim: {module.vdim}, of keys and values that are two tensors"
        sizes = [[] if weight is None else list(weight.shape) for weight in _weights(parts)]
        expected = [[channels, channels], [channels, module.kdim], [channels, module.kdim]]
        if sizes != expected:
            return f"its projections have weights {sizes}, expected {expected}"
        if channels % module.num_heads:
            return f"num_heads: {module.num_heads} does not divide embed_dim = {channels}"
        if module.num_heads >= module.kdim / 2:
            return f"num_heads: {module.num_heads} heads of {module.kdim} channels; projecting the tokens costs less"
        return None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As nn.MultiheadAttention's."""
        if torch.jit.is_scripting():
            return self.plain_forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if symbolic(query, key, value):
            options = {"key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask}
            options |= {"average_attn_weights": average_attn_weights, "is_causal": is_causal}
            return self.as_leaf((query, key, value), options)
        if (
            key is not value
            or query is key
            or is_causal
            or not self._serves(query, key, need_weights)
            or not _are_masks(key_padding_mask, attn_mask, query, self._mask_shapes(query, key))
            or not self.fuses(key, kept=True)
        ):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        out, weights = self._attend(
            self._images_first(query),
            self._images_first(key),
            key_padding_mask if key_padding_mask is None or query.dim() == 3 else key_padding_mask.unsqueeze(0),
            attn_mask,
            need_weights,
        )
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if query.dim() == 3 else weights[0]
        out = out.transpose(0, 1).contiguous()  # as torch has it: dropout afterwards draws in the order of memory
        out = F.linear(out, self.out_proj.weight, self.out_proj.bias)  # torch does not call it either
        if query.dim() == 2:
            out = out.squeeze(1)
        elif self.batch_first:
            out = out.transpose(0, 1)
        return out, weights

    def _attend(
        self,
        query: torch.Tensor,
        tokens: torch.Tensor,
        padding: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
        need_weights: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (Projection(*each) for each in zip(_weights(self._parameters), biases))
        heads = {"num_heads": self.num_heads, "scale": (self.embed_dim // self.num_heads) ** -0.5}
        dropout = self.dropout if self.training else 0.0
        if attn_mask is None and dropout == 0 and not need_weights:
            lengths = None if padding is None else as_lengths(padding)
            if padding is None or lengths is not None:
                return absorbed_attention(q(query), tokens, None, None, k, v, **heads, lengths=lengths), None
        mask = self._mask(padding, attn_mask, query.dtype)
        masked = {"mask": mask, "empty_is_zero": not need_weights}  # torch gives NaN together with the weights
        out, weights = attention_with_weights(q(query), tokens, None, None, k, v, **heads, **masked, dropout=dropout)
        return out, weights if need_weights else None

    def _serves(self, query: torch.Tensor, key: torch.Tensor, need_weights: bool) -> bool:
        """Whether the fused form is for tensors of this kind and size. What torch does not take, it gets to refuse."""
        if type(query) not in PLAIN or type(key) not in PLAIN or query.is_nested or key.is_nested:
            return False
        if query.dim() not in (2, 3) or query.dim() != key.dim() or query.numel() == 0 or key.numel() == 0:
            return False
        batch, tokens = self._dimensions(query)
        if batch is not None and query.shape[batch] != key.shape[batch]:
            return False
        if query.shape[-1] != self.embed_dim or key.shape[-1] != self.kdim or query.dtype != key.dtype:
            return False
        if self.dropout > 0 and self.training and not need_weights and key.device.type != "cpu":
            return False  # torch draws the random numbers inside a kernel
        if key.numel() * self.embed_dim < _LEAST_WORTHWHILE:
            return False
        return self.num_heads * query.shape[tokens] < self.kdim / 2

    def _dimensions(self, x: torch.Tensor) -> tuple[int | None, int]:
        """Where the batch is, if there is one, and where the tokens."""
        if x.dim() == 2:
            return None, 0
        return (0, 1) if self.batch_first else (1, 0)

    def _images_first(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _mask_shapes(self, query: torch.Tensor, key: torch.Tensor) -> tuple[list[list[int]], ...]:
        """Of key_padding_mask and attn_mask."""
        batch, tokens = self._dimensions(query)
        length, count = query.shape[tokens], key.shape[tokens]
        images = 1 if batch is None else query.shape[batch]
        padding = [count] if batch is None else [images, count]
        return [padding], [[length, count], [images * self.num_heads, length, count]]

    def _mask(
        self, padding: torch.Tensor | None, attn_mask: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Both in one, broadcast to [B, heads, L, N]."""
        mask = None if padding is None else additive(padding, dtype)[:, None, None]
        if attn_mask is not None:
            rows = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, self.num_heads))
            rows = additive(rows, dtype)
            mask = rows if mask is None else mask + rows
        return mask


def _weights(parameters: dict[str, torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    """Of query, key and value: one parameter where the tokens have as many channels as the queries, three otherwise."""
    together, *apart, _ = (parameters[name] for name in _PROJECTIONS)
    return tuple(apart) if together is None else together.chunk(3)


def _why_not_tensors(parameters: dict[str, torch.Tensor | None], *names: str) -> str | None:
    """Why the fused form may not read tensors that torch's forward reads, too: parametrized ones and subclasses do more
    than that when they are read."""
    for name in names:
        if name not in parameters:
            return f"{name} is no parameter"
        if parameters[name] is not None and type(parameters[name]) not in PLAIN:
            return f"{name} is of class {type(parameters[name]).__name__}"
    return None


def _are_masks(
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    query: torch.Tensor,
    shapes: tuple[list[list[int]], ...],
) -> bool:
    """Whether both are None or of what torch takes without a complaint."""
    given = [(mask, allowed) for mask, allowed in zip((key_padding_mask, attn_mask), shapes) if mask is not None]
    return (
        all(type(mask) in PLAIN and list(mask.shape) in allowed for mask, allowed in given)
        and all(mask.device == query.device and mask.dtype in (torch.bool, query.dtype) for mask, _ in given)
        and len({mask.dtype for mask, _ in given}) < 2
    )
