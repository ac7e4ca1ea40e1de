"""What the results of dynamic_mixing look like, for fakes and for every backend's host."""

import torch


def empty_mean(x, with_mean):
    """Uninitialised mean [B, D]; of size 0 where none is wanted."""
    return x.new_empty(x.shape[0], x.shape[3]) if with_mean else x.new_empty(0)


def empty_gradients(tensors, needed):
    """Uninitialised contiguous gradients of the tensors; of size 0 where none is needed."""
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if wanted else tensor.new_empty(0)
        for tensor, wanted in zip(tensors, needed, strict=True)
    )
